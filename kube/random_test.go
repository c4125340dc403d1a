package kube

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead/dataplane"
)

// choices is where a history gets its decisions from: a random generator, or
// the bytes of a fuzzer.
type choices interface{ IntN(n int) int }

// bytesChoices takes each decision from one byte, and is all 0 after them.
type bytesChoices struct{ data []byte }

func (b *bytesChoices) IntN(n int) int {
	if len(b.data) == 0 {
		return 0
	}
	c := b.data[0]
	b.data = b.data[1:]
	return int(c) % n
}

func pick[T any](c choices, from ...T) T { return from[c.IntN(len(from))] }

// world is what a source would hold.
type world struct {
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
}

// Few names, addresses and ports, so that histories collide all the time.
func randomService(c choices) *corev1.Service {
	ips := pick(c, "10.96.0.1", "10.96.0.2", "10.96.0.1 fd00::1", "fd00::1 10.96.0.2", "None", "", "10.96.0.010 fd00::2", "x fd00::1")
	svc := newService(pick(c, "a", "b", "c", "d"), ips, age(time.Duration(c.IntN(3))*time.Hour))
	svc.Spec.Ports = nil
	for range 1 + c.IntN(3) {
		svc.Spec.Ports = append(svc.Spec.Ports,
			port(pick(c, "", "p", "q"), pick(c, corev1.ProtocolTCP, corev1.ProtocolUDP, "", "bad"), pick[int32](c, 80, 81, 80, 70000)))
	}
	switch c.IntN(12) {
	case 0:
		svc.Labels = map[string]string{labelServiceProxyName: "x"}
	case 1:
		svc.Spec.Type = corev1.ServiceTypeExternalName
	case 2:
		svc.Spec.Type = corev1.ServiceTypeNodePort
	case 3:
		svc.Namespace = "shop"
	}
	return svc
}

func randomSlice(c choices) *discoveryv1.EndpointSlice {
	slice := newSlice(pick(c, "s1", "s2", "s3", "s4", "s5"), pick(c, "a", "b", "c", "d", "nobody", ""), nil)
	ips := []string{"10.0.0.1", "10.0.0.2", "10.0.0.03", "127.0.0.1"}
	if c.IntN(3) == 0 {
		slice.AddressType = discoveryv1.AddressTypeIPv6
		ips = []string{"fd01::1", "fd01:0::2", "::ffff:10.0.0.1"}
	}
	for range c.IntN(5) {
		ep := eps(pick(c, ips...))[0]
		if c.IntN(4) == 0 {
			ep.Conditions.Ready = new(c.IntN(2) == 0)
			ep.Conditions.Serving = new(c.IntN(2) == 0)
			ep.Conditions.Terminating = new(c.IntN(2) == 0)
		}
		if c.IntN(2) == 0 {
			ep.NodeName = new(pick(c, "here", "there"))
		}
		slice.Endpoints = append(slice.Endpoints, ep)
	}
	slice.Ports = nil
	for range c.IntN(4) {
		slice.Ports = append(slice.Ports,
			slicePort(pick(c, "", "p", "q"), pick(c, corev1.ProtocolTCP, corev1.ProtocolUDP), pick[int32](c, 8080, 8081, 0)))
	}
	if c.IntN(10) == 0 {
		slice.Labels[corev1.IsHeadlessService] = ""
	}
	if c.IntN(10) == 0 {
		slice.Namespace = "shop"
	}
	return slice
}

// step makes a random Delta and carries it out on the world.
func (w *world) step(c choices) Delta {
	var d Delta
	for range 1 + c.IntN(3) {
		switch c.IntN(5) {
		case 0, 1:
			svc := randomService(c)
			d.Services = append(d.Services, svc)
		case 2, 3:
			d.EndpointSlices = append(d.EndpointSlices, randomSlice(c))
		case 4:
			d.DeletedServices = append(d.DeletedServices, named(pick(c, "a", "b", "c", "d")))
			d.DeletedEndpointSlices = append(d.DeletedEndpointSlices, named(pick(c, "s1", "s2", "s3", "s4", "s5")))
		}
	}
	for _, name := range d.DeletedServices {
		delete(w.services, name)
	}
	for _, name := range d.DeletedEndpointSlices {
		delete(w.slices, name)
	}
	for _, svc := range d.Services {
		w.services[types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}] = svc
	}
	for _, slice := range d.EndpointSlices {
		w.slices[types.NamespacedName{Namespace: slice.Namespace, Name: slice.Name}] = slice
	}
	return d
}

// compute says from scratch, the naive way, what the node must have.
func (w *world) compute() map[dataplane.Key]*dataplane.Service {
	all := slices.SortedFunc(maps.Values(w.services), func(a, b *corev1.Service) int {
		if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
			return c
		}
		return compareNames(types.NamespacedName{Namespace: a.Namespace, Name: a.Name}, types.NamespacedName{Namespace: b.Namespace, Name: b.Name})
	})
	taken := map[dataplane.Frontend]bool{}
	out := map[dataplane.Key]*dataplane.Service{}
	for _, svc := range all {
		mine := map[string]*discoveryv1.EndpointSlice{}
		for _, slice := range w.slices {
			if _, headless := slice.Labels[corev1.IsHeadlessService]; !headless &&
				slice.Namespace == svc.Namespace && slice.Labels[discoveryv1.LabelServiceName] == svc.Name {
				mine[slice.Name] = slice
			}
		}
		wants, _ := convert(svc, mine, "here")
		for _, want := range wants {
			if taken[want.frontend] {
				continue
			}
			taken[want.frontend] = true
			s, err := dataplane.NewService(want.key, []dataplane.Frontend{want.frontend}, dataplane.Treatment{Endpoints: slices.Collect(naiveEndpoints(want, mine))})
			if err != nil {
				panic(err)
			}
			out[want.key] = s
		}
	}
	return out
}

// naiveEndpoints is the specification of the choice of endpoints in another
// form: for each address, ask whether any slice says what would make it count.
func naiveEndpoints(want wanted, mine map[string]*discoveryv1.EndpointSlice) func(func(dataplane.Endpoint) bool) {
	type entry struct{ ready, serving, terminating, local bool }
	entries := map[dataplane.Endpoint][]entry{}
	for _, slice := range mine {
		if string(slice.AddressType) != want.key.Family.String() {
			continue
		}
		for _, p := range slice.Ports {
			if *p.Name != want.key.Port || string(*p.Protocol) != want.frontend.Protocol.String() || *p.Port == 0 {
				continue
			}
			for _, ep := range slice.Endpoints {
				addr, err := parseAddr(ep.Addresses[0])
				if err != nil || addr.IsLoopback() {
					continue
				}
				key := dataplane.Endpoint{Addr: addrPort(addr, *p.Port)}
				entries[key] = append(entries[key], entry{
					ready:       ep.Conditions.Ready == nil || *ep.Conditions.Ready,
					serving:     ep.Conditions.Serving == nil || *ep.Conditions.Serving,
					terminating: ep.Conditions.Terminating != nil && *ep.Conditions.Terminating,
					local:       ep.NodeName == nil || *ep.NodeName == "here",
				})
			}
		}
	}
	ready, draining := map[dataplane.Endpoint]bool{}, map[dataplane.Endpoint]bool{}
	for key, list := range entries {
		// narrow keeps those that satisfy, unless none does.
		narrow := func(satisfies func(entry) bool) {
			if some := slices.DeleteFunc(slices.Clone(list), func(e entry) bool { return !satisfies(e) }); len(some) > 0 {
				list = some
			}
		}
		narrow(func(e entry) bool { return !e.terminating })
		narrow(func(e entry) bool { return e.ready })
		narrow(func(e entry) bool { return e.serving })
		narrow(func(e entry) bool { return e.local })
		key.Local = list[0].local
		switch {
		case list[0].ready:
			ready[key] = true
		case list[0].serving && list[0].terminating:
			draining[key] = true
		}
	}
	if len(ready) > 0 {
		return maps.Keys(ready)
	}
	return maps.Keys(draining)
}

// run plays a history and compares, after every step, what the Results add up
// to with a computation from scratch, and the Tracker's own memory with that of
// a new Tracker that is given everything at once.
func run(t *testing.T, c choices, steps int) {
	t.Helper()
	w := world{services: map[types.NamespacedName]*corev1.Service{}, slices: map[types.NamespacedName]*discoveryv1.EndpointSlice{}}
	tracker := NewTracker(Options{NodeName: "here"})
	got := map[dataplane.Key]*dataplane.Service{}
	var history string
	for step := range steps {
		d := w.step(c)
		result := tracker.Apply(d)
		for key, svc := range result.Changes {
			if svc.Equal(got[key]) {
				t.Fatalf("step %d: %s is named as changed, but is not: %s", step, key, text(svc))
			}
			if svc == nil {
				delete(got, key)
			} else {
				got[key] = svc
			}
		}
		want := w.compute()
		if diff := cmp.Diff(texts(want), texts(got)); diff != "" {
			t.Fatalf("step %d (-scratch +incremental):\n%s\nhistory:%s", step, diff, history)
		}
		fresh := NewTracker(Options{NodeName: "here"})
		fresh.Apply(Delta{Services: slices.Collect(maps.Values(w.services)), EndpointSlices: slices.Collect(maps.Values(w.slices))})
		if diff := cmp.Diff(memory(fresh), memory(tracker)); diff != "" {
			t.Fatalf("step %d: memory (-fresh +incremental):\n%s\nhistory:%s", step, diff, history)
		}
		if testing.Verbose() {
			history += fmt.Sprintf("\n%d: %+v", step, result.Changes)
		}
	}
}

// memory writes what a Tracker remembers: problems, claims, and names, so that
// nothing of deleted objects stays behind.
func memory(t *Tracker) map[string][]string {
	out := map[string][]string{}
	for name, s := range t.services {
		out["service"] = append(out["service"], name.String())
		for _, p := range s.known() {
			out["problem"] = append(out["problem"], p.String())
		}
	}
	for name, owner := range t.owner {
		out["slice"] = append(out["slice"], name.String()+" of "+owner.String())
	}
	for f, claims := range t.claims {
		for _, c := range claims {
			out["claims of "+f.String()] = append(out["claims of "+f.String()], fmt.Sprint(c))
		}
	}
	for _, name := range []string{"service", "problem", "slice"} {
		slices.Sort(out[name])
	}
	return out
}

func TestRandomHistories(t *testing.T) {
	t.Parallel()
	histories := 600
	if testing.Short() {
		histories = 60
	}
	for seed := range histories {
		run(t, rand.New(rand.NewPCG(uint64(seed), 1)), 40)
	}
}

func FuzzTracker(f *testing.F) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 2))
		data := make([]byte, 400)
		for i := range data {
			data[i] = byte(r.IntN(256))
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 2000 {
			return
		}
		c := &bytesChoices{data: data}
		run(t, c, 1+len(data)/20)
	})
}
