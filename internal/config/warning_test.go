package config

import (
	"bytes"
	"log/slog"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestLogWarnings checks that the log has one line for each kind of warning, whatever their number.
func TestLogWarnings(t *testing.T) {
	t.Parallel()
	file := configHeader + "resourceContainer: /kube-proxy\nclustercidr: 10.0.0.0/8\nudpIdleTimeout: 0s\nipvs: {scheduler: lc, syncPeriod: 5s, minSyncPeriod: 1s}\n" +
		"mode: iptables\nmode: nftables\nconfigSyncPeriod: 15m\nlogging: {flushFrequency: 5s, vmodule: [{filePattern: a, verbosity: 3}]}\n"
	c, _, err := Load(parseFlags(t, "--config="+writeConfigFile(t, file), "--hostname-override=node_1", "--healthz-port=1", "--vmodule=a=3", "--feature-gates=A=true"))
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
	const want = `level=WARN msg="settings have invalid values" settings="--hostname-override (no Node has the name \"node_1\", so no endpoint is local: ` +
		`write it as node-1 or node-1.example)"` + "\n" +
		`level=WARN msg="fields of the configuration file are ignored" settings="clustercidr (unknown field: write it as clusterCIDR); ` +
		`mode in line 7 (duplicate field: the value in line 8, nftables, counts); resourceContainer, udpIdleTimeout (unknown field)"` + "\n" +
		`level=WARN msg="settings have no effect" settings="--config: configSyncPeriod (Fairlead watches for changes and has nothing to refresh); ` +
		`--config: ipvs.minSyncPeriod, --config: ipvs.syncPeriod (Fairlead programs changes as they arrive instead of periodically; use --batch-period to batch them); ` +
		`--config: logging.flushFrequency (Fairlead writes each log line to standard error at once); ` +
		`--config: logging.vmodule, --vmodule (Fairlead has one log level for all source files: use --log-level); ` +
		`--healthz-port (--config is set: set it in the file); --config: ipvs.scheduler (it applies only to --mode=ipvs); ` +
		`--feature-gates (Fairlead has no feature gates, and always serves external IPs)"` + "\n" +
		`level=WARN msg="settings are deprecated" settings="--healthz-port (use --healthz-bind-address)"` + "\n"
	if diff := cmp.Diff(want, log.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestIPTablesNotice(t *testing.T) {
	t.Parallel()
	const fix = ". Set nftables to serve them on the node's primary addresses only, or to hide this warning"
	const all = ". Fairlead runs in mode nft with the defaults of the iptables mode: it serves node ports on all addresses of the node"
	for _, test := range []struct {
		name, file string // an empty file means no --config
		args       []string
		want       string
	}{
		{"no mode", "", nil, ""},
		{"mode nftables", configHeader + "mode: nftables\n", nil, ""},
		{"mode ipvs", configHeader + "mode: ipvs\n", nil, ""},
		{"mode by flag", configHeader, []string{"--mode=nft"}, ""},
		{"flag", "", []string{"--proxy-mode=iptables"}, "--proxy-mode is iptables" + all + ", and TCP node ports on 127.0.0.1" + fix},
		{
			"file without a mode", configHeader + "mode: ''\n", nil,
			"no mode is set, which means iptables to kube-proxy" + all + ", and TCP node ports on 127.0.0.1" + fix,
		},
		{
			"no node ports on localhost", configHeader + "mode: iptables\niptables: {localhostNodePorts: false}\n", nil,
			"--config: mode is iptables" + all + ", but not on 127.0.0.1" + fix,
		},
		{
			"one network", configHeader + "mode: iptables\nnodePortAddresses: [192.0.2.0/24]\n", nil,
			"--config: mode is iptables. Fairlead runs in mode nft with the defaults of the iptables mode: " +
				"it serves node ports on the addresses in nodePortAddresses (--nodeport-addresses), but not on 127.0.0.1" + fix,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			args := slices.Concat(test.args, []string{"--hostname-override=node"})
			if test.file != "" {
				args = append(args, "--config="+writeConfigFile(t, test.file))
			}
			c, _, err := Load(parseFlags(t, args...))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, c.IPTablesNotice()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestKubeProxyDefaults checks that kube-proxy's default mode applies to flags, unless a mode is set.
func TestKubeProxyDefaults(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ arg, want string }{
		{"--v=0", "iptables"}, {"--proxy-mode=", "iptables"}, {"--proxy-mode=nftables", "nftables"}, {"--mode=nft", "nftables"}, {"--mode=ipvs", "ipvs"},
	} {
		c, _, err := Load(parseFlags(t, test.arg, "--kube-proxy-defaults", "--hostname-override=node"))
		if err != nil || c.ProxyMode != test.want {
			t.Errorf("%s: proxy mode %q, error %v, want %q", test.arg, c.ProxyMode, err, test.want)
		}
	}
}
