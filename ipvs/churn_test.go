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

// churn generates random Services that take frontends from one another.
type churn struct {
	*testing.T
	*rand.Rand
}

// services returns a random set of Services without shared frontends.
func (c churn) services() map[dataplane.Key]*dataplane.Service {
	all := map[dataplane.Key]*dataplane.Service{}
	free := map[dataplane.Kind][]string{
		dataplane.ClusterIP:    {"10.96.0.1:80", "10.96.0.1:81", "10.96.0.2:80", "10.96.0.3:80"},
		dataplane.NodePort:     {"0.0.0.0:30080", "0.0.0.0:30081", "0.0.0.0:30082"},
		dataplane.ExternalIP:   {"192.0.2.1:80", "192.0.2.2:80", "10.96.0.4:80"},
		dataplane.LoadBalancer: {"192.0.2.3:80", "192.0.2.4:80", "192.0.2.5:80"},
	}
	for kind, addrs := range free {
		c.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
		for i := 0; len(addrs) > 0; i++ {
			n := min(1+c.IntN(2), len(addrs))
			if c.IntN(4) > 0 {
				protocol := []string{"TCP", "UDP"}[c.IntN(2)]
				frontends := ""
				for _, a := range addrs[:n] {
					frontends += a + "/" + protocol + " "
				}
				s := service(c.T, kind, fmt.Sprintf("s%d", i), frontends, c.spec())
				if protocol == "UDP" && c.IntN(2) == 0 {
					s.Serving = addrsOf(c.endpoints())
				}
				all[s.Key] = s
			}
			addrs = addrs[n:]
		}
	}
	return all
}

func (c churn) spec() dataplane.ServiceSpec {
	t := dataplane.ServiceSpec{Endpoints: c.endpoints(), ExternalTrafficPolicyLocal: c.IntN(3) == 0}
	if t.ExternalTrafficPolicyLocal {
		t.LocalEndpoints = c.endpoints()
	}
	if c.IntN(4) == 0 {
		t.Affinity = time.Hour
	}
	if c.IntN(8) == 0 {
		t.Scheduler = "lc"
	}
	return t
}

func (c churn) endpoints() []dataplane.Endpoint {
	var all []string
	for i := range 4 {
		if c.IntN(2) == 0 {
			all = append(all, fmt.Sprintf("10.244.0.%d:8080", i+1))
		}
	}
	return endpointsAt(all...)
}

// changesBetween returns the changes from one set of Services to another, in random order.
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

// TestRandomChurn checks that the kernel has the desired state after a Replace and after each
// Apply that follows, from any state before and after any failure.
func TestRandomChurn(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			c := churn{t, rand.New(rand.NewPCG(seed, 1))} //nolint:gosec // reproducible
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
				next := c.services()
				switch c.IntN(6) {
				case 0: // restart
					d = f.openDataplane()
					if err := replace(next); err != nil {
						t.Fatal(err)
					}
				case 1: // faults, then a Replace
					f.skipOrderChecks = true
					f.fault = func(string) error {
						if c.IntN(10) == 0 {
							return unix.ENOMEM
						}
						return nil
					}
					c.applyWithFaults(d, f, have, next)
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
				if c.IntN(3) == 0 {
					c.finishDrains(d, f)
					f.expect(fmt.Sprintf("after finishing the drains of step %d", step), have, nil)
				}
				before := len(f.requests)
				if c.IntN(3) == 0 {
					if err := replace(have); err != nil {
						t.Fatal(err)
					}
					if n := f.requests[before:]; len(n) > 0 {
						t.Errorf("after step %d a Replace without changes sent %v", step, n)
					}
				}
				if t.Failed() {
					return
				}
			}
		})
	}
}

// applyWithFaults applies some changes while requests fail, and checks the Services that did
// not fail.
func (c churn) applyWithFaults(d *Dataplane, f *fakeNode, have, next map[dataplane.Key]*dataplane.Service) {
	stateKnown := true
	for range 1 + c.IntN(4) {
		var err error
		if !stateKnown || c.IntN(2) == 0 {
			err = d.Replace(context.Background(), dataplane.Node{}, maps.Values(next), nil)
		} else {
			err = d.Apply(context.Background(), changesBetween(have, next))
		}
		var keyed *dataplane.Error
		switch stateKnown = err == nil; {
		case stateKnown:
			f.expect("without errors despite faults", next, nil)
		case errors.As(err, &keyed):
			f.expect("after a partial failure", next, keyed.Failed)
		}
		have, next = next, c.services()
	}
}

// finishDrains deletes drained destinations as resync does.
func (c churn) finishDrains(d *Dataplane, f *fakeNode) {
	for s := range maps.Clone(d.draining) {
		destinations, err := fakeIPVS{f}.readDestinations(s, unknownNumber)
		if err != nil {
			c.Fatal(err)
		}
		if err := d.finishServerDrains(s, destinations); err != nil {
			c.Fatal(err)
		}
	}
	if _, err := d.deleteRetired(math.MaxInt); err != nil {
		c.Fatal(err)
	}
	for s, server := range f.servers {
		if len(d.retiring) > 0 {
			c.Errorf("%v have no connections but were not deleted", d.retiring)
		}
		for addr, dest := range server.dests {
			if dest.weight == 0 {
				c.Errorf("%s of %s has no connections but was not deleted", addr, s)
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
