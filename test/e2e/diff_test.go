//go:build e2e

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// TestDiff compares the kernel with the API server: with the settings of the running Fairlead, and with
// its flags after it has ended and the cluster has changed.
func TestDiff(t *testing.T) {
	s := newScenario(t, sharedCluster)
	if s.fairlead.kubeProxy {
		t.Skip("kube-proxy has no diff")
	}
	first := s.createPod("web")
	v := s.createService("web")
	s.waitReaches(s.addClient(), tcpTo(v.addrPort(80)), first)
	s.eventually(func(ctx context.Context) error {
		if code, out := s.diff(ctx); code != 0 {
			return fmt.Errorf("while Fairlead runs: exit code %d, output:\n%s", code, out)
		}
		return nil
	})
	s.must(s.fairlead.stop())
	second := s.createPod("web")
	want := []string{"Service " + v.Namespace + "/web", "+     endpoints: " + second.IPv4.String(), "  # EndpointSlice web-"}
	s.eventually(func(ctx context.Context) error {
		code, out := s.diff(ctx, s.fairlead.args[1:]...)
		for _, part := range want {
			if code != 1 || !strings.Contains(out, part) {
				return fmt.Errorf("exit code %d, want 1; output lacks %q:\n%s", code, part, out)
			}
		}
		return nil
	})
	s.must(s.start(s.ctx))
}

// diff runs fairlead diff on the node, and returns its exit code and output.
func (s *scenario) diff(ctx context.Context, args ...string) (code int, output string) {
	s.Helper()
	var out []byte
	err := s.net.Node.Do(func() (err error) {
		out, err = exec.CommandContext(ctx, s.fairlead.binary, append([]string{"diff"}, args...)...).CombinedOutput()
		return err
	})
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode(), string(out)
	}
	s.must(err)
	return 0, string(out)
}
