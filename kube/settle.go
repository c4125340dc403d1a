package kube

import (
	"fmt"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// settleAll works out again the Services that were touched, and those whose
// frontends change hands by that, and adds the differences to result.
func (t *Tracker) settleAll(touched []*service, result *Result) {
	demands := make([]demand, 0, len(touched))
	for _, s := range touched {
		demands = append(demands, t.demand(s))
	}
	var others []*service
	t.claims.changed(func(s *service) {
		s.disputed = t.round
		if s.touched != t.round {
			s.touched = t.round
			others = append(others, s)
		}
	})
	for i, s := range touched {
		t.settle(s, demands[i], result)
	}
	for _, s := range others {
		// It claims what it claimed before, so nothing changes hands by this.
		t.settle(s, convert(s.object, s.slices, t.here, t.opts.Schedulers), result)
	}
	slices.SortFunc(result.Problems, Problem.Compare)
}

// demand works out what s asks for, and moves its claims.
func (t *Tracker) demand(s *service) demand {
	d := convert(s.object, s.slices, t.here, t.opts.Schedulers)
	created := int64(0)
	if s.object != nil {
		created = s.object.CreationTimestamp.Unix()
	}
	if d.zoned {
		t.zoned[s] = struct{}{}
	} else {
		delete(t.zoned, s)
	}
	t.index(s, d.clusterIPs)
	if created == s.created && slices.EqualFunc(d.wants, s.claimed, func(w wanted, c claimed) bool { return w.claimed().equal(c) }) {
		return d
	}
	s.disputed = t.round
	for _, c := range s.claimed {
		for _, f := range c.frontends {
			t.claims.remove(f, claim{service: s, port: c.port, kind: c.kind})
		}
	}
	s.created = created
	s.claimed = make([]claimed, 0, len(d.wants))
	for i := range d.wants {
		c := d.wants[i].claimed()
		s.claimed = append(s.claimed, c)
		for _, f := range c.frontends {
			t.claims.add(f, claim{service: s, port: c.port, kind: c.kind})
		}
	}
	return d
}

// index notes the cluster IPs of s.
func (t *Tracker) index(s *service, clusterIPs []netip.Addr) {
	if slices.Equal(s.clusterIPs, clusterIPs) {
		return
	}
	for _, addr := range s.clusterIPs {
		rest := slices.DeleteFunc(t.byClusterIP[addr], func(o *service) bool { return o == s })
		if len(rest) == 0 {
			delete(t.byClusterIP, addr)
		} else {
			t.byClusterIP[addr] = rest
		}
	}
	for _, addr := range clusterIPs {
		t.byClusterIP[addr] = append(t.byClusterIP[addr], s)
	}
	s.clusterIPs = clusterIPs
}

func (w *wanted) claimed() claimed {
	return claimed{port: w.port, kind: w.key.Kind, frontends: w.frontends}
}

// settle decides what of s is programmed, now that it is known who owns which
// frontend, and adds the difference to result.
func (t *Tracker) settle(s *service, d demand, result *Result) {
	problems := s.lasting(d.unmatched, d.problems)
	programmed := make([]*dataplane.Service, len(d.wants))
	disputed := s.loses || s.disputed == t.round
	s.loses = false
	var lost collisions
	programmedBefore := byKey(s.programmed)
	for i := range d.wants {
		w := &d.wants[i]
		frontends := w.frontends
		if disputed {
			frontends = t.granted(s, w, &lost)
		}
		if len(frontends) == 0 {
			continue
		}
		svc, err := s.share(w, i, programmedBefore).programmed(frontends, programmedBefore(w.key, i))
		if err != nil {
			problems = append(problems, Problem{
				Service: s.name, UID: s.object.UID,
				Field:   index("spec.ports", w.port, ""),
				Message: fmt.Sprintf("not served: %v", err),
			})
			continue
		}
		programmed[i] = svc
	}
	if len(lost.all) > 0 {
		s.loses = true
		problems = append(problems, lost.problems(s)...)
	}
	programmedNow := byKey(programmed)
	for i, svc := range programmed {
		if svc != nil && svc != programmedBefore(svc.Key, i) {
			result.change(svc.Key, svc)
		}
	}
	for i, old := range s.programmed {
		if old != nil && programmedNow(old.Key, i) == nil {
			result.change(old.Key, nil)
		}
	}
	s.programmed = programmed
	s.report(problems, result)
	if s.check != d.check {
		s.check = d.check
		result.check(s.name, d.check)
	}
	if s.object == nil && len(s.slices) == 0 {
		delete(t.services, s.name)
	}
}

// lasting appends to problems the ports that no slice knows, but for those for
// which a slice may still be on its way: the controller writes it because of the
// Service, and so after it.
func (s *service) lasting(ports []unmatched, problems []Problem) []Problem {
	before := s.unmatched
	s.unmatched = nil
	for _, u := range ports {
		if s.slicesCame >= s.portsChanged || slices.Contains(before, u.port) {
			s.unmatched = append(s.unmatched, u.port)
			problems = append(problems, u.problem)
		}
	}
	return problems
}

// granted returns the frontends of w that s owns, and notes the others.
func (t *Tracker) granted(s *service, w *wanted, lost *collisions) []dataplane.Frontend {
	mine := claim{service: s, port: w.port, kind: w.key.Kind}
	n := 0
	for _, f := range w.frontends {
		if owner := t.claims.owners[f]; owner == mine {
			n++
		} else {
			lost.add(w, f, owner)
		}
	}
	if n == len(w.frontends) || n == 0 {
		return w.frontends[:n]
	}
	kept := make([]dataplane.Frontend, 0, n)
	for _, f := range w.frontends {
		if t.claims.owners[f] == mine {
			kept = append(kept, f)
		}
	}
	return kept
}

// programmed returns the Service that w makes with the frontends that it has
// got: old, if it is equal.
func (w *wanted) programmed(frontends []dataplane.Frontend, old *dataplane.Service) (*dataplane.Service, error) {
	// The lists are in order, so that this is what NewService would return.
	if same := (dataplane.Service{Key: w.key, Frontends: frontends, Treatment: w.treatment, Serving: w.serving}); same.Equal(old) {
		return old, nil
	}
	svc, err := dataplane.NewService(w.key, frontends, w.treatment)
	if err != nil || len(w.serving) == 0 {
		return svc, err
	}
	return svc.WithServing(w.serving)
}

// share replaces the lists of w, which is the i-th want, by equal ones that
// something of the port has already, so that each is in memory once.
func (s *service) share(w *wanted, i int, before func(dataplane.Key, int) *dataplane.Service) *wanted {
	var others [len(allKinds{})]*dataplane.Service
	for n, kind := range kinds() {
		key := w.key
		key.Kind = kind
		others[n] = before(key, i)
	}
	shared := func(list []dataplane.Endpoint) []dataplane.Endpoint {
		if len(list) == 0 {
			return nil
		}
		if old := before(w.key, i); old != nil && slices.Equal(old.Endpoints, list) {
			return old.Endpoints
		}
		for _, old := range others {
			switch {
			case old == nil:
			case slices.Equal(old.Endpoints, list):
				return old.Endpoints
			case slices.Equal(old.LocalEndpoints, list):
				return old.LocalEndpoints
			}
		}
		return list
	}
	w.treatment.Endpoints = shared(w.treatment.Endpoints)
	w.treatment.LocalEndpoints = shared(w.treatment.LocalEndpoints)
	if len(w.serving) > 0 {
		for _, old := range others {
			if old != nil && slices.Equal(old.Serving, w.serving) {
				w.serving = old.Serving
				break
			}
		}
	}
	return w
}

// maxProblems is how many problems of a Service are named.
const maxProblems = 20

// report replaces the problems of s and adds those that it had not before to
// result.
func (s *service) report(problems []Problem, result *Result) {
	slices.SortFunc(problems, Problem.Compare)
	problems = slices.Compact(problems)
	if n := len(problems) - maxProblems; n > 0 {
		problems = append(slices.Clone(problems[:maxProblems]), Problem{
			Service: s.name, UID: problems[0].UID, Field: "spec",
			Message: fmt.Sprintf("and %d more problems: they are named when some of the others are solved", n),
		})
		slices.SortFunc(problems, Problem.Compare)
	}
	for _, p := range problems {
		if _, ok := slices.BinarySearchFunc(s.problems, p, Problem.Compare); !ok {
			result.Problems = append(result.Problems, p)
		}
	}
	s.problems = problems
}

func (r *Result) change(key dataplane.Key, svc *dataplane.Service) {
	if r.Changes == nil {
		r.Changes = map[dataplane.Key]*dataplane.Service{}
	}
	r.Changes[key] = svc
}

func (r *Result) check(name types.NamespacedName, check HealthCheck) {
	if r.HealthChecks == nil {
		r.HealthChecks = map[types.NamespacedName]*HealthCheck{}
	}
	if check.Port == 0 {
		r.HealthChecks[name] = nil
		return
	}
	r.HealthChecks[name] = &check
}

// byKey returns a function that finds the Service of a key, which most likely is
// at index i.
func byKey(services []*dataplane.Service) func(key dataplane.Key, i int) *dataplane.Service {
	var all map[dataplane.Key]*dataplane.Service
	return func(key dataplane.Key, i int) *dataplane.Service {
		if i < len(services) && services[i] != nil && services[i].Key == key {
			return services[i]
		}
		if len(services) <= few*len(allKinds{}) {
			for _, s := range services {
				if s != nil && s.Key == key {
					return s
				}
			}
			return nil
		}
		if all == nil {
			all = make(map[dataplane.Key]*dataplane.Service, len(services))
			for _, s := range services {
				if s != nil {
					all[s.Key] = s
				}
			}
		}
		return all[key]
	}
}
