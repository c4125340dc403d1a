package kube

import (
	"cmp"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead/dataplane"
)

// Options are the settings of a [Tracker].
type Options struct {
	// NodeName is the name of this node as endpoints carry it in nodeName. It
	// decides [dataplane.Endpoint.Local]. If it is empty, only endpoints
	// without a node are local.
	NodeName string
	// MasqueradeAll makes every client of a cluster IP masqueraded.
	MasqueradeAll bool
	// DetectLocal says which clients are pods.
	DetectLocal DetectLocal
	// NodePortAddresses says where node ports are served.
	NodePortAddresses NodePortAddresses
}

// Result is what a [Delta] changes.
type Result struct {
	// Changes holds the new value of each key whose value changed, nil if the
	// key is gone. Equal values are no change.
	Changes map[dataplane.Key]*dataplane.Service
	// Problems are those that this Delta brought up, sorted. A problem that
	// persists is not named again, unless it went away in between.
	Problems []Problem
	// Node is what the dataplane must know of the node, if that has changed,
	// and nil otherwise. The first Result has it.
	Node *dataplane.Node
	// NodeHealth is what the node's health depends on, if that has changed.
	NodeHealth *NodeHealth
	// HealthChecks holds the health-check node ports that are new or have
	// changed, by Service, and nil for those that are gone.
	HealthChecks map[types.NamespacedName]*HealthCheck
}

// Tracker keeps Services and EndpointSlices by name and computes what this node
// must have, incrementally: a [Delta] costs work for the Services it touches,
// directly or through their EndpointSlices, and for those that collide with
// them. It never walks all Services.
//
// A Tracker is not safe for concurrent use.
type Tracker struct {
	nodeName string
	services map[types.NamespacedName]*service
	// owner has the Service of each slice that belongs to one.
	owner map[types.NamespacedName]types.NamespacedName
	// claims has everyone who wants a frontend, the owner first.
	claims map[dataplane.Frontend][]claim
}

// service is what the Tracker knows under the name of a Service: the Service,
// its slices, or both.
type service struct {
	object *corev1.Service
	slices map[string]*discoveryv1.EndpointSlice
	// wants is what convert made of object and slices, and created the creation
	// time that the claims for it were made with.
	wants   []wanted
	created int64
	// problems of the objects, and those of collisions.
	problems, collisions []Problem
	// programmed is what the last Result left in place for each of wants: nil
	// for one that lost its frontend.
	programmed []*dataplane.Service
}

// known returns all problems of s, sorted.
func (s *service) known() []Problem {
	if len(s.problems)+len(s.collisions) == 0 {
		return nil
	}
	known := slices.Concat(s.problems, s.collisions)
	slices.SortFunc(known, Problem.Compare)
	return known
}

// claim is the wish of a Service port for a frontend.
type claim struct {
	// created is the Service's creation time in seconds, which is the precision
	// of the API. A Service without one counts as the oldest.
	created int64
	service types.NamespacedName
	// port is the index in spec.ports.
	port int
}

// compare orders claims by precedence: the owner first.
func (c claim) compare(o claim) int {
	return cmp.Or(
		cmp.Compare(c.created, o.created),
		compareNames(c.service, o.service),
		cmp.Compare(c.port, o.port),
	)
}

// NewTracker returns a Tracker that knows no objects.
func NewTracker(opts Options) *Tracker {
	return &Tracker{
		nodeName: opts.NodeName,
		services: map[types.NamespacedName]*service{},
		owner:    map[types.NamespacedName]types.NamespacedName{},
		claims:   map[dataplane.Frontend][]claim{},
	}
}

// Apply takes over the objects of d and returns what they change. Within one
// Delta deletions come first: an object that is deleted and delivered is there.
// Objects may be delivered again without having changed, and objects may be
// deleted that were never there.
func (t *Tracker) Apply(d Delta) Result {
	dirty := t.take(d)
	affected := t.reconvert(dirty)
	var result Result
	for name, before := range affected {
		t.settle(name, before, &result)
	}
	slices.SortFunc(result.Problems, Problem.Compare)
	return result
}

// take stores the objects of d and returns the names of the Services they touch.
func (t *Tracker) take(d Delta) map[types.NamespacedName]struct{} {
	dirty := map[types.NamespacedName]struct{}{}
	for _, name := range d.DeletedServices {
		if s, ok := t.services[name]; ok {
			s.object = nil
			dirty[name] = struct{}{}
		}
	}
	for _, name := range d.DeletedEndpointSlices {
		t.dropSlice(name, dirty)
	}
	for _, object := range d.Services {
		name := types.NamespacedName{Namespace: object.Namespace, Name: object.Name}
		t.service(name).object = object
		dirty[name] = struct{}{}
	}
	for _, slice := range d.EndpointSlices {
		name := types.NamespacedName{Namespace: slice.Namespace, Name: slice.Name}
		owner, ok := serviceOf(slice)
		if was, had := t.owner[name]; had && (!ok || was != owner) {
			t.dropSlice(name, dirty)
		}
		if !ok {
			continue
		}
		s := t.service(owner)
		if s.slices == nil {
			s.slices = map[string]*discoveryv1.EndpointSlice{}
		}
		s.slices[slice.Name] = slice
		t.owner[name] = owner
		dirty[owner] = struct{}{}
	}
	return dirty
}

func (t *Tracker) service(name types.NamespacedName) *service {
	s, ok := t.services[name]
	if !ok {
		s = &service{}
		t.services[name] = s
	}
	return s
}

func (t *Tracker) dropSlice(name types.NamespacedName, dirty map[types.NamespacedName]struct{}) {
	owner, ok := t.owner[name]
	if !ok {
		return
	}
	delete(t.owner, name)
	delete(t.services[owner].slices, name.Name)
	dirty[owner] = struct{}{}
}

// reconvert computes the dirty Services anew and moves their claims. It returns
// the Services whose programming may change, with the problems they had before.
func (t *Tracker) reconvert(dirty map[types.NamespacedName]struct{}) map[types.NamespacedName][]Problem {
	affected := make(map[types.NamespacedName][]Problem, len(dirty))
	// owners has, for the frontends with a change of claims, who owned them
	// before: the zero claim for nobody.
	owners := map[dataplane.Frontend]claim{}
	for name := range dirty {
		s := t.services[name]
		affected[name] = s.known()
		wants, created := s.wants, s.created
		s.wants, s.problems = convert(s.object, s.slices, t.nodeName)
		s.created = 0
		if s.object != nil {
			s.created = s.object.CreationTimestamp.Unix()
		}
		if created == s.created && slices.EqualFunc(wants, s.wants, wanted.sameClaim) {
			continue
		}
		for i := range wants {
			t.unclaim(wants[i].frontend, claim{created, name, wants[i].port}, owners)
		}
		for i := range s.wants {
			t.claim(s.wants[i].frontend, claim{s.created, name, s.wants[i].port}, owners)
		}
	}
	for frontend, before := range owners {
		claims := t.claims[frontend]
		if len(claims) == 0 || claims[0] == before {
			continue
		}
		for _, c := range claims {
			if _, ok := affected[c.service]; !ok {
				affected[c.service] = t.services[c.service].known()
			}
		}
	}
	return affected
}

func (t *Tracker) claim(f dataplane.Frontend, c claim, owners map[dataplane.Frontend]claim) {
	claims := t.remember(f, owners)
	i, _ := slices.BinarySearchFunc(claims, c, claim.compare)
	t.claims[f] = slices.Insert(claims, i, c)
}

func (t *Tracker) unclaim(f dataplane.Frontend, c claim, owners map[dataplane.Frontend]claim) {
	claims := t.remember(f, owners)
	if i, ok := slices.BinarySearchFunc(claims, c, claim.compare); ok {
		claims = slices.Delete(claims, i, i+1)
	}
	if len(claims) == 0 {
		delete(t.claims, f)
		return
	}
	t.claims[f] = claims
}

// remember notes the owner of f in owners if this is the first change of f, and
// returns the claims for f.
func (t *Tracker) remember(f dataplane.Frontend, owners map[dataplane.Frontend]claim) []claim {
	claims := t.claims[f]
	if _, ok := owners[f]; !ok {
		var owner claim
		if len(claims) > 0 {
			owner = claims[0]
		}
		owners[f] = owner
	}
	return claims
}

// settle decides what of the named Service is programmed, now that it is known
// who owns which frontend, and adds the difference to result. before has the
// problems the Service had, sorted.
func (t *Tracker) settle(name types.NamespacedName, before []Problem, result *Result) {
	s := t.services[name]
	s.collisions = nil
	programmed := make([]*dataplane.Service, len(s.wants))
	for i := range s.wants {
		w := &s.wants[i]
		if owner := t.claims[w.frontend][0]; owner.service != name || owner.port != w.port {
			s.collisions = append(s.collisions, t.collision(name, w, owner))
			continue
		}
		old := find(s.programmed, w.key, i)
		svc, err := dataplane.NewService(w.key, []dataplane.Frontend{w.frontend}, dataplane.Treatment{Endpoints: slices.Clone(w.endpoints)})
		switch {
		case err != nil:
			s.collisions = append(s.collisions, Problem{
				Service: name,
				Field:   fmt.Sprintf("spec.ports[%d]", w.port),
				Message: fmt.Sprintf("not served: %v", err),
			})
			continue
		case svc.Equal(old):
			svc = old
		default:
			result.change(w.key, svc)
		}
		programmed[i] = svc
		w.endpoints = svc.Endpoints // so that there is one copy
	}
	for i, old := range s.programmed {
		if old != nil && find(programmed, old.Key, i) == nil {
			result.change(old.Key, nil)
		}
	}
	s.programmed = programmed
	for _, p := range s.known() {
		if _, ok := slices.BinarySearchFunc(before, p, Problem.Compare); !ok {
			result.Problems = append(result.Problems, p)
		}
	}
	if s.object == nil && len(s.slices) == 0 {
		delete(t.services, name)
	}
}

func (t *Tracker) collision(name types.NamespacedName, w *wanted, owner claim) Problem {
	if owner.service == name {
		return Problem{
			Service: name,
			Field:   fmt.Sprintf("spec.ports[%d].port", w.port),
			Message: fmt.Sprintf("%s is already port %q of this Service: use another port",
				w.frontend, t.services[name].object.Spec.Ports[owner.port].Name),
		}
	}
	return Problem{
		Service: name,
		Field:   "spec.clusterIP",
		Message: fmt.Sprintf("%s belongs to Service %s, so connections go there: give one of them another cluster IP or port",
			w.frontend, owner.service),
	}
}

func (r *Result) change(key dataplane.Key, svc *dataplane.Service) {
	if r.Changes == nil {
		r.Changes = map[dataplane.Key]*dataplane.Service{}
	}
	r.Changes[key] = svc
}

// find returns the Service of a key, which most likely is at index i.
func find(services []*dataplane.Service, key dataplane.Key, i int) *dataplane.Service {
	if i < len(services) && services[i] != nil && services[i].Key == key {
		return services[i]
	}
	for _, s := range services {
		if s != nil && s.Key == key {
			return s
		}
	}
	return nil
}
