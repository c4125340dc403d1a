package kube

import (
	"fmt"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// resolveAll resolves the dirty Services, and all Services that claim a frontend whose owner
// changes as a result. It adds the differences to result.
func (t *Tracker) resolveAll(dirty []*service, result *Result) {
	if len(dirty) > linearSearchMax {
		result.Changes = make(map[dataplane.Key]*dataplane.Service, len(dirty))
	}
	desired := make([]desiredState, 0, len(dirty))
	for _, s := range dirty {
		desired = append(desired, t.updateClaims(s))
	}
	var affected []*service
	t.claims.drainChanged(func(s *service) {
		s.claimsChangedRound = t.round
		if s.dirtyRound != t.round {
			s.dirtyRound = t.round
			affected = append(affected, s)
		}
	})
	for i, s := range dirty {
		t.resolve(s, desired[i], result)
	}
	for _, s := range affected {
		// Its claims are unchanged, so no other owner changes.
		t.resolve(s, convert(s.object.expand(&t.expanded), s.slices, t.location, t.opts), result)
	}
	slices.SortFunc(result.Problems, Problem.Compare)
}

// updateClaims computes the desired state of s and replaces its claims.
func (t *Tracker) updateClaims(s *service) desiredState {
	d := convert(s.object.expand(&t.expanded), s.slices, t.location, t.opts)
	created := int64(0)
	if s.object != nil {
		created = s.object.createdUnix
	}
	if d.zoneDependent {
		t.zoneDependent[s] = struct{}{}
	} else {
		delete(t.zoneDependent, s)
	}
	t.indexClusterIPs(s, d.clusterIPs)
	if created == s.createdUnix && slices.EqualFunc(d.services, s.portClaims, func(ds desiredService, c portClaims) bool { return ds.portClaims().equal(c) }) {
		return d
	}
	s.claimsChangedRound = t.round
	for _, c := range s.portClaims {
		for _, f := range c.frontends {
			t.claims.remove(f, claim{service: s, port: c.port, kind: c.kind})
		}
	}
	s.createdUnix = created
	s.portClaims = make([]portClaims, 0, len(d.services))
	for i := range d.services {
		c := d.services[i].portClaims()
		s.portClaims = append(s.portClaims, c)
		for _, f := range c.frontends {
			t.claims.add(f, claim{service: s, port: c.port, kind: c.kind})
		}
	}
	return d
}

// indexClusterIPs updates the index of Services by cluster IP.
func (t *Tracker) indexClusterIPs(s *service, clusterIPs []netip.Addr) {
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

func (ds *desiredService) portClaims() portClaims {
	return portClaims{port: ds.port, kind: ds.key.Kind, frontends: ds.frontends}
}

// resolve determines the dataplane Services of s from the owners of its frontends, and adds the
// differences to result.
func (t *Tracker) resolve(s *service, d desiredState, result *Result) {
	problems := s.confirmUnmatched(d.unmatchedPorts, d.problems)
	programmed := make([]*dataplane.Service, len(d.services))
	checkOwners := s.hasConflict || s.claimsChangedRound == t.round
	s.hasConflict = false
	var lost conflicts
	before := lookupByKey(s.programmed)
	for i := range d.services {
		ds := &d.services[i]
		frontends := ds.frontends
		if checkOwners {
			frontends = t.ownedFrontends(s, ds, &lost)
		}
		if len(frontends) == 0 {
			continue
		}
		svc, err := s.shareLists(ds, i, before).build(frontends, before(ds.key, i))
		if err != nil {
			problems = append(problems, Problem{
				Service: s.name, UID: s.object.uid,
				Field:   elementPath("spec.ports", ds.port, ""),
				Message: fmt.Sprintf("not served: %v", err),
			})
			continue
		}
		programmed[i] = svc
	}
	if len(lost.all) > 0 {
		s.hasConflict = true
		problems = append(problems, lost.problems(s)...)
	}
	now := lookupByKey(programmed)
	for i, svc := range programmed {
		if svc != nil && svc != before(svc.Key, i) {
			result.addChange(svc.Key, svc)
		}
	}
	for i, old := range s.programmed {
		if old != nil && now(old.Key, i) == nil {
			result.addChange(old.Key, nil)
		}
	}
	s.programmed = programmed
	s.updateProblems(problems, result)
	if s.healthCheck != d.healthCheck {
		s.healthCheck = d.healthCheck
		result.addHealthCheck(s.name, d.healthCheck)
	}
	if s.object == nil && len(s.slices) == 0 {
		delete(t.services, s.name)
	}
}

// confirmUnmatched appends a problem for each port that is missing in all slices. It skips ports
// whose slice may not have arrived yet, because the controller writes it after the Service.
func (s *service) confirmUnmatched(ports []unmatchedPort, problems []Problem) []Problem {
	before := s.unmatchedPorts
	s.unmatchedPorts = nil
	for _, u := range ports {
		if s.slicesRound >= s.portsChangedRound || slices.Contains(before, u.port) {
			s.unmatchedPorts = append(s.unmatchedPorts, u.port)
			problems = append(problems, u.problem)
		}
	}
	return problems
}

// ownedFrontends returns the frontends of ds that s owns, and adds the others to lost.
func (t *Tracker) ownedFrontends(s *service, ds *desiredService, lost *conflicts) []dataplane.Frontend {
	own := claim{service: s, port: ds.port, kind: ds.key.Kind}
	n := 0
	for _, f := range ds.frontends {
		if owner := t.claims.owners[f]; owner == own {
			n++
		} else {
			lost.add(ds, f, owner)
		}
	}
	if n == len(ds.frontends) || n == 0 {
		return ds.frontends[:n]
	}
	kept := make([]dataplane.Frontend, 0, n)
	for _, f := range ds.frontends {
		if t.claims.owners[f] == own {
			kept = append(kept, f)
		}
	}
	return kept
}

// build returns the dataplane Service of ds with the given frontends, or old if it is equal.
func (ds *desiredService) build(frontends []dataplane.Frontend, old *dataplane.Service) (*dataplane.Service, error) {
	// The lists are sorted, so this equals the result of NewService.
	if same := (dataplane.Service{Key: ds.key, Frontends: frontends, ServiceSpec: ds.spec, Serving: ds.serving}); same.Equal(old) {
		return old, nil
	}
	svc, err := dataplane.NewService(ds.key, frontends, ds.spec)
	if err != nil || len(ds.serving) == 0 {
		return svc, err
	}
	return svc.WithServing(ds.serving)
}

// shareLists replaces the lists of ds, the i-th desired Service, with equal lists of the same
// port, so that each is in memory once.
func (s *service) shareLists(ds *desiredService, i int, before func(dataplane.Key, int) *dataplane.Service) *desiredService {
	var others [len(allKinds{})]*dataplane.Service
	for n, kind := range kinds() {
		key := ds.key
		key.Kind = kind
		others[n] = before(key, i)
	}
	shared := func(list []dataplane.Endpoint) []dataplane.Endpoint {
		if len(list) == 0 {
			return nil
		}
		if old := before(ds.key, i); old != nil && slices.Equal(old.Endpoints, list) {
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
	ds.spec.Endpoints = shared(ds.spec.Endpoints)
	ds.spec.LocalEndpoints = shared(ds.spec.LocalEndpoints)
	if len(ds.serving) > 0 {
		for _, old := range others {
			if old != nil && slices.Equal(old.Serving, ds.serving) {
				ds.serving = old.Serving
				break
			}
		}
	}
	return ds
}

// maxProblems is the maximum number of problems of a Service that are reported individually.
const maxProblems = 20

// updateProblems replaces the problems of s and adds the new ones to result.
func (s *service) updateProblems(problems []Problem, result *Result) {
	slices.SortFunc(problems, Problem.Compare)
	problems = slices.Compact(problems)
	if n := len(problems) - maxProblems; n > 0 {
		problems = append(slices.Clone(problems[:maxProblems]), Problem{
			Service: s.name, UID: problems[0].UID, Field: "spec",
			Message: fmt.Sprintf("and %d more problems, which are reported when others are fixed", n),
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

func (r *Result) addChange(key dataplane.Key, svc *dataplane.Service) {
	if r.Changes == nil {
		r.Changes = map[dataplane.Key]*dataplane.Service{}
	}
	r.Changes[key] = svc
}

func (r *Result) addHealthCheck(name types.NamespacedName, check HealthCheck) {
	if r.HealthChecks == nil {
		r.HealthChecks = map[types.NamespacedName]*HealthCheck{}
	}
	if check.Port == 0 {
		r.HealthChecks[name] = nil
		return
	}
	r.HealthChecks[name] = &check
}

// lookupByKey returns a function that finds the Service of a key, which is most likely at index
// i.
func lookupByKey(services []*dataplane.Service) func(key dataplane.Key, i int) *dataplane.Service {
	var all map[dataplane.Key]*dataplane.Service
	return func(key dataplane.Key, i int) *dataplane.Service {
		if i < len(services) && services[i] != nil && services[i].Key == key {
			return services[i]
		}
		if len(services) <= linearSearchMax*len(allKinds{}) {
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
