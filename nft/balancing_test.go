package nft

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// balanced returns a Service with a scheduler.
func balanced(t testing.TB, scheduler, name string, f dataplane.Frontend, list []dataplane.Endpoint) *dataplane.Service {
	t.Helper()
	s := service(t, name, []dataplane.Frontend{f}, slices.Clone(list))
	s.Scheduler = scheduler
	return s
}

// balancedServices returns Services with every kind of balancing, with and without session
// affinity and shared lists, in both families.
func balancedServices(t *testing.T) []*dataplane.Service {
	t.Helper()
	var services []*dataplane.Service
	for _, v6 := range []bool{false, true} {
		addr := func(v4, v6Addr string) netip.Addr {
			if v6 {
				return netip.MustParseAddr(v6Addr)
			}
			return netip.MustParseAddr(v4)
		}
		at := func(v4, v6Addr string, port uint16) dataplane.Frontend {
			return dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(addr(v4, v6Addr), port)}
		}
		pods := []dataplane.Endpoint{{Addr: at("10.1.0.1", "fd00:1::1", 8080).Addr}, {Addr: at("10.1.0.2", "fd00:1::2", 8080).Addr}}
		for i, scheduler := range []string{"", dataplane.RoundRobin, dataplane.SourceHash} {
			services = append(services, balanced(t, scheduler, fmt.Sprintf("s-%d", i), at(fmt.Sprintf("10.96.0.%d", i+1), fmt.Sprintf("fd00:96::%x", i+1), 80), pods))
			sticky := balanced(t, scheduler, fmt.Sprintf("sticky-%d", i), at(fmt.Sprintf("10.96.0.%d", i+17), fmt.Sprintf("fd00:96::%x", i+17), 80), pods)
			sticky.Affinity = 3 * time.Hour
			services = append(services, sticky, serviceWithFrontends(t, fmt.Sprintf("many-%d", i), dataplane.LoadBalancer,
				addr(fmt.Sprintf("203.0.113.%d", 16*i), fmt.Sprintf("2001:db8::%x", 16*i)), minSharedFrontends,
				dataplane.ServiceSpec{Endpoints: slices.Clone(pods), Scheduler: scheduler}))
		}
		second := balanced(t, dataplane.RoundRobin, "second", at("10.96.0.40", "fd00:96::40", 80), pods)
		empty := balanced(t, dataplane.SourceHash, "empty", at("10.96.0.41", "fd00:96::41", 80), nil)
		services = append(services, second, empty)
	}
	return services
}

// selectingChains returns the parts of a listing with the chains that select endpoints, and the
// maps that lead to them. The maps with the endpoints of a source hash are long.
func selectingChains(listing string) string {
	var b strings.Builder
	var skip bool
	for line := range strings.Lines(listing) {
		if text, ok := strings.CutPrefix(line, "\t"); ok && !strings.HasPrefix(text, "\t") && strings.HasSuffix(text, " {\n") {
			skip = !slices.ContainsFunc([]string{"map services ", "map list-sizes ", "chain class-", "chain draw-", "chain list-"}, func(start string) bool {
				return strings.HasPrefix(text, start)
			})
		}
		if !skip || strings.HasPrefix(line, "table ") || line == "}\n" {
			b.WriteString(line)
		}
	}
	return b.String()
}

// TestSelectionEncoding checks that classes keep the selection, and that classes that differ have
// chains with different names.
func TestSelectionEncoding(t *testing.T) {
	t.Parallel()
	chains := map[string]verdictElement{}
	add := func(v verdictElement) {
		if other, ok := chains[v.chainName()]; ok && other != v {
			t.Errorf("the chain %s has the elements %#v and %#v", v.chainName(), v, other)
		}
		chains[v.chainName()] = v
	}
	for s := range selection(maxSelections) {
		for _, base := range []serviceClass{3, 3 | classMasqueradeAlways, 3 | classSessionAffinity | classNodePort, classSharedList | 1, 0} {
			c := base.withSelection(s)
			if c.selection() != s || c.masquerade() != base.masquerade() || c.has(classTimeout) || (c.size() == 0) != (base.size() == 0) {
				t.Errorf("class %x with selection %d is %x", uint32(base), s, uint32(c))
			}
			add(verdictElement{vmapClasses, c})
		}
		for _, n := range []listID{1, 8, 9, 240, maxListID} {
			c := n.sizeClass(localEndpoints, 3, s.kind())
			v := verdictElement{vmapListDraws, c}
			if v.selection() != n.selection(s.kind()) || c.shard() != n.shard() || c.size() != 3 || c.endpointList() != localEndpoints {
				t.Errorf("size class of list %d with selection %d is %x", n, s, uint32(c))
			}
			add(v)
		}
		if got := selectionOf(s.scheduler()); got != s.kind() {
			t.Errorf("selection %d has scheduler %q, whose selection is %d", s, s.scheduler(), got)
		}
	}
}

// TestHashSlots checks the shares of endpoints and which slots change with them.
func TestHashSlots(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 2, 3, 10, 50} {
		list := make([]dataplane.Endpoint, n+1)
		for i := range list {
			list[i] = endpoint(i)
		}
		before := assignHashSlots(list[:n])
		share := map[netip.AddrPort]int{}
		for _, addr := range before {
			share[addr]++
		}
		sigma := math.Sqrt(hashSlots * (1 - 1/float64(n)) / float64(n))
		for _, e := range list[:n] {
			if deviation := float64(share[e.Addr]) - hashSlots/float64(n); math.Abs(deviation) > 4*sigma {
				t.Errorf("%d endpoints: %s has %d of %d slots, %.1f sigma from its share", n, e.Addr, share[e.Addr], hashSlots, deviation/sigma)
			}
		}
		added := assignHashSlots(list)
		moved := 0
		for slot, addr := range added {
			if addr != before[slot] {
				if moved++; addr != list[n].Addr {
					t.Errorf("%d endpoints: slot %d moved from %s to %s when another was added", n, slot, before[slot], addr)
				}
			}
		}
		if want := hashSlots / float64(n+1); math.Abs(float64(moved)-want) > 4*math.Sqrt(want) {
			t.Errorf("%d endpoints: %d slots moved to a new one, want about %.0f", n, moved, want)
		}
		for slot, addr := range assignHashSlots(list[1:]) {
			if added[slot] != list[0].Addr && addr != added[slot] {
				t.Errorf("%d endpoints: slot %d moved from %s to %s when %s was removed", n+1, slot, added[slot], addr, list[0].Addr)
			}
		}
	}
	if slots := assignHashSlots(nil); slots != nil {
		t.Errorf("slots without endpoints: %v", slots)
	}
}

// TestHashSlotsAreStable checks a few slots. All nodes and versions of the program must assign the
// same ones, so that a client keeps its endpoint.
func TestHashSlotsAreStable(t *testing.T) {
	t.Parallel()
	var got strings.Builder
	for _, addr := range assignHashSlots(endpoints(0, 1, 2, 3, 4, 5, 6, 7, 8, 9))[:32] {
		fmt.Fprint(&got, addr.Addr().As4()[3])
	}
	if want := "76338610161163002654629382755262"; got.String() != want {
		t.Errorf("the first slots have the endpoints %s, want %s", got.String(), want)
	}
}

// TestJenkinsHash compares with values that the kernel's function returns on a little-endian
// machine. On a big-endian one it returns them for whole blocks with words in that byte order.
func TestJenkinsHash(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		data string
		seed uint32
		want uint32
	}{
		// lookup3.c, driver5: hashlittle of the empty string and of "Four score and seven years ago"
		{"", 0, 0xdeadbeef},
		{"Four score and seven years ago", 0, 0x17770551},
		{"Four score and seven years ago", 1, 0xcd628161},
	} {
		data := []byte(test.data)
		const word, block = 4, 12
		for rest := data; len(rest) > block; rest = rest[block:] {
			for i := 0; i < block; i += word {
				binary.NativeEndian.PutUint32(rest[i:], binary.LittleEndian.Uint32(rest[i:]))
			}
		}
		if got := jenkinsHash(data, test.seed); got != test.want {
			t.Errorf("jhash(%q, %d) = %#x, want %#x", test.data, test.seed, got, test.want)
		}
	}
}

// TestBalancingElementCount counts the elements that a change writes. With round robin, the number
// is the same as at random. With a source hash, it is at most twice the number of slots that
// change, and does not depend on other Services.
func TestBalancingElementCount(t *testing.T) {
	t.Parallel()
	const count = 10
	list := make([]dataplane.Endpoint, count+1)
	for n := range list {
		list[n] = endpoint(n)
	}
	for _, others := range []int{0, 1000} {
		for _, test := range []struct {
			name, scheduler string
			old, new        []dataplane.Endpoint
			del, add        int
		}{
			{"round robin: removed", dataplane.RoundRobin, list[:count], append(slices.Clone(list[:3]), list[4:count]...), 3, 2},
			{"round robin: added", dataplane.RoundRobin, list[:count], list, 1, 2},
			{"round robin: replaced", dataplane.RoundRobin, list[:count], list[1:], 1, 1},
			{"source hash: removed", dataplane.SourceHash, list[:count], list[1:count], slotsOf(list[:count], 0), slotsOf(list[:count], 0)},
			{"source hash: added", dataplane.SourceHash, list[:count], list, slotsOf(list, count), slotsOf(list, count)},
			{"source hash: the last one removed", dataplane.SourceHash, list[:1], nil, 1 + hashSlots, 1},
		} {
			t.Run(fmt.Sprintf("%s, %d other Services", test.name, others), func(t *testing.T) {
				t.Parallel()
				d := &Dataplane{renderer: endpointRenderer{}, tables: [2]*table{newTable(dataplane.IPv4), newTable(dataplane.IPv6)}, minSharedFrontends: minSharedFrontends}
				d.resetState()
				for n := range others {
					old := balanced(t, test.scheduler, fmt.Sprint(n), frontend(n+2), list)
					for _, v := range d.render(old, d.slotAssignmentFor(old), 0).verdictElements() {
						d.addReferences(0, v, 1)
					}
				}
				changes := []dataplane.Change{{
					Old: balanced(t, test.scheduler, "s", frontend(1), test.old), New: balanced(t, test.scheduler, "s", frontend(1), test.new),
				}}
				p, b := d.planChanges(changes, map[dataplane.Key]error{}), d.newBatch()
				p.addChange(b, changes[0])
				var del, add int
				for set := range b.tables[0].del {
					del += len(b.tables[0].del[set])
					add += len(b.tables[0].add[set])
				}
				if del != test.del || add != test.add {
					t.Errorf("%d elements deleted and %d added, want %d and %d", del, add, test.del, test.add)
				}
			})
		}
	}
}

// slotsOf returns the number of slots of the nth endpoint.
func slotsOf(list []dataplane.Endpoint, n int) int {
	slots := 0
	for _, addr := range assignHashSlots(list) {
		if addr == list[n].Addr {
			slots++
		}
	}
	return slots
}

// TestTurnsAreExclusive checks that Services with round robin have their own counters while there
// are enough, that they keep them, and that further Services share them evenly.
func TestTurnsAreExclusive(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	var services []*dataplane.Service
	for n := range numTurns {
		services = append(services, balanced(t, dataplane.RoundRobin, fmt.Sprint(n), frontend(n), endpoints(1, 2)))
	}
	half := numTurns / 2
	mustReplace(t, d, nodeWithPodCIDRs(), services[:half]...)
	changes := make([]dataplane.Change, 0, half)
	for _, s := range services[half:] {
		changes = append(changes, dataplane.Change{New: s})
	}
	mustApply(t, d, changes...)
	// users returns the number of Services with each class.
	users := func() map[serviceClass]int {
		t.Helper()
		c, err := d.readSets(t.Context(), d.tables[0])
		if err != nil {
			t.Fatal(err)
		}
		byClass := map[serviceClass]int{}
		for _, r := range c.frontends {
			byClass[r.class]++
		}
		return byClass
	}
	expect := func(when string, classes, most int) {
		t.Helper()
		byClass := users()
		if len(byClass) != classes || slices.Max(slices.Collect(maps.Values(byClass))) != most {
			t.Errorf("%s: classes %v, want %d with at most %d Services each", when, byClass, classes, most)
		}
	}
	expect("created", numTurns, 1)

	change := func(n int, list ...int) {
		t.Helper()
		s := balanced(t, dataplane.RoundRobin, fmt.Sprint(n), frontend(n), endpoints(list...))
		mustApply(t, d, dataplane.Change{Old: services[n], New: s})
		services[n] = s
	}
	before := users()
	change(3, 1, 3)
	if after := users(); !maps.Equal(before, after) {
		t.Errorf("a replaced endpoint has changed the classes from %v to %v", before, after)
	}
	change(3, 1, 2, 3)
	change(4, 1, 2, 3)
	expect("two Services with another size", numTurns, 1)
	change(3, 1, 2)
	change(4, 1, 2)
	expect("with their previous size", numTurns, 1)
	wantState(t, d, services...)

	g := generation(t, d)
	restarted := openInNamespace(t, ns)
	mustReplace(t, restarted, nodeWithPodCIDRs(), services...)
	if now := generation(t, d); now != g {
		t.Errorf("a restart has made %d commits, want none", now-g)
	}
	d = restarted
	for n := range numTurns {
		s := balanced(t, dataplane.RoundRobin, fmt.Sprint("more-", n), frontend(1000+n), endpoints(1, 2))
		mustApply(t, d, dataplane.Change{New: s})
		services = append(services, s)
	}
	expect("twice as many", numTurns, 2)
	wantState(t, d, services...)
}
