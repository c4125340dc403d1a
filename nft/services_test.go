package nft

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// TestServicesWithEndpoints checks that only the names of Services with endpoints are
// returned, and no names if the tables do not exist.
func TestServicesWithEndpoints(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	read := func(ns *nettest.Namespace) map[string]struct{} {
		t.Helper()
		names, err := ServicesWithEndpoints(t.Context(), Options{NetNS: ns.Fd()})
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	if names := read(ns); len(names) != 0 {
		t.Errorf("without tables: got %v, want no names", names)
	}
	web := service(t, "web", []dataplane.Frontend{frontend(1), frontend(2)}, endpoints(1, 2))
	idle := service(t, "idle", []dataplane.Frontend{frontend(3)}, nil)
	mustReplace(t, d, dataplane.Node{}, web, idle)
	if diff := cmp.Diff(map[string]struct{}{web.Key.Service(): {}}, read(ns)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
