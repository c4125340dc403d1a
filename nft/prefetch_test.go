package nft

import (
	"fmt"
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
			kept := d.prefetched
			mustReplace(t, d, nodeWithPodCIDRs(), services...)
			d.prefetched = kept
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
			for d.prefetched == nil {
				awaitNotifications(t, d)
				if err := d.Prefetch(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			test.change(t, ns, d, other)
			if name != "this instance deletes a Service" {
				awaitNotifications(t, d)
			}
			prefetched := d.prefetched
			if _, _, used := d.usePrefetched(t.Context()); used != test.used {
				t.Errorf("prefetched content used: %t, want %t", used, test.used)
			}
			d.prefetched = prefetched
			mustReplace(t, d, nodeWithPodCIDRs(), services...)
			wantState(t, d, services...)
		})
	}
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
		if err := d.Prefetch(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := d.prefetched != nil; got != want {
			t.Fatalf("tables prefetched: %t, want %t", got, want)
		}
	}
	prefetch(false)
	prefetch(true)
	before := d.prefetched
	prefetch(true)
	if d.prefetched != before {
		t.Error("unchanged tables were read again")
	}
	two := service(t, "two", []dataplane.Frontend{frontend(2)}, endpoints(2))
	mustApply(t, other, dataplane.Change{New: two})
	prefetch(false)
	mustApply(t, other, dataplane.Change{Old: one})
	prefetch(false)
	prefetch(true)
	if rows := d.prefetched.have[0].frontends; len(rows) != 1 || rows[frontend(2)] == nil {
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
		for _, prefetch := range []bool{false, true} {
			b.Run(fmt.Sprintf("services=%d/prefetch=%t", n, prefetch), func(b *testing.B) {
				var took []time.Duration
				for b.Loop() {
					d := open()
					for prefetch && d.prefetched == nil {
						if err := d.Prefetch(b.Context()); err != nil {
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
