package backend_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/kube"
)

func TestNames(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{backend.NFT: "nftables", backend.IPVS: "ipvs"} {
		b, err := backend.ByName(name)
		if err != nil || b.Name != name || b.KubeProxyName != want {
			t.Errorf("ByName(%s): KubeProxyName %s, error %v, want %s", name, b.KubeProxyName, err, want)
		}
		if got, ok := backend.ByKubeProxyName(want); got.Name != name || !ok {
			t.Errorf("ByKubeProxyName(%s) = %q, want %s", want, got.Name, name)
		}
	}
	for _, none := range []string{"iptables", ""} {
		if got, ok := backend.ByKubeProxyName(none); ok {
			t.Errorf("ByKubeProxyName(%q) = %q, want none", none, got.Name)
		}
	}
	if _, err := backend.ByName("iptables"); err == nil || err.Error() != `--mode: unknown mode "iptables": use nft or ipvs` {
		t.Errorf("error %v", err)
	}
}

// TestRegistry checks that each backend sets the required fields, and that no two backends
// share a name or a flag.
func TestRegistry(t *testing.T) {
	t.Parallel()
	var names []string
	for _, b := range backend.All() {
		names = append(names, b.Name, "proxy-mode="+b.KubeProxyName)
		if b.Name == "" || b.Open == nil || b.Cleanup == nil {
			t.Errorf("%q: Name, Open or Cleanup is not set", b.Name)
		}
		for _, f := range b.Flags {
			names = append(names, "--"+f.Name)
			if f.Parse == nil {
				continue
			}
			if _, err := f.Parse(f.Default); err != nil {
				t.Errorf("--%s: the default is invalid: %v", f.Name, err)
			}
		}
	}
	slices.Sort(names)
	for i, name := range names[1:] {
		if name == names[i] {
			t.Errorf("%s is not unique", name)
		}
	}
}

// TestIPVSOptions checks that ipvsOptions passes all flags on.
func TestIPVSOptions(t *testing.T) {
	t.Parallel()
	networks := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	got := backend.IPVSOptions(backend.Options{NetNS: 7, Values: backend.Values{
		"ipvs-scheduler": "lc", "ipvs-exclude-cidrs": networks, "ipvs-strict-arp": true,
		"ipvs-tcp-timeout": time.Second, "ipvs-tcpfin-timeout": 2 * time.Second, "ipvs-udp-timeout": 3 * time.Second,
	}})
	want := ipvs.Options{
		NetNS: 7, Scheduler: "lc", ExcludeCIDRs: networks, StrictARP: true,
		TCPTimeout: time.Second, TCPFinTimeout: 2 * time.Second, UDPTimeout: 3 * time.Second,
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestBalancing checks the schedulers of the kinds of balancing.
func TestBalancing(t *testing.T) {
	t.Parallel()
	hash := ipvs.SourceHashScheduler() // depends on the kernel's modules
	for _, tt := range []struct {
		mode   string
		values backend.Values
		want   kube.Balancing
	}{
		{backend.NFT, nil, kube.Balancing{Default: "random", Schedulers: map[string]string{
			"random": "", "round-robin": "rr", "source-hash": "source_hash",
		}}},
		{backend.IPVS, nil, kube.Balancing{Default: "--ipvs-scheduler", Schedulers: map[string]string{
			"round-robin": "", "source-hash": hash, "least-connections": "lc",
		}}},
		{backend.IPVS, backend.Values{"ipvs-scheduler": "lc"}, kube.Balancing{Default: "--ipvs-scheduler", Schedulers: map[string]string{
			"round-robin": "rr", "source-hash": hash, "least-connections": "",
		}}},
		{backend.IPVS, backend.Values{"ipvs-scheduler": "mh"}, kube.Balancing{Default: "--ipvs-scheduler", Schedulers: map[string]string{
			"round-robin": "rr", "source-hash": hash, "least-connections": "lc", // mh hashes the client's port as well
		}}},
	} {
		b, err := backend.ByName(tt.mode)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, b.Balancing(tt.values)); diff != "" {
			t.Errorf("%s with %v (-want +got):\n%s", tt.mode, tt.values, diff)
		}
	}
}
