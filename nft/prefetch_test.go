package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// TestPrefetch checks that Replace uses the prefetched content if the tables have not
// changed, and reads them again otherwise.
func TestPrefetch(t *testing.T) {
	t.Parallel()
	const tool = "nft"
	var services []*dataplane.Service
	for i := range 3 {
		services = append(services, service(t, fmt.Sprint("s-", i), []dataplane.Frontend{frontend(i)}, endpoints(1, 2, 3)))
	}
	for name, test := range map[string]struct {
		change func(t *testing.T, ns *nettest.Namespace, d, other *Dataplane)
		used   bool
	}{
		"no change": {func(*testing.T, *nettest.Namespace, *Dataplane, *Dataplane) {}, true},
		"other table changes": {func(t *testing.T, ns *nettest.Namespace, _, _ *Dataplane) {
			runNFT(t, ns, tool, "add table ip others; add chain ip others a")
		}, true},
		"other instance deletes a Service": {func(t *testing.T, _ *nettest.Namespace, _, other *Dataplane) {
			mustApply(t, other, dataplane.Change{Old: services[1]})
		}, false},
		"this instance deletes a Service": {func(t *testing.T, ns *nettest.Namespace, d, other *Dataplane) {
			kept := d.prefetch.prefetched
			mustReplace(t, d, nodeWithPodCIDRs(), services...)
			d.prefetch.prefetched = kept
			mustApply(t, d, dataplane.Change{Old: services[1]})
			runNFT(t, ns, tool, "add table ip others") // so that the watch sees the last generation
		}, false},
		"table deleted": {func(t *testing.T, ns *nettest.Namespace, _, _ *Dataplane) {
			runNFT(t, ns, tool, "delete table ip fairlead")
		}, false},
		"rebuild starts": {func(t *testing.T, ns *nettest.Namespace, _, _ *Dataplane) {
			runNFT(t, ns, tool, "add table ip fairlead-next")
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			other, ns := newDataplane(t)
			d := openInNamespace(t, ns)
			mustReplace(t, other, nodeWithPodCIDRs(), services...)
			for d.prefetch.prefetched == nil {
				awaitNotifications(t, d)
				if err := d.Prefetch(t.Context(), dataplane.Desired{Services: slices.Values[[]*dataplane.Service](nil)}); err != nil {
					t.Fatal(err)
				}
			}
			test.change(t, ns, d, other)
			if name != "this instance deletes a Service" {
				awaitNotifications(t, d)
			}
			prefetched := d.prefetch.prefetched
			if _, _, used := d.usePrefetched(t.Context()); used != test.used {
				t.Errorf("prefetched content used: %t, want %t", used, test.used)
			}
			d.prefetch.prefetched = prefetched
			mustReplace(t, d, nodeWithPodCIDRs(), services...)
			wantState(t, d, services...)
		})
	}
}

// TestPrefetchPreparesReplace checks that a Replace after Prefetch writes only later changes.
func TestPrefetchPreparesReplace(t *testing.T) {
	t.Parallel()
	one := service(t, "one", []dataplane.Frontend{frontend(1)}, endpoints(1, 2, 3))
	oneScaled := service(t, "one", []dataplane.Frontend{frontend(1)}, endpoints(2, 3, 4, 5))
	oneMoved := service(t, "one", []dataplane.Frontend{frontend(9)}, endpoints(1, 2, 3))
	two := service(t, "two", []dataplane.Frontend{frontend(2)}, endpoints(1))
	three := service(t, "three", []dataplane.Frontend{frontend(1)}, endpoints(1))
	node, otherNode := nodeWithPodCIDRs(), nodeWithPodCIDRs()
	otherNode.NodePortAddrs = append(otherNode.NodePortAddrs, netip.MustParseAddr("192.0.2.77"))
	for name, test := range map[string]struct {
		desired  []*dataplane.Service // of Prefetch
		change   func(t *testing.T, ns *nettest.Namespace, other *Dataplane)
		node     dataplane.Node
		replace  []*dataplane.Service
		prepared bool // after Prefetch
		used     bool // by Replace
	}{
		"nothing has changed":      {[]*dataplane.Service{one, two}, nil, node, []*dataplane.Service{one, two}, true, true},
		"other order":              {[]*dataplane.Service{one, two}, nil, node, []*dataplane.Service{two, one}, true, true},
		"endpoints have changed":   {[]*dataplane.Service{one, two}, nil, node, []*dataplane.Service{oneScaled, two}, true, true},
		"Service deleted":          {[]*dataplane.Service{one, two}, nil, node, []*dataplane.Service{two}, true, true},
		"all Services deleted":     {[]*dataplane.Service{one, two}, nil, node, nil, true, true},
		"frontend has moved":       {[]*dataplane.Service{one, two}, nil, node, []*dataplane.Service{oneMoved, two, three}, true, true},
		"node has changed":         {[]*dataplane.Service{one, two}, nil, otherNode, []*dataplane.Service{one, two}, true, false},
		"kernel lacks a Service":   {[]*dataplane.Service{one, two, service(t, "new", []dataplane.Frontend{frontend(3)}, endpoints(1))}, nil, node, []*dataplane.Service{one}, false, false},
		"kernel has other content": {[]*dataplane.Service{oneScaled, two}, nil, node, []*dataplane.Service{oneScaled, two}, false, false},
		"table of another program": {[]*dataplane.Service{one, two}, func(t *testing.T, ns *nettest.Namespace, _ *Dataplane) {
			runNFT(t, ns, "nft", "add table ip others")
		}, node, []*dataplane.Service{oneScaled}, true, true},
		"other instance changes a Service": {[]*dataplane.Service{one, two}, func(t *testing.T, _ *nettest.Namespace, other *Dataplane) {
			mustApply(t, other, dataplane.Change{Old: one, New: oneScaled})
		}, node, []*dataplane.Service{one, two}, true, false},
		"rule added": {[]*dataplane.Service{one, two}, func(t *testing.T, ns *nettest.Namespace, _ *Dataplane) {
			runNFT(t, ns, "nft", "add rule ip fairlead filter-forward counter")
		}, node, []*dataplane.Service{one, two}, true, false},
		"table deleted": {[]*dataplane.Service{one, two}, func(t *testing.T, ns *nettest.Namespace, _ *Dataplane) {
			runNFT(t, ns, "nft", "delete table ip fairlead")
		}, node, []*dataplane.Service{one, two}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			other, ns := newDataplane(t)
			d := openInNamespace(t, ns)
			mustReplace(t, other, node, one, two)
			desired := dataplane.Desired{Node: node, Services: slices.Values(test.desired)}
			before := generationOf(t, d)
			for range 3 { // detect the tables, read them, and compare them
				awaitNotifications(t, d)
				if err := d.Prefetch(t.Context(), desired); err != nil {
					t.Fatal(err)
				}
			}
			if got := d.prefetch.prepared != nil; got != test.prepared {
				t.Errorf("Replace prepared: %t, want %t", got, test.prepared)
			}
			if got := generationOf(t, d); got != before {
				t.Errorf("Prefetch wrote to the kernel: generation %d, want %d", got, before)
			}
			if test.change != nil {
				test.change(t, ns, other)
				awaitNotifications(t, d)
			}
			prepared := d.prefetch.prepared
			used, err := d.replacePrepared(t.Context(), test.node, slices.Clone(test.replace))
			if used != test.used || err != nil {
				t.Errorf("prepared Replace used: %t with error %v, want %t", used, err, test.used)
			}
			if used {
				wantState(t, d, test.replace...)
			} else {
				d.prefetch.prepared = prepared
			}
			mustReplace(t, d, test.node, test.replace...)
			wantState(t, d, test.replace...)
			for i := range test.replace { // the caches are right
				mustApply(t, d, dataplane.Change{Old: test.replace[i]})
				wantState(t, d, test.replace[i+1:]...)
			}
			unused := d.verdictElements
			mustReplace(t, d, test.node)
			for i := range unused {
				for b, n := range unused[i] {
					if n != 0 {
						t.Errorf("class %v has %d references without Services, want 0", b, n)
					}
				}
			}
		})
	}
}

func generationOf(t *testing.T, d *Dataplane) uint32 {
	t.Helper()
	generation, err := d.currentGeneration()
	if err != nil {
		t.Fatal(err)
	}
	return generation
}

// awaitNotifications waits until the watch has received the notifications of all changes.
func awaitNotifications(t *testing.T, d *Dataplane) {
	t.Helper()
	generation, err := d.currentGeneration()
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); !d.watch.waitForGeneration(generation); {
		if time.Now().After(deadline) {
			t.Fatalf("no notification for generation %d", generation)
		}
	}
}

// TestPrefetchWaitsForUnchangedTables checks that Prefetch reads the tables only when they
// have not changed since its previous call, and reads them again after a change.
func TestPrefetchWaitsForUnchangedTables(t *testing.T) {
	t.Parallel()
	other, ns := newDataplane(t)
	d := openInNamespace(t, ns)
	one := service(t, "one", []dataplane.Frontend{frontend(1)}, endpoints(1))
	mustReplace(t, other, nodeWithPodCIDRs(), one)
	prefetch := func(want bool) {
		t.Helper()
		awaitNotifications(t, d)
		if err := d.Prefetch(t.Context(), dataplane.Desired{Services: slices.Values[[]*dataplane.Service](nil)}); err != nil {
			t.Fatal(err)
		}
		if got := d.prefetch.prefetched != nil; got != want {
			t.Fatalf("tables prefetched: %t, want %t", got, want)
		}
	}
	prefetch(false)
	prefetch(true)
	before := d.prefetch.prefetched
	prefetch(true)
	if d.prefetch.prefetched != before {
		t.Error("unchanged tables were read again")
	}
	two := service(t, "two", []dataplane.Frontend{frontend(2)}, endpoints(2))
	mustApply(t, other, dataplane.Change{New: two})
	prefetch(false)
	mustApply(t, other, dataplane.Change{Old: one})
	prefetch(false)
	prefetch(true)
	if rows := d.prefetch.prefetched.have[0].frontends; len(rows) != 1 || rows[frontend(2)] == nil {
		t.Errorf("prefetched %v, want the frontend of Service two", rows)
	}
}

// TestChangesCountedBeforeGeneration checks that the changes of a commit are counted before
// waiters see its generation.
func TestChangesCountedBeforeGeneration(t *testing.T) {
	t.Parallel()
	const generation = 7
	name, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: []byte("fairlead\x00")}})
	if err != nil {
		t.Fatal(err)
	}
	id, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_GEN_ID, Data: []byte{0, 0, 0, generation}}})
	if err != nil {
		t.Fatal(err)
	}
	message := func(typ uint16, family byte, attrs []byte) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ)},
			Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attrs...),
		}
	}
	commit := []netlink.Message{message(unix.NFT_MSG_DELRULE, unix.NFPROTO_IPV4, name), message(unix.NFT_MSG_NEWGEN, unix.NFPROTO_UNSPEC, id)}
	for range 20_000 {
		w := &watch{
			table: "fairlead", subscribed: true, generationChanged: make(chan struct{}), drift: make(chan struct{}, 1), lost: make(chan struct{}, 1),
		}
		go w.handle(commit)
		if !w.waitForGeneration(generation) {
			continue // the machine is too slow
		}
		if w.changeCount() == 0 {
			t.Fatal("generation visible before its change was counted")
		}
	}
}

// BenchmarkHandover measures the first Replace of an instance that takes over the tables of
// another one with the same Services, with and without Prefetch. The Services have 10
// endpoints.
func BenchmarkHandover(b *testing.B) {
	sizes := []int{10, 1000, 10_000}
	if testing.Short() {
		sizes = []int{100}
	}
	for _, n := range sizes {
		ns, err := nettest.NewNamespace("")
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = ns.Close() }()
		services := make([]*dataplane.Service, n)
		for i := range services {
			key := dataplane.Key{Namespace: "default", Name: fmt.Sprintf("s-%d", i), Family: dataplane.IPv4}
			spec := dataplane.ServiceSpec{Endpoints: endpoints(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)}
			if services[i], err = dataplane.NewService(key, []dataplane.Frontend{frontend(i)}, spec); err != nil {
				b.Fatal(err)
			}
		}
		replace := func(d *Dataplane) time.Duration {
			began := time.Now()
			if err := d.Replace(b.Context(), nodeWithPodCIDRs(), slices.Values(services), nil); err != nil {
				b.Fatal(err)
			}
			return time.Since(began)
		}
		open := func() *Dataplane {
			d, err := Open(Options{NetNS: ns.Fd()})
			if err != nil {
				b.Fatal(err)
			}
			return d
		}
		first := open()
		defer func() { _ = first.Close() }()
		replace(first)
		other := dataplane.Desired{Services: slices.Values[[]*dataplane.Service](nil)}
		same := dataplane.Desired{Node: nodeWithPodCIDRs(), Services: slices.Values(services)}
		for _, mode := range []struct {
			name    string
			desired dataplane.Desired
		}{{"nothing", same}, {"contents", other}, {"result", same}} {
			b.Run(fmt.Sprintf("services=%d/prefetched=%s", n, mode.name), func(b *testing.B) {
				var took []time.Duration
				for b.Loop() {
					d := open()
					for mode.name != "nothing" && d.prefetch.prefetched == nil && d.prefetch.prepared == nil {
						if err := d.Prefetch(b.Context(), mode.desired); err != nil {
							b.Fatal(err)
						}
					}
					took = append(took, replace(d))
					_ = d.Close()
				}
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
			})
		}
	}
}
