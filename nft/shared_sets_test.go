package nft

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// overlappingServices returns up to n Services like randomServices, with addresses from a
// pool so small that many Services of all kinds share them.
func overlappingServices(t *testing.T, random *rand.Rand, n int) []*dataplane.Service {
	t.Helper()
	var services []*dataplane.Service
	used := map[dataplane.Frontend]bool{}
	for i := range n {
		v6 := i%2 == 1
		address := func(first, n int) netip.Addr {
			if v6 {
				return netip.AddrFrom16([16]byte{0xfd, byte(first), 15: byte(n)})
			}
			return netip.AddrFrom4([4]byte{10, byte(first), 0, byte(n)})
		}
		kind := []dataplane.Kind{dataplane.ClusterIP, dataplane.ExternalIP, dataplane.LoadBalancer, dataplane.NodePort}[random.IntN(4)]
		var frontends []dataplane.Frontend
		for range 1 + random.IntN(6) {
			addr, port := address(96, random.IntN(4)), uint16(80+random.IntN(6))
			if kind == dataplane.NodePort {
				addr, port = netip.IPv4Unspecified(), port+30_000
				if v6 {
					addr = netip.IPv6Unspecified()
				}
			}
			if f := (dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(addr, port)}); !used[f] {
				used[f] = true
				frontends = append(frontends, f)
			}
		}
		if len(frontends) == 0 || random.IntN(4) == 0 {
			continue
		}
		var list []dataplane.Endpoint
		for range random.IntN(12) * min(1, random.IntN(4)) { // often no endpoints
			addr := netip.AddrPortFrom(address(1, random.IntN(40)), uint16(8080+random.IntN(20)))
			list = append(list, dataplane.Endpoint{Addr: addr, Local: random.IntN(3) == 0})
		}
		key := dataplane.Key{Namespace: "default", Name: fmt.Sprintf("s-%d", i), Family: dataplane.FamilyOf(address(0, 0)), Kind: kind}
		s, err := dataplane.NewService(key, frontends, randomSpec(random, list, address))
		if err != nil {
			t.Fatal(err)
		}
		services = append(services, s)
	}
	return services
}

// wantReferenceCounts fails the test unless the reference counts of verdict elements,
// addresses and ports match these Services, and the kernel holds exactly the referenced
// elements.
func wantReferenceCounts(t *testing.T, d *Dataplane, services []*dataplane.Service) {
	t.Helper()
	for i, table := range d.tables {
		c, err := d.readSets(t.Context(), table)
		if err != nil {
			t.Fatal(err)
		}
		branches, addrs, ports := map[verdictElement]int{}, newAddrCounts(), maps.Clone(c.ports)
		for b := range d.unusedSince[i] {
			branches[b] = 0
		}
		for _, s := range services {
			if familyIndex(s.Key.Family) != i {
				continue
			}
			r := d.render(s, d.slotAssignmentFor(s), d.listIDs[i].byKey[s.Key])
			if r.listID != 0 {
				for _, b := range r.sharedList.verdictElements() {
					branches[b]++
				}
				for _, port := range r.sharedList.ports {
					ports[port]++
				}
			}
			for _, f := range s.Frontends {
				for _, b := range r.verdictElements() {
					branches[b]++
				}
				addrs.add(f.Addr.Addr(), r.addrs, 1)
				for _, port := range r.ports {
					ports[port]++
				}
			}
		}
		wantEqualMaps(t, "branches", d.verdictElements[i], branches)
		wantEqualMaps(t, "branches in the kernel", setOfKeys(c.verdictElements), setOfKeys(branches))
		for s := range addrs {
			wantEqualMaps(t, addrSet(s).String(), d.addrs[i][s], addrs[s])
			wantEqualMaps(t, addrSet(s).String()+" in the kernel", c.addrs[s], setOfKeys(addrs[s]))
		}
		wantEqualMaps(t, "ports", d.ports[i], ports)
		wantEqualMaps(t, "ports in the kernel", c.portSet, setOfKeys(ports))
	}
}

func setOfKeys[K comparable, V any](m map[K]V) map[K]bool {
	all := make(map[K]bool, len(m))
	for k := range m {
		all[k] = true
	}
	return all
}

func wantEqualMaps[M ~map[K]V, K, V comparable](t *testing.T, what string, got, want M) {
	t.Helper()
	if !maps.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// TestReferenceCounts creates and deletes Services that share addresses, ports and classes,
// in commits of different sizes, some of which fail. It compares the reference counts with
// the kernel. While some keys have failed, the kernel must hold all elements that the other
// keys need.
func TestReferenceCounts(t *testing.T) {
	t.Parallel()
	for name, translator := range testTranslators() {
		for seed := range uint64(6) {
			t.Run(fmt.Sprint(name, " ", seed), func(t *testing.T) {
				t.Parallel()
				testReferenceCounts(t, seed, translator)
			})
		}
	}
}

func testReferenceCounts(t *testing.T, seed uint64, translator Translator) {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 10))
	d, ns := newDataplane(t, translator)
	var have []*dataplane.Service
	unknown := true
	for round := range 20 {
		want := overlappingServices(t, random, 14)
		if random.IntN(8) == 0 {
			d = openInNamespace(t, ns, translator)
			unknown = true
		}
		d.transactionSize = []int{3, 12, 40, transactionSize}[random.IntN(4)]
		d.minSharedFrontends = []int{2, 3, minSharedFrontends}[random.IntN(3)]
		failing, what := random.IntN(12), []fault{noFault, noFault, rejectElement, rejectCommit}[random.IntN(4)]
		d.flush = func() error {
			if failing--; failing == 0 {
				switch what {
				case rejectElement:
					deleteInTransaction(d, d.tables[0].services)
				case rejectCommit:
					deleteInTransaction(d, d.missingSet())
				case noFault, loseAck:
				}
			}
			return d.conn.Flush()
		}
		var err error
		if unknown || random.IntN(4) == 0 {
			node := randomNode(random)
			node.PingServiceIPs = random.IntN(4) > 0
			err = d.Replace(t.Context(), node, slices.Values(want), nil)
		} else {
			err = d.Apply(t.Context(), changesBetween(have, want))
		}
		have = want
		keyed, ok := errors.AsType[*dataplane.Error](err)
		if unknown = err != nil; !unknown {
			wantState(t, d, have...)
			wantReferenceCounts(t, d, have)
		} else if ok {
			wantSharedElements(t, d, have, keyed.Failed)
		}
		if t.Failed() {
			t.Fatalf("round %d: transaction size %d, fault %d, error %v", round, d.transactionSize, what, err)
		}
	}
}

// wantSharedElements fails the test unless the kernel holds the addresses of all Services
// except the failed ones, and the ports of all endpoints.
func wantSharedElements(t *testing.T, d *Dataplane, services []*dataplane.Service, failed map[dataplane.Key]error) {
	t.Helper()
	for i, table := range d.tables {
		c, err := d.readSets(t.Context(), table)
		if err != nil {
			t.Fatal(err)
		}
		for port := range c.ports {
			if !c.portSet[port] {
				t.Errorf("port %d of an endpoint is not in the set", port)
			}
		}
		for _, s := range services {
			if failed[s.Key] != nil || familyIndex(s.Key.Family) != i {
				continue
			}
			r := d.render(s, d.slotAssignmentFor(s), d.listIDs[i].byKey[s.Key])
			if r.listID != 0 {
				r.ports = r.sharedList.ports
			}
			for _, port := range r.ports {
				if !c.portSet[port] {
					t.Errorf("%s was programmed, but its port %d is not in the set", s.Key, port)
				}
			}
			for _, f := range s.Frontends {
				for set, in := range r.addrs {
					if in && !c.addrs[set][f.Addr.Addr()] {
						t.Errorf("%s was programmed, but %s is not in %s", s.Key, f, addrSet(set))
					}
				}
			}
		}
	}
}
