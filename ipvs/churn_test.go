package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"

	"golang.org/x/sys/unix"
)

// churn draws Services that move frontends between each other.
type churn struct {
	*testing.T
	*rand.Rand
}

// services returns a random set of Services, no frontend of which is in two.
func (h churn) services() map[dataplane.Key]*dataplane.Service {
	all := map[dataplane.Key]*dataplane.Service{}
	free := map[dataplane.Kind][]string{
		dataplane.ClusterIP:    {"10.96.0.1:80", "10.96.0.1:81", "10.96.0.2:80", "10.96.0.3:80"},
		dataplane.NodePort:     {"0.0.0.0:30080", "0.0.0.0:30081", "0.0.0.0:30082"},
		dataplane.ExternalIP:   {"192.0.2.1:80", "192.0.2.2:80", "10.96.0.4:80"},
		dataplane.LoadBalancer: {"192.0.2.3:80", "192.0.2.4:80", "192.0.2.5:80"},
	}
	for kind, addrs := range free {
		h.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
		for i := 0; len(addrs) > 0; i++ {
			n := min(1+h.IntN(2), len(addrs))
			if h.IntN(4) > 0 {
				protocol := []string{"TCP", "UDP"}[h.IntN(2)]
				frontends := ""
				for _, a := range addrs[:n] {
					frontends += a + "/" + protocol + " "
				}
				s := service(h.T, kind, fmt.Sprintf("s%d", i), frontends, h.spec())
				if protocol == "UDP" && h.IntN(2) == 0 {
					s.Serving = addrsOf(h.endpoints())
				}
				all[s.Key] = s
			}
			addrs = addrs[n:]
		}
	}
	return all
}

func (h churn) spec() dataplane.ServiceSpec {
	t := dataplane.ServiceSpec{Endpoints: h.endpoints(), ExternalTrafficPolicyLocal: h.IntN(3) == 0}
	if t.ExternalTrafficPolicyLocal {
		t.LocalEndpoints = h.endpoints()
	}
	if h.IntN(4) == 0 {
		t.Affinity = time.Hour
	}
	if h.IntN(8) == 0 {
		t.Scheduler = "lc"
	}
	return t
}

func (h churn) endpoints() []dataplane.Endpoint {
	var all []string
	for i := range 4 {
		if h.IntN(2) == 0 {
			all = append(all, fmt.Sprintf("10.244.0.%d:8080", i+1))
		}
	}
	return endpointsAt(all...)
}

// changesBetween returns what leads from some Services to others, in any order.
func changesBetween(from, next map[dataplane.Key]*dataplane.Service) []dataplane.Change {
	var all []dataplane.Change
	for k, s := range from {
		if !s.Equal(next[k]) {
			all = append(all, dataplane.Change{Old: s, New: next[k]})
		}
	}
	for k, s := range next {
		if from[k] == nil {
			all = append(all, dataplane.Change{New: s})
		}
	}
	return all
}

// After a Replace, and after each Apply that follows one, the kernel has what was
// wanted, whatever was before, and whatever has failed.
func TestRandomChurn(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			h := churn{t, rand.New(rand.NewPCG(seed, 1))} //nolint:gosec // repeatable
			d, f := newFakeNode(t)
			ctx := context.Background()
			have := map[dataplane.Key]*dataplane.Service{}
			replace := func(next map[dataplane.Key]*dataplane.Service) error {
				return d.Replace(ctx, dataplane.Node{}, maps.Values(next), nil)
			}
			if err := replace(have); err != nil {
				t.Fatal(err)
			}
			for step := range 30 {
				next := h.services()
				switch h.IntN(6) {
				case 0: // a restart
					d = f.openDataplane()
					if err := replace(next); err != nil {
						t.Fatal(err)
					}
				case 1: // faults, until a Replace
					f.skipOrderChecks = true
					f.fault = func(string) error {
						if h.IntN(10) == 0 {
							return unix.ENOMEM
						}
						return nil
					}
					h.applyWithFaults(d, f, have, next)
					f.fault = func(string) error { return nil }
					if err := replace(next); err != nil {
						t.Fatal(err)
					}
					f.skipOrderChecks = false
				default:
					if err := d.Apply(ctx, changesBetween(have, next)); err != nil {
						t.Fatal(err)
					}
				}
				have = next
				f.expect(fmt.Sprintf("after step %d", step), have, nil)
				if h.IntN(3) == 0 {
					h.finishDrains(d, f)
					f.expect(fmt.Sprintf("after the drains of step %d", step), have, nil)
				}
				before := len(f.requests)
				if h.IntN(3) == 0 {
					if err := replace(have); err != nil {
						t.Fatal(err)
					}
					if n := f.requests[before:]; len(n) > 0 {
						t.Errorf("after step %d a Replace by what is there asked for %v", step, n)
					}
				}
				if t.Failed() {
					return
				}
			}
		})
	}
}

// applyWithFaults makes some changes while things fail. What does not fail is as wanted.
func (h churn) applyWithFaults(d *Dataplane, f *fakeNode, have, next map[dataplane.Key]*dataplane.Service) {
	known := true
	for range 1 + h.IntN(4) {
		var err error
		if !known || h.IntN(2) == 0 {
			err = d.Replace(context.Background(), dataplane.Node{}, maps.Values(next), nil)
		} else {
			err = d.Apply(context.Background(), changesBetween(have, next))
		}
		var keyed *dataplane.Error
		switch known = err == nil; {
		case known:
			f.expect("in spite of faults", next, nil)
		case errors.As(err, &keyed):
			f.expect("beside what has failed", next, keyed.Failed)
		}
		have, next = next, h.services()
	}
}

// finishDrains looks after what drains as the patrol does.
func (h churn) finishDrains(d *Dataplane, f *fakeNode) {
	for s := range maps.Clone(d.draining) {
		found, err := fakeIPVS{f}.dumpDestinations(s)
		if err != nil {
			h.Fatal(err)
		}
		if err := d.finishServerDrains(s, found); err != nil {
			h.Fatal(err)
		}
	}
	if _, err := d.deleteRetired(math.MaxInt); err != nil {
		h.Fatal(err)
	}
	for s, held := range f.servers {
		if len(d.retiring) > 0 {
			h.Errorf("%v have no connections and are still there", d.retiring)
		}
		for addr, dest := range held.dests {
			if dest.weight == 0 {
				h.Errorf("%s of %s has no connections and is still there", addr, s)
			}
		}
	}
}

func addrsOf(endpoints []dataplane.Endpoint) []netip.AddrPort {
	var all []netip.AddrPort
	for _, e := range endpoints {
		all = append(all, e.Addr)
	}
	return all
}
