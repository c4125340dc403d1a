package dataplanetest

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

func (s suite) testServiceChanges(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 5)
	topo.replace()
	// The subtests change one Service; each starts from the state of the previous one.
	for _, tt := range []struct {
		name string
		pods []int
	}{
		{"created with three endpoints", []int{0, 1, 2}},
		{"first endpoint replaced", []int{3, 1, 2}},
		{"last endpoint replaced", []int{1, 2, 4}},
		{"all endpoints replaced", []int{0, 3}},
		{"one of two endpoints replaced", []int{0, 2}},
		{"scaled to three", []int{0, 1, 2}},
		{"scaled to two", []int{0, 2}},
		{"scaled to five", []int{0, 1, 2, 3, 4}},
		{"scaled to none", nil},
		{"scaled to one", []int{3}},
		{"scaled to four", []int{3, 0, 1, 4}},
		{"first endpoint removed", []int{1, 3, 4}},
		{"last endpoint removed", []int{1, 3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, family := range families() {
				for _, p := range protocols() {
					topo.createOrUpdate(topo.service("web", p, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, tt.pods...)))
				}
			}
			for _, family := range families() {
				for _, p := range protocols() {
					t.Run(fmt.Sprintf("%s/%s", p, family), func(t *testing.T) {
						t.Parallel()
						expectEndpoints(t, topo.client, p, vip(family, 1, 80), topo.endpoints(family, tt.pods...))
					})
				}
			}
		})
	}

	t.Run("deleted and created in one Apply", func(t *testing.T) {
		for _, family := range families() {
			key := dataplane.Key{Namespace: "default", Name: "web", Port: "tcp", Family: family}
			other := topo.service("other", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0, 4))
			topo.applyChanges([]dataplane.Change{{New: other}, {Old: topo.programmed[key]}})
			expectEndpoints(t, topo.client, dataplane.TCP, vip(family, 1, 80), topo.endpoints(family, 0, 4))
		}
	})
	t.Run("several frontends", func(t *testing.T) {
		for _, family := range families() {
			a, b, c := vip(family, 11, 80), vip(family, 12, 80), vip(family, 12, 8080)
			for _, frontends := range [][]netip.AddrPort{{a}, {a, b}, {b, c}, {a, b, c}} {
				topo.createOrUpdate(topo.service("fronts", dataplane.TCP, frontends, topo.endpoints(family, 0, 1)))
				for _, addr := range frontends {
					expectEndpoints(t, topo.client, dataplane.TCP, addr, topo.endpoints(family, 0, 1))
				}
			}
			topo.createOrUpdate(topo.service("fronts", dataplane.TCP, []netip.AddrPort{a, b, c}, topo.endpoints(family, 2)))
			for _, addr := range []netip.AddrPort{a, b, c} {
				expectEndpoints(t, topo.client, dataplane.TCP, addr, topo.endpoints(family, 2))
			}
		}
	})
}

func (s suite) testSharedEndpoints(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	topo.replace()
	check := func(t *testing.T, first, second []int) {
		t.Helper()
		for _, family := range families() {
			for _, from := range []*nettest.Host{topo.client, topo.pods[0]} {
				expectEndpoints(t, from, dataplane.TCP, vip(family, 1, 80), topo.endpoints(family, first...))
				expectEndpoints(t, from, dataplane.TCP, vip(family, 2, 80), topo.endpoints(family, second...))
			}
		}
	}
	for _, family := range families() {
		topo.createOrUpdate(
			topo.service("first", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0, 1)),
			topo.service("second", dataplane.TCP, []netip.AddrPort{vip(family, 2, 80)}, topo.endpoints(family, 0, 1)),
		)
	}
	check(t, []int{0, 1}, []int{0, 1})
	for _, family := range families() {
		topo.createOrUpdate(topo.service("first", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 2)))
	}
	check(t, []int{2}, []int{0, 1}) // the second Service keeps the state of pods 0 and 1, hairpin included
	for _, family := range families() {
		topo.remove(topo.programmed[dataplane.Key{Namespace: "default", Name: "first", Port: "tcp", Family: family}])
		topo.createOrUpdate(topo.service("third", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0)))
	}
	check(t, []int{0}, []int{0, 1})
}

func (s suite) testFrontendMoves(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	topo.replace()
	type layout struct{ a, b, c []byte } // last octets of the addresses of three Services
	// Service a has pod 0, b pods 0 and 1, c all three.
	for _, tt := range []struct {
		name string
		layout
	}{
		{"initial", layout{a: []byte{1}, b: []byte{2}, c: []byte{3}}},
		{"two Services swap", layout{a: []byte{2}, b: []byte{1}, c: []byte{3}}},
		{"three Services rotate", layout{a: []byte{1}, b: []byte{3}, c: []byte{2}}},
		{"first takes over a frontend", layout{a: []byte{1, 2}, b: []byte{3}, c: []byte{4}}},
		{"last takes over frontends", layout{a: []byte{5}, b: []byte{4}, c: []byte{1, 2, 3}}},
		{"first takes over all, second is deleted", layout{a: []byte{1, 2, 3, 4, 5}, c: []byte{6}}},
		{"recreated Service takes over all", layout{a: []byte{6}, b: []byte{1, 2, 3, 4, 5}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, family := range families() {
				owners := []struct {
					name  string
					addrs []byte
					pods  []int
				}{{"a", tt.a, []int{0}}, {"b", tt.b, []int{0, 1}}, {"c", tt.c, []int{0, 1, 2}}}
				var changes []dataplane.Change
				for _, o := range owners {
					key := dataplane.Key{Namespace: "default", Name: o.name, Port: "tcp", Family: family}
					change := dataplane.Change{Old: topo.programmed[key]}
					if len(o.addrs) > 0 {
						var frontends []netip.AddrPort
						for _, n := range o.addrs {
							frontends = append(frontends, vip(family, n, 80))
						}
						change.New = topo.service(o.name, dataplane.TCP, frontends, topo.endpoints(family, o.pods...))
					}
					if change.Old != nil || change.New != nil {
						changes = append(changes, change)
					}
				}
				topo.applyChanges(changes)
				for _, o := range owners {
					for _, n := range o.addrs {
						expectEndpoints(t, topo.client, dataplane.TCP, vip(family, n, 80), topo.endpoints(family, o.pods...))
					}
				}
			}
		})
	}
}

func (s suite) testEstablishedConnections(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	var services []*dataplane.Service
	for _, family := range families() {
		services = append(services,
			topo.service("web", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0, 1, 2)),
			topo.service("web", dataplane.SCTP, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0, 1, 2)))
	}
	topo.replace(services...)

	type connection struct {
		*nettest.Conn
		first nettest.Answer
	}
	var connections []connection
	for _, s := range services {
		for _, from := range []*nettest.Host{topo.client, topo.pods[0], topo.net.Node, topo.net.Outside} {
			reached := map[string]bool{}
			for len(reached) < len(topo.pods) {
				conn, err := from.Open(t.Context(), networkName(s.Frontends[0].Protocol), s.Frontends[0].Addr)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = conn.Close() })
				answer, err := conn.Ask(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if !reached[answer.Host] {
					reached[answer.Host] = true
					connections = append(connections, connection{conn, answer})
				}
			}
		}
	}
	check := func(t *testing.T, hosts ...string) {
		t.Helper()
		for _, c := range connections {
			for _, host := range hosts {
				if c.first.Host != host {
					continue
				}
				if answer, err := c.Ask(t.Context()); err != nil || answer != c.first {
					t.Errorf("answer %+v, error %v, want the same answer as before: %+v", answer, err, c.first)
				}
			}
		}
	}
	all := []string{"pod-0", "pod-1", "pod-2"}
	t.Run("unrelated Service created", func(t *testing.T) {
		for _, family := range families() {
			topo.createOrUpdate(topo.service("other", dataplane.TCP, []netip.AddrPort{vip(family, 2, 80)}, topo.endpoints(family, 0, 1)))
		}
		check(t, all...)
	})
	t.Run("unrelated Service deleted", func(t *testing.T) {
		for _, family := range families() {
			topo.remove(topo.programmed[dataplane.Key{Namespace: "default", Name: "other", Port: "tcp", Family: family}])
		}
		check(t, all...)
	})
	t.Run("equal Replace", func(t *testing.T) {
		topo.replace(services...)
		check(t, all...)
	})
	t.Run("warm restart", func(t *testing.T) {
		topo.warmRestart()
		check(t, all...)
	})
	t.Run("first endpoint removed", func(t *testing.T) {
		for _, s := range services {
			topo.createOrUpdate(topo.service("web", s.Frontends[0].Protocol, []netip.AddrPort{s.Frontends[0].Addr}, topo.endpoints(s.Key.Family, 1, 2)))
		}
		check(t, "pod-1", "pod-2")
	})
	t.Run("second endpoint removed", func(t *testing.T) {
		for _, s := range services {
			topo.createOrUpdate(topo.service("web", s.Frontends[0].Protocol, []netip.AddrPort{s.Frontends[0].Addr}, topo.endpoints(s.Key.Family, 2)))
		}
		check(t, "pod-2")
	})
	var deleted []*dataplane.Service
	t.Run("TCP Services deleted", func(t *testing.T) {
		for key, s := range maps.Clone(topo.programmed) {
			if s.Frontends[0].Protocol == dataplane.TCP {
				topo.remove(s)
			}
			deleted = append(deleted, topo.newService(key, s.Frontends[0].Protocol, []netip.AddrPort{s.Frontends[0].Addr}, s.ServiceSpec))
		}
		check(t, "pod-2")
	})
	t.Run("remaining Services deleted during a restart", func(t *testing.T) {
		if err := topo.dp.Close(); err != nil {
			t.Fatal(err)
		}
		topo.dp = topo.open(t, topo.net.Node.Fd())
		topo.replace()
		check(t, "pod-2")
	})
	t.Run("warm restart without Services", func(t *testing.T) {
		topo.warmRestart()
		check(t, "pod-2")
	})
	t.Run("Services created again", func(t *testing.T) {
		topo.createOrUpdate(deleted...)
		check(t, "pod-2")
		for _, s := range deleted {
			for _, from := range []*nettest.Host{topo.client, topo.net.Node, topo.net.Outside} {
				expectEndpoints(t, from, s.Frontends[0].Protocol, s.Frontends[0].Addr, topo.endpoints(s.Key.Family, 2))
			}
		}
	})
}
