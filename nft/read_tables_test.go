package nft

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
)

// TestReadTables checks that ReadTables returns the bindings that a Dataplane reads, and the
// kind of each frontend.
func TestReadTables(t *testing.T) {
	t.Parallel()
	for name, translator := range testTranslators() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, ns := newDataplane(t, translator)
			opts := Options{NetNS: ns.Fd()}
			if exist, err := TablesExist(t.Context(), opts); err != nil || exist {
				t.Errorf("without tables: exist %v, error %v", exist, err)
			}
			services := sampleServices(t)
			mustReplace(t, d, nodeWithAllSettings(), services...)
			if exist, err := TablesExist(t.Context(), opts); err != nil || !exist {
				t.Errorf("with tables: exist %v, error %v", exist, err)
			}
			tables, err := ReadTables(t.Context(), opts)
			if err != nil {
				t.Fatal(err)
			}
			if len(tables.Families) != 2 || len(tables.Unread) != 0 || !tables.Consistent {
				t.Errorf("families %v, unread %q, consistent %v", tables.Families, tables.Unread, tables.Consistent)
			}
			got := dataplane.State{}
			for f, state := range tables.Frontends {
				got[f] = state.Binding
			}
			want, err := d.Read(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if diff := want.Diff(got); diff != "" {
				t.Error(diff)
			}
			virtual, err := d.ReadVirtualBindings(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range services {
				for _, f := range s.Frontends {
					state := tables.Frontends[f]
					if !state.KindKnown || state.Kind != s.Key.Kind || state.Service != s.Key.Service() {
						t.Errorf("%s of %s: kind %v (known: %v), Service %q", f, s.Key, state.Kind, state.KindKnown, state.Service)
					}
					if translator != nil && !state.Equal(virtual[f]) {
						t.Errorf("%s: got %v, want %v", f, state.VirtualBinding, virtual[f])
					}
				}
			}
		})
	}
}

// TestNodePortRanges checks the addresses with node ports that ReadTables returns.
func TestNodePortRanges(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	mustReplace(t, d, dataplane.Node{
		NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
		NodePortNetworks: []netip.Prefix{
			netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("224.0.0.0/3"),
		},
	})
	tables, err := ReadTables(t.Context(), Options{NetNS: ns.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]bool{
		"192.0.2.1": true, "192.0.2.2": false, "2001:db8::1": true, "2001:db8::2": false,
		"10.0.0.0": true, "10.0.1.255": true, "10.0.2.0": false, "9.255.255.255": false, "255.255.255.255": true,
	} {
		a := netip.MustParseAddr(addr)
		if got := slices.ContainsFunc(tables.NodePortRanges, func(r AddrRange) bool { return r.Contains(a) }); got != want {
			t.Errorf("%s: got %v, want %v", addr, got, want)
		}
	}
}

// TestCommentsWithoutKind checks that Replace adds the kind to the comments of an earlier
// version, and rewrites nothing else.
func TestCommentsWithoutKind(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	services := sampleServices(t)
	mustReplace(t, d, nodeWithAllSettings(), services...)
	nft := nftBinaries(t)["1.1.3"]
	want := runNFT(t, ns, nft, "list ruleset")
	var script strings.Builder
	external := map[dataplane.Frontend]*dataplane.Service{}
	for _, s := range services {
		for _, f := range s.Frontends {
			if kindSuffix(s.Key.Kind) == "" {
				continue
			}
			external[f] = s
			key := fmt.Sprintf("%s . %d . %d", f.Addr.Addr(), f.Protocol, f.Addr.Port())
			class := d.render(s, d.slotAssignmentFor(s), d.listIDs[familyIndex(s.Key.Family)].byKey[s.Key]).class
			fmt.Fprintf(&script, "delete element ip fairlead services { %s }\n", key)
			fmt.Fprintf(&script, "add element ip fairlead services { %s comment %q : %x:%x }\n", key, s.Key.Service(), uint32(class)>>16, class.size())
		}
	}
	runNFT(t, ns, nft, script.String())
	tables, err := ReadTables(t.Context(), Options{NetNS: ns.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	have, err := d.readSets(t.Context(), d.tables[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range slices.SortedFunc(maps.Keys(external), dataplane.Frontend.Compare) {
		s := external[f]
		if state := tables.Frontends[f]; state.KindKnown || state.Service != s.Key.Service() {
			t.Errorf("%s: kind %v (known: %v), Service %q, want an unknown kind of %q", f, state.Kind, state.KindKnown, state.Service, s.Key.Service())
		}
		diff := elementDiff{table: d.tables[0]}
		diff.diffFrontendElements(f, have.frontends[f], d.render(s, d.slotAssignmentFor(s), d.listIDs[0].byKey[s.Key]))
		if diff.elements != 2 || len(diff.del[servicesSet]) != 1 || len(diff.add[servicesSet]) != 1 {
			t.Errorf("%s: %d changed elements, want one to delete and one to add in %s", f, diff.elements, d.tables[0].services.Name)
		}
	}
	again := openInNamespace(t, ns)
	mustReplace(t, again, nodeWithAllSettings(), services...)
	if diff := cmp.Diff(sortedLines(want), sortedLines(runNFT(t, ns, nft, "list ruleset"))); diff != "" {
		t.Errorf("after Replace (-want +got):\n%s", diff)
	}
	before := generation(t, d)
	mustReplace(t, again, nodeWithAllSettings(), services...)
	if after := generation(t, d); after != before {
		t.Errorf("a second Replace increased the generation by %d, want 0", after-before)
	}
}
