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

// Replace uses what Prefetch has read if the tables are the same, and reads them again
// if anybody has changed them.
func TestPrefetch(t *testing.T) {
	t.Parallel()
	const byHand = "nft"
	var services []*dataplane.Service
	for i := range 3 {
		services = append(services, service(t, fmt.Sprint("s-", i), []dataplane.Frontend{frontend(i)}, endpoints(1, 2, 3)))
	}
	for name, test := range map[string]struct {
		between func(t *testing.T, ns *nettest.Namespace, d, other *Dataplane)
		used    bool
	}{
		"nothing happens": {func(*testing.T, *nettest.Namespace, *Dataplane, *Dataplane) {}, true},
		"another table changes": {func(t *testing.T, ns *nettest.Namespace, _, _ *Dataplane) {
			runNFT(t, ns, byHand, "add table ip stranger; add chain ip stranger a")
		}, true},
		"the other instance deletes a Service": {func(t *testing.T, _ *nettest.Namespace, _, other *Dataplane) {
			mustApply(t, other, dataplane.Change{Old: services[1]})
		}, false},
		"this instance deletes a Service": {func(t *testing.T, ns *nettest.Namespace, d, other *Dataplane) {
			kept := d.prefetched
			mustReplace(t, d, nodeWithPodCIDRs(), services...)
			d.prefetched = kept
			mustApply(t, d, dataplane.Change{Old: services[1]})
			runNFT(t, ns, byHand, "add table ip stranger") // so that the last generation is announced
		}, false},
		"a table is deleted": {func(t *testing.T, ns *nettest.Namespace, _, _ *Dataplane) {
			runNFT(t, ns, byHand, "delete table ip fairlead")
		}, false},
		"a rebuild begins": {func(t *testing.T, ns *nettest.Namespace, _, _ *Dataplane) {
			runNFT(t, ns, byHand, "add table ip fairlead-next")
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
			test.between(t, ns, d, other)
			if name != "this instance deletes a Service" {
				awaitNotifications(t, d)
			}
			prefetched := d.prefetched
			if _, _, used := d.usePrefetched(t.Context()); used != test.used {
				t.Errorf("what was prefetched is used: %t, want %t", used, test.used)
			}
			d.prefetched = prefetched
			mustReplace(t, d, nodeWithPodCIDRs(), services...)
			wantState(t, d, services...)
		})
	}
}

// awaitNotifications waits until all changes by others are announced.
func awaitNotifications(t *testing.T, d *Dataplane) {
	t.Helper()
	generation, err := d.currentGeneration()
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); !d.watch.waitForGeneration(generation); {
		if time.Now().After(deadline) {
			t.Fatalf("generation %d is not announced", generation)
		}
	}
}

// Prefetch waits until the tables rest, and reads them again after a change.
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
			t.Fatalf("the tables were read in advance: %t, want %t", got, want)
		}
	}
	prefetch(false)
	prefetch(true)
	before := d.prefetched
	prefetch(true)
	if d.prefetched != before {
		t.Error("the tables were read again although they have not changed")
	}
	two := service(t, "two", []dataplane.Frontend{frontend(2)}, endpoints(2))
	mustApply(t, other, dataplane.Change{New: two})
	prefetch(false)
	mustApply(t, other, dataplane.Change{Old: one})
	prefetch(false)
	prefetch(true)
	if rows := d.prefetched.have[0].frontends; len(rows) != 1 || rows[frontend(2)] == nil {
		t.Errorf("read %v in advance, want the frontend of Service two", rows)
	}
}

// When a generation is announced, the changes that it brings are counted.
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
			continue // the machine is too busy
		}
		if w.changeCount() == 0 {
			t.Fatal("a generation is announced whose change is not counted")
		}
	}
}

// BenchmarkHandover measures the Replace of an instance that takes over from another one
// whose Services it has, with and without Prefetch, for Services with 10 endpoints.
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
			treatment := dataplane.ServiceSpec{Endpoints: endpoints(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)}
			if services[i], err = dataplane.NewService(key, []dataplane.Frontend{frontend(i)}, treatment); err != nil {
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
