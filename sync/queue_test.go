package sync

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// serviceOfWeight returns a Service with the given weight and with frontends at consecutive
// addresses from addr.
func serviceOfWeight(t testing.TB, name, port, addr string, frontends, weight int) *dataplane.Service {
	t.Helper()
	a := netip.MustParseAddr(addr)
	var fs []dataplane.Frontend
	for range frontends {
		fs = append(fs, dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(a, 80)})
		a = a.Next()
	}
	var es []dataplane.Endpoint
	for n := range weight - frontends {
		es = append(es, dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 8080)})
	}
	key := dataplane.Key{Namespace: "default", Name: name, Port: port, Family: dataplane.IPv4, Kind: dataplane.ExternalIP}
	s, err := dataplane.NewService(key, fs, dataplane.ServiceSpec{Endpoints: es})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func serviceNames(entries []*entry) []string {
	var names []string
	for _, e := range entries {
		names = append(names, e.Key().Name)
	}
	return names
}

// putHugeService queues the creation of a Service with many ports.
func putHugeService(t testing.TB, q *queue, ports int) {
	t.Helper()
	for i := range ports {
		q.put(dataplane.Change{New: serviceOfWeight(t, "huge", fmt.Sprint(i), fmt.Sprintf("203.0.%d.1", i), 200, 300)}, time.Time{}, 0)
	}
}

// TestQueueIsFair adds Services while a huge one is being served. The weight of each call is
// limited, small Services are in the next call, a medium-sized Service follows soon, and each
// call makes progress with the huge one.
func TestQueueIsFair(t *testing.T) {
	t.Parallel()
	q := newQueue()
	putHugeService(t, &q, 200)
	calls, served := 0, 0
	for round := 0; len(q.entries) > 0; round++ {
		name := fmt.Sprint("small-", round)
		q.put(dataplane.Change{New: serviceOfWeight(t, name, "", "192.0.2.1", 1, 11)}, time.Time{}, 0)
		dequeued := q.dequeue(callWeight)
		calls++
		weight, ports := 0, 0
		for _, e := range dequeued {
			weight += e.weight
			if e.Key().Name == "huge" {
				ports++
			}
		}
		if weight > callWeight+300 {
			t.Fatalf("call %d has a weight of %d, want about %d", round, weight, callWeight)
		}
		if !slices.Contains(serviceNames(dequeued), name) {
			t.Fatalf("call %d does not contain the small Service that waits", round)
		}
		if served += ports; ports == 0 && served < 200 {
			t.Fatalf("call %d contains nothing of the huge Service", round)
		}
		if round > 100 {
			t.Fatal("the queue never becomes empty")
		}
	}
	if want := 200 * 300 / callWeight; calls < want {
		t.Errorf("%d calls, want at least %d", calls, want)
	}

	putHugeService(t, &q, 200)
	q.dequeue(callWeight)
	q.put(dataplane.Change{New: serviceOfWeight(t, "medium", "", "192.0.2.1", 1, 2000)}, time.Time{}, 0)
	if dequeued := serviceNames(q.dequeue(callWeight)); !slices.Contains(dequeued, "medium") {
		t.Errorf("a Service with 2,000 endpoints waits for a huge one: %v", dequeued)
	}
}

// TestQueueDoesNotStarve changes small Services continuously while a large one waits.
func TestQueueDoesNotStarve(t *testing.T) {
	t.Parallel()
	q := newQueue()
	q.put(dataplane.Change{New: serviceOfWeight(t, "large", "", "203.0.113.1", 1, 10_000)}, time.Time{}, 0)
	for round := range 20 {
		for i := range 500 {
			q.put(dataplane.Change{New: serviceOfWeight(t, fmt.Sprintf("small-%d-%d", round, i), "", "192.0.2.1", 1, 11)}, time.Time{}, 0)
		}
		if slices.Contains(serviceNames(q.dequeue(callWeight)), "large") {
			return
		}
	}
	t.Error("the large Service is never served")
}

// TestQueueKeepsMovesTogether moves frontends around a ring of Services. Later updates replace
// queued changes.
func TestQueueKeepsMovesTogether(t *testing.T) {
	t.Parallel()
	q := newQueue()
	putHugeService(t, &q, 50)
	q.put(dataplane.Change{New: serviceOfWeight(t, "x", "", "192.0.2.1", 1, 11)}, time.Time{}, 0)
	q.dequeue(1) // puts all entries into groups
	at := func(name, addr string, n, weight int) *dataplane.Service {
		return serviceOfWeight(t, name, "", addr, n, weight)
	}
	a, b, c := at("a", "192.0.2.10", 3, 20), at("b", "192.0.2.20", 3, 3000), at("c", "192.0.2.30", 3, 6000)
	q.put(dataplane.Change{Old: a, New: at("a", "192.0.2.20", 3, 20)}, time.Time{}, 1)
	q.put(dataplane.Change{Old: b, New: at("b", "192.0.2.40", 3, 3000)}, time.Time{}, 1)
	q.dequeue(1)
	q.put(dataplane.Change{Old: c, New: at("c", "192.0.2.50", 3, 6000)}, time.Time{}, 2)
	q.put(dataplane.Change{Old: b, New: at("b", "192.0.2.30", 3, 3000)}, time.Time{}, 2)
	for range 100 {
		dequeued := serviceNames(q.dequeue(callWeight))
		moved := 0
		for _, name := range []string{"a", "b", "c"} {
			if slices.Contains(dequeued, name) {
				moved++
			}
		}
		if moved == 3 {
			return
		}
		if moved > 0 {
			t.Fatalf("a call contains %v, want a, b and c together", dequeued)
		}
	}
	t.Error("the frontends never move")
}

// TestQueueRemoveAll removes all changes from the queue and checks that no state remains.
func TestQueueRemoveAll(t *testing.T) {
	t.Parallel()
	q := newQueue()
	putHugeService(t, &q, 50)
	q.dequeue(callWeight)
	for k := range q.entries {
		q.remove(k)
	}
	if q.weight != 0 || q.oldest() != nil {
		t.Errorf("the empty queue has weight %d, want 0", q.weight)
	}
	if dequeued := q.dequeue(callWeight); len(dequeued) != 0 || len(q.movingGroups)+len(q.groups)+len(q.finishByService)+len(q.arrived) != 0 {
		t.Errorf("the empty queue returns %d changes and indexes %d frontends", len(dequeued), len(q.movingGroups))
	}
}
