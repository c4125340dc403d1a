package nft

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// TestServingEndpointsWriteNothing checks that nothing is written if only the serving
// endpoints change, which take no new connections.
func TestServingEndpointsWriteNothing(t *testing.T) {
	t.Parallel()
	d, _ := newDataplane(t)
	with := func(serving ...string) *dataplane.Service {
		var list []netip.AddrPort
		for _, s := range serving {
			list = append(list, netip.MustParseAddrPort(s))
		}
		s, err := dataplane.NewService(
			dataplane.Key{Namespace: "default", Name: "dns", Family: dataplane.IPv4},
			[]dataplane.Frontend{{Protocol: dataplane.UDP, Addr: netip.MustParseAddrPort("10.96.0.10:53")}},
			dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: netip.MustParseAddrPort("10.244.0.1:53")}}},
		)
		if err != nil {
			t.Fatal(err)
		}
		if s, err = s.WithServing(list); err != nil {
			t.Fatal(err)
		}
		return s
	}
	none, one, two := with(), with("10.244.0.2:53"), with("10.244.0.2:53", "10.244.0.3:53")
	mustReplace(t, d, dataplane.Node{}, none)
	before := generation(t, d)
	for _, change := range []dataplane.Change{{Old: none, New: two}, {Old: two, New: one}, {Old: one, New: none}, {Old: none, New: one}} {
		mustApply(t, d, change)
	}
	mustReplace(t, d, dataplane.Node{}, two)
	if after := generation(t, d); after != before {
		t.Errorf("the generation increased by %d, want 0", after-before)
	}
	wantState(t, d, one)
}
