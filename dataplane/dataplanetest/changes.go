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
	w := newTopology(t, s, 5)
	w.replace()
	// One Service through a life; the tests follow each other.
	for _, tt := range []struct {
		name string
		pods []int
	}{
		{"created with three endpoints", []int{0, 1, 2}},
		{"the first endpoint replaced", []int{3, 1, 2}},
		{"the last endpoint replaced", []int{1, 2, 4}},
		{"all endpoints replaced", []int{0, 3}},
		{"one of two endpoints replaced", []int{0, 2}},
		{"scaled to three", []int{0, 1, 2}},
		{"scaled to two", []int{0, 2}},
		{"scaled to five", []int{0, 1, 2, 3, 4}},
		{"scaled to none", nil},
		{"scaled to one", []int{3}},
		{"scaled to four", []int{3, 0, 1, 4}},
		{"the first endpoint removed", []int{1, 3, 4}},
		{"the last endpoint removed", []int{1, 3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, family := range families() {
				for _, p := range protocols() {
					w.createOrUpdate(w.service("web", p, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, tt.pods...)))
				}
			}
			for _, family := range families() {
				for _, p := range protocols() {
					t.Run(fmt.Sprintf("%s/%s", p, family), func(t *testing.T) {
						t.Parallel()
						expectEndpoints(t, w.client, p, vip(family, 1, 80), w.endpoints(family, tt.pods...))
					})
				}
			}
		})
	}

	t.Run("deleted and created in one call", func(t *testing.T) {
		for _, family := range families() {
			key := dataplane.Key{Namespace: "default", Name: "web", Port: "tcp", Family: family}
			other := w.service("other", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, 0, 4))
			w.applyChanges([]dataplane.Change{{New: other}, {Old: w.programmed[key]}})
			expectEndpoints(t, w.client, dataplane.TCP, vip(family, 1, 80), w.endpoints(family, 0, 4))
		}
	})
	t.Run("several frontends", func(t *testing.T) {
		for _, family := range families() {
			a, b, c := vip(family, 11, 80), vip(family, 12, 80), vip(family, 12, 8080)
			for _, frontends := range [][]netip.AddrPort{{a}, {a, b}, {b, c}, {a, b, c}} {
				w.createOrUpdate(w.service("fronts", dataplane.TCP, frontends, w.endpoints(family, 0, 1)))
				for _, addr := range frontends {
					expectEndpoints(t, w.client, dataplane.TCP, addr, w.endpoints(family, 0, 1))
				}
			}
			w.createOrUpdate(w.service("fronts", dataplane.TCP, []netip.AddrPort{a, b, c}, w.endpoints(family, 2)))
			for _, addr := range []netip.AddrPort{a, b, c} {
				expectEndpoints(t, w.client, dataplane.TCP, addr, w.endpoints(family, 2))
			}
		}
	})
}

func (s suite) testSharedEndpoints(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 3)
	w.replace()
	check := func(t *testing.T, first, second []int) {
		t.Helper()
		for _, family := range families() {
			for _, from := range []*nettest.Host{w.client, w.pods[0]} {
				expectEndpoints(t, from, dataplane.TCP, vip(family, 1, 80), w.endpoints(family, first...))
				expectEndpoints(t, from, dataplane.TCP, vip(family, 2, 80), w.endpoints(family, second...))
			}
		}
	}
	for _, family := range families() {
		w.createOrUpdate(
			w.service("first", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, 0, 1)),
			w.service("second", dataplane.TCP, []netip.AddrPort{vip(family, 2, 80)}, w.endpoints(family, 0, 1)),
		)
	}
	check(t, []int{0, 1}, []int{0, 1})
	for _, family := range families() {
		w.createOrUpdate(w.service("first", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, 2)))
	}
	check(t, []int{2}, []int{0, 1}) // What the second needs of pods 0 and 1 stays, hairpin too.
	for _, family := range families() {
		w.remove(w.programmed[dataplane.Key{Namespace: "default", Name: "first", Port: "tcp", Family: family}])
		w.createOrUpdate(w.service("third", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, 0)))
	}
	check(t, []int{0}, []int{0, 1})
}

func (s suite) testFrontendMoves(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 3)
	w.replace()
	type layout struct{ a, b, c []byte } // the addresses of three Services
	// Service a has pod 0, b pods 0 and 1, c all three.
	for _, tt := range []struct {
		name string
		layout
	}{
		{"at first", layout{a: []byte{1}, b: []byte{2}, c: []byte{3}}},
		{"two swapped", layout{a: []byte{2}, b: []byte{1}, c: []byte{3}}},
		{"three in a ring", layout{a: []byte{1}, b: []byte{3}, c: []byte{2}}},
		{"the first takes another's and its own", layout{a: []byte{1, 2}, b: []byte{3}, c: []byte{4}}},
		{"the last takes them", layout{a: []byte{5}, b: []byte{4}, c: []byte{1, 2, 3}}},
		{"one takes all, one is deleted", layout{a: []byte{1, 2, 3, 4, 5}, c: []byte{6}}},
		{"the deleted one takes all", layout{a: []byte{6}, b: []byte{1, 2, 3, 4, 5}}},
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
					change := dataplane.Change{Old: w.programmed[key]}
					if len(o.addrs) > 0 {
						var frontends []netip.AddrPort
						for _, n := range o.addrs {
							frontends = append(frontends, vip(family, n, 80))
						}
						change.New = w.service(o.name, dataplane.TCP, frontends, w.endpoints(family, o.pods...))
					}
					if change.Old != nil || change.New != nil {
						changes = append(changes, change)
					}
				}
				w.applyChanges(changes)
				for _, o := range owners {
					for _, n := range o.addrs {
						expectEndpoints(t, w.client, dataplane.TCP, vip(family, n, 80), w.endpoints(family, o.pods...))
					}
				}
			}
		})
	}
}

func (s suite) testEstablishedConnections(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 3)
	var services []*dataplane.Service
	for _, family := range families() {
		services = append(services,
			w.service("web", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, 0, 1, 2)),
			w.service("web", dataplane.SCTP, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, 0, 1, 2)))
	}
	w.replace(services...)

	type connection struct {
		*nettest.Conn
		first nettest.Answer
	}
	var connections []connection
	for _, s := range services {
		for _, from := range []*nettest.Host{w.client, w.pods[0], w.net.Node, w.net.Outside} {
			reached := map[string]bool{}
			for len(reached) < len(w.pods) {
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
					t.Errorf("answer %+v, error %v, want %+v as before", answer, err, c.first)
				}
			}
		}
	}
	all := []string{"pod-0", "pod-1", "pod-2"}
	t.Run("an unrelated Service is created", func(t *testing.T) {
		for _, family := range families() {
			w.createOrUpdate(w.service("other", dataplane.TCP, []netip.AddrPort{vip(family, 2, 80)}, w.endpoints(family, 0, 1)))
		}
		check(t, all...)
	})
	t.Run("it is deleted", func(t *testing.T) {
		for _, family := range families() {
			w.remove(w.programmed[dataplane.Key{Namespace: "default", Name: "other", Port: "tcp", Family: family}])
		}
		check(t, all...)
	})
	t.Run("an equal Replace", func(t *testing.T) {
		w.replace(services...)
		check(t, all...)
	})
	t.Run("a restart", func(t *testing.T) {
		w.warmRestart()
		check(t, all...)
	})
	t.Run("another endpoint is removed", func(t *testing.T) {
		for _, s := range services {
			w.createOrUpdate(w.service("web", s.Frontends[0].Protocol, []netip.AddrPort{s.Frontends[0].Addr}, w.endpoints(s.Key.Family, 1, 2)))
		}
		check(t, "pod-1", "pod-2")
	})
	t.Run("and one more", func(t *testing.T) {
		for _, s := range services {
			w.createOrUpdate(w.service("web", s.Frontends[0].Protocol, []netip.AddrPort{s.Frontends[0].Addr}, w.endpoints(s.Key.Family, 2)))
		}
		check(t, "pod-2")
	})
	var deleted []*dataplane.Service
	t.Run("a Service is deleted", func(t *testing.T) {
		for key, s := range maps.Clone(w.programmed) {
			if s.Frontends[0].Protocol == dataplane.TCP {
				w.remove(s)
			}
			deleted = append(deleted, w.newService(key, s.Frontends[0].Protocol, []netip.AddrPort{s.Frontends[0].Addr}, s.ServiceSpec))
		}
		check(t, "pod-2")
	})
	t.Run("a Service is deleted while nobody is there", func(t *testing.T) {
		if err := w.dp.Close(); err != nil {
			t.Fatal(err)
		}
		w.dp = w.open(t, w.net.Node.Fd())
		w.replace()
		check(t, "pod-2")
	})
	t.Run("a restart without Services", func(t *testing.T) {
		w.warmRestart()
		check(t, "pod-2")
	})
	t.Run("they are created again", func(t *testing.T) {
		w.createOrUpdate(deleted...)
		check(t, "pod-2")
		for _, s := range deleted {
			for _, from := range []*nettest.Host{w.client, w.net.Node, w.net.Outside} {
				expectEndpoints(t, from, s.Frontends[0].Protocol, s.Frontends[0].Addr, w.endpoints(s.Key.Family, 2))
			}
		}
	})
}
