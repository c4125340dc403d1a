package config

import (
	"bytes"
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestLogWarnings checks that the log has one line for each kind of warning, whatever their number.
func TestLogWarnings(t *testing.T) {
	t.Parallel()
	file := configHeader + "resourceContainer: /kube-proxy\nclustercidr: 10.0.0.0/8\nudpIdleTimeout: 0s\nipvs: {scheduler: lc, syncPeriod: 5s, minSyncPeriod: 1s}\n" +
		"mode: iptables\nmode: nftables\nconfigSyncPeriod: 15m\nlogging: {flushFrequency: 5s, vmodule: [{filePattern: a, verbosity: 3}]}\n"
	c, _, err := Load(parseFlags(t, "--config="+writeConfigFile(t, file), "--hostname-override=node", "--healthz-port=1", "--vmodule=a=3", "--feature-gates=A=true"))
	if err != nil {
		t.Fatal(err)
	}
	c.Warnings = append(c.Warnings, Warning{"--healthz-port", "use --healthz-bind-address", Deprecated})
	var log bytes.Buffer
	options := &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}
	c.LogWarnings(t.Context(), slog.New(slog.NewTextHandler(&log, options)))
	const want = `level=WARN msg="fields of the configuration file are ignored" settings="clustercidr (unknown field: write it as clusterCIDR); ` +
		`mode in line 7 (duplicate field: the value in line 8, nftables, counts); resourceContainer, udpIdleTimeout (unknown field)"` + "\n" +
		`level=WARN msg="settings have no effect" settings="--config: configSyncPeriod (Fairlead watches for changes and has nothing to refresh); ` +
		`--config: ipvs.minSyncPeriod, --config: ipvs.syncPeriod (Fairlead programs changes as they arrive instead of periodically; use --batch-period to batch them); ` +
		`--config: logging.flushFrequency (Fairlead writes each log line to standard error at once); ` +
		`--config: logging.vmodule, --vmodule (Fairlead has one log level for all source files: use --log-level); ` +
		`--healthz-port (--config is set: set it in the file); --config: ipvs.scheduler (it applies only to --mode=ipvs); ` +
		`--feature-gates (Fairlead has no feature gates)"` + "\n" +
		`level=WARN msg="settings are deprecated" settings="--healthz-port (use --healthz-bind-address)"` + "\n"
	if diff := cmp.Diff(want, log.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
