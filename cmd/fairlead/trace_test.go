package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

// TestTraceArguments checks the errors for arguments that trace cannot use.
func TestTraceArguments(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"node"}, "accepts 2 arg(s), received 1"},
		{[]string{"node", ":80"}, "no Service, host name or address: use TO[:PORT][/PROTOCOL]"},
		{[]string{"node", "[fd00::1"}, "use [ADDRESS]:PORT"},
		{[]string{"node", "web", "-o", "yaml"}, `--output: unknown format "yaml": use text or json`},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			t.Parallel()
			var out, errOut bytes.Buffer
			code := run(t.Context(), append([]string{"trace"}, test.args...), &out, &errOut, func(*slog.Logger) {})
			if code == 0 || !strings.Contains(errOut.String(), test.want) {
				t.Errorf("exit code %d, error %q, want %q", code, errOut.String(), test.want)
			}
		})
	}
}
