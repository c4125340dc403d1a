package agent

import (
	"bytes"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/kube"
)

// backendByName returns the backend with this name.
func backendByName(t *testing.T, name string) backend.Backend {
	t.Helper()
	b, err := backend.ByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTrackerOptions checks the options that depend on the mode: the default addresses of node ports
// and the IPVS schedulers.
func TestTrackerOptions(t *testing.T) {
	t.Parallel()
	network := kube.NodePortAddresses{CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	primary := kube.NodePortAddresses{Primary: true}
	all := kube.NodePortAddresses{All: true}
	for _, test := range []struct {
		name        string
		mode        string
		given, want kube.NodePortAddresses
		schedulers  []string
	}{
		{"nft: zero value, which means primary addresses", backend.NFT, kube.NodePortAddresses{}, kube.NodePortAddresses{}, nil},
		{"nft: all addresses", backend.NFT, all, all, nil},
		{"nft: networks", backend.NFT, network, network, nil},
		{"ipvs: all addresses by default", backend.IPVS, kube.NodePortAddresses{}, all, ipvs.Schedulers()},
		{"ipvs: primary addresses", backend.IPVS, primary, primary, ipvs.Schedulers()},
		{"ipvs: networks", backend.IPVS, network, network, ipvs.Schedulers()},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got := backendByName(t, test.mode).TrackerOptions(kube.Options{NodeName: "node", NodePortAddresses: test.given}, nil)
			want := kube.Options{NodeName: "node", NodePortAddresses: test.want, Schedulers: test.schedulers, Balancing: got.Balancing}
			if len(got.Balancing.Schedulers) != 3 { // TestBalancing of package backend checks their values
				t.Errorf("kinds of balancing %v, want three", got.Balancing)
			}
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestModeStaysUntilRestart checks that a changed mode has no effect on settings that depend on the
// mode until a restart.
func TestModeStaysUntilRestart(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		runs, file   string
		allAddresses bool
	}{{backend.NFT, backend.IPVS, false}, {backend.IPVS, backend.NFT, true}, {backend.NFT, backend.NFT, false}, {backend.IPVS, backend.IPVS, true}} {
		t.Run(test.runs+" to "+test.file, func(t *testing.T) {
			t.Parallel()
			var log bytes.Buffer
			comp := newComponents(slog.New(slog.NewTextHandler(&log, nil)))
			was, _, err := config.Load(config.Flags{"hostname-override": "node"})
			if err != nil {
				t.Fatal(err)
			}
			next := was
			was.Mode, next.Mode = test.runs, test.file
			a := &Agent{
				log: comp.log, logLevel: &slog.LevelVar{}, config: was, backend: backendByName(t, test.runs), dispatcher: comp.dispatcher,
				conntrackSettings: newConntrackSettings(was.Conntrack, nil, comp.log),
			}
			a.applyConfig(t.Context(), next)
			if comp.nodePortAddresses.All != test.allAddresses {
				t.Errorf("node ports on all addresses: %t, want %t", comp.nodePortAddresses.All, test.allAddresses)
			}
			if got := strings.Contains(log.String(), "needs a restart"); got != (test.runs != test.file) || got && !strings.Contains(log.String(), "what=mode\n") {
				t.Errorf("log:\n%s", &log)
			}
		})
	}
}
