// Package compare compares the state that the kernel holds with the desired state of this node. It
// reads the kernel and writes nothing.
package compare

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/kube"
)

// Options are the options of [Kernel].
type Options struct {
	Backend backend.Backend
	// Values holds the values of the backend's flags.
	Values backend.Values
	Node   dataplane.Node
	// Services has the desired Services, sorted by key.
	Services []*dataplane.Service
	// Explain, if not nil, explains a Service.
	Explain func(namespace, name string) kube.Explanation
	Logger  *slog.Logger
}

// Report lists the differences between the kernel and the desired state.
type Report struct {
	Mode string `json:"mode"`
	// DesiredPorts is the number of desired ports of Services, and DesiredFrontends the number of
	// their frontends. ProgrammedFrontends is the number of frontends in the kernel.
	DesiredPorts        int `json:"desiredPorts"`
	DesiredFrontends    int `json:"desiredFrontends"`
	ProgrammedFrontends int `json:"programmedFrontends"`
	// Services lists the differing Services by name.
	Services []Service `json:"services,omitempty"`
	// Objects lists the differing objects that do not belong to one Service.
	Objects []dataplane.Difference `json:"objects,omitempty"`
	// Unsupported lists the Services that the backend cannot program.
	Unsupported []Unsupported `json:"unsupported,omitempty"`
	// Writes lists what the agent would write.
	Writes []Write `json:"writes,omitempty"`
}

// Service is a group of frontends of one Service port that differ in the same way.
type Service struct {
	// Service is namespace/name of the Service, followed by :port for a named port. It is empty if
	// the kernel has no name for the frontends.
	Service string `json:"service"`
	// Problem is dataplane.Missing, Unexpected or Differs.
	Problem   string   `json:"problem"`
	Frontends []string `json:"frontends"`
	Fields    []Field  `json:"fields"`
	// Reason says why no frontend is desired, if it is known.
	Reason string `json:"reason,omitempty"`
}

// Field is a property with its values that the kernel has and does not want, and the reverse.
type Field struct {
	Name string  `json:"name"`
	Have []Value `json:"have,omitempty"`
	Want []Value `json:"want,omitempty"`
}

// Value is a value of a field. Reason names the object that it comes from, or says why it is not
// desired.
type Value struct {
	Value  string `json:"value"`
	Reason string `json:"reason,omitempty"`
}

// Unsupported is a Service that the backend cannot program.
type Unsupported struct {
	Service string `json:"service"`
	Error   string `json:"error"`
}

// Write counts writes.
type Write struct {
	Op     string `json:"op"`
	Object string `json:"object"`
	Name   string `json:"name"`
	Count  int    `json:"count"`
}

// IsEmpty reports whether the kernel holds the desired state. A write without a listed difference is a
// difference: it concerns elements that do not change how connections are handled now.
func (r *Report) IsEmpty() bool {
	return len(r.Services) == 0 && len(r.Objects) == 0 && len(r.Writes) == 0
}

// DifferingPorts returns the number of Service ports with differences.
func (r *Report) DifferingPorts() int {
	names := map[string]struct{}{}
	for _, s := range r.Services {
		names[s.Service] = struct{}{}
	}
	return len(names)
}

// Count returns the number of writes of an operation to objects of a kind.
func (r *Report) Count(op, object string) int {
	n := 0
	for _, w := range r.Writes {
		if w.Op == op && w.Object == object {
			n += w.Count
		}
	}
	return n
}

// AddSetting adds a sysctl, or a module parameter, that differs.
func (r *Report) AddSetting(name, have, want string) {
	r.Objects = append(r.Objects, dataplane.Difference{Object: "sysctl " + name, Problem: dataplane.Differs, Have: []string{have}, Want: []string{want}})
	r.Writes = append(r.Writes, Write{dataplane.Modify, "sysctl", name, 1})
}

// Kernel compares the kernel with the desired state. The error wraps os.ErrPermission if the process
// lacks a privilege.
func Kernel(ctx context.Context, o Options) (*Report, error) {
	var dryRun dataplane.DryRun
	d, err := o.Backend.Dial(backend.Options{Logger: o.Logger, Values: o.Values, DryRun: &dryRun})
	if err != nil {
		return nil, err
	}
	defer d.Close() //nolint:errcheck // nothing was written
	have, err := d.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the kernel: %w", err)
	}
	r := &Report{Mode: o.Backend.Name, ProgrammedFrontends: len(have)}
	failed, err := dryReplace(ctx, d, o.Node, o.Services)
	if err != nil {
		return nil, fmt.Errorf("compare the kernel with the desired state: %w", err)
	}
	for _, key := range slices.SortedFunc(maps.Keys(failed), dataplane.Key.Compare) {
		r.Unsupported = append(r.Unsupported, Unsupported{key.String(), failed[key].Error()})
	}
	desired := func(yield func(*dataplane.Service) bool) {
		for _, s := range o.Services {
			if failed[s.Key] == nil && !yield(s) {
				return
			}
		}
	}
	want := dataplane.StateOf(desired)
	ports := map[string]struct{}{}
	for s := range desired {
		ports[s.Key.Service()] = struct{}{}
	}
	r.DesiredPorts, r.DesiredFrontends = len(ports), len(want)
	r.Services = compareServices(have, want, desired, o.Explain)
	r.Objects = dryRun.Differences
	slices.SortFunc(r.Objects, func(a, b dataplane.Difference) int {
		return cmp.Or(strings.Compare(a.Object, b.Object), strings.Compare(a.Problem, b.Problem))
	})
	for _, w := range slices.SortedFunc(maps.Keys(dryRun.Writes), dataplane.Write.Compare) {
		r.Writes = append(r.Writes, Write{w.Op, w.Object, w.Name, dryRun.Writes[w]})
	}
	return r, nil
}

// dryReplace calls Replace, and returns the Services that failed.
func dryReplace(ctx context.Context, d dataplane.Dataplane, node dataplane.Node, services []*dataplane.Service) (map[dataplane.Key]error, error) {
	err := d.Replace(ctx, node, slices.Values(services), nil)
	if failed, ok := errors.AsType[*dataplane.Error](err); ok {
		return failed.Failed, nil
	}
	return nil, err
}

// frontendDifference is the difference of one frontend.
type frontendDifference struct {
	service  Service
	key      dataplane.Key // zero if no Service is desired
	frontend dataplane.Frontend
}

// compareServices returns the differing Services. Frontends of a Service with the same difference are
// one element.
func compareServices(have, want dataplane.State, desired iter.Seq[*dataplane.Service], explain func(string, string) kube.Explanation) []Service {
	keys := map[dataplane.Frontend]dataplane.Key{}
	for s := range desired {
		for _, f := range s.Frontends {
			keys[f] = s.Key
		}
	}
	reasons := newReasons(explain)
	var all []frontendDifference
	for f, w := range want {
		d := frontendDifference{frontend: f, key: keys[f]}
		d.service.Service, d.service.Problem = keys[f].Service(), dataplane.Missing
		h, exists := have[f]
		if exists {
			d.service.Problem = dataplane.Differs
		}
		if exists && h.Equal(w) {
			continue
		}
		d.service.Fields = fields(h.ServiceSpec, exists, w.ServiceSpec, true, reasons.of(d.service.Service))
		all = append(all, d)
	}
	for f, h := range have {
		if _, desired := want[f]; desired {
			continue
		}
		d := frontendDifference{frontend: f, service: Service{Service: h.Service, Problem: dataplane.Unexpected}}
		r := reasons.of(h.Service)
		d.service.Reason = r.notServed(f)
		d.service.Fields = fields(h.ServiceSpec, true, dataplane.ServiceSpec{}, false, r)
		all = append(all, d)
	}
	slices.SortFunc(all, func(a, b frontendDifference) int {
		return cmp.Or(strings.Compare(a.service.Service, b.service.Service), a.key.Compare(b.key), a.frontend.Compare(b.frontend))
	})
	return group(all)
}

// group joins the frontends of a Service that differ in the same way.
func group(all []frontendDifference) []Service {
	var services []Service
	for _, d := range all {
		same := func(s Service) bool {
			return s.Service == d.service.Service && s.Problem == d.service.Problem && s.Reason == d.service.Reason && slices.EqualFunc(s.Fields, d.service.Fields, Field.equal)
		}
		i := -1
		for n := len(services) - 1; n >= 0 && services[n].Service == d.service.Service; n-- {
			if same(services[n]) {
				i = n
				break
			}
		}
		if i < 0 {
			services, i = append(services, d.service), len(services)
		}
		services[i].Frontends = append(services[i].Frontends, d.frontend.String())
	}
	return services
}

func (f Field) equal(o Field) bool {
	return f.Name == o.Name && slices.Equal(f.Have, o.Have) && slices.Equal(f.Want, o.Want)
}

// fields returns the fields that differ between two specs, either of which may not exist.
func fields(have dataplane.ServiceSpec, hasHave bool, want dataplane.ServiceSpec, hasWant bool, r reason) []Field {
	var all []Field
	add := func(name string, have, want []Value) {
		if !slices.EqualFunc(have, want, func(a, b Value) bool { return a.Value == b.Value }) {
			all = append(all, Field{name, without(have, want), without(want, have)})
		}
	}
	add("endpoints", r.endpoints(have.Endpoints, false, true), r.endpoints(want.Endpoints, false, false))
	add("localEndpoints", r.endpoints(have.LocalEndpoints, true, true), r.endpoints(want.LocalEndpoints, true, false))
	one := func(exists bool, text string) []Value {
		if !exists {
			return nil
		}
		return []Value{{Value: text}}
	}
	properties := func(exists bool, s dataplane.ServiceSpec) map[string][]Value {
		values := map[string][]Value{
			"masquerade":         one(exists, s.Masquerade.String()),
			"noEndpointsVerdict": one(exists, s.NoEndpointsVerdict.String()),
			"trafficPolicyLocal": one(exists && s.ExternalTrafficPolicyLocal, "true"),
			"affinity":           one(exists && s.Affinity != 0, s.Affinity.String()),
			"scheduler":          one(exists && s.Scheduler != "", s.Scheduler),
		}
		for _, p := range s.SourceRanges {
			values["sourceRanges"] = append(values["sourceRanges"], Value{Value: p.String()})
		}
		return values
	}
	h, w := properties(hasHave, have), properties(hasWant, want)
	for _, name := range []string{"trafficPolicyLocal", "affinity", "sourceRanges", "masquerade", "noEndpointsVerdict", "scheduler"} {
		add(name, h[name], w[name])
	}
	return all
}

// without returns the values of a that are not in b.
func without(a, b []Value) []Value {
	var rest []Value
	for _, value := range a {
		if !slices.ContainsFunc(b, func(o Value) bool { return o.Value == value.Value }) {
			rest = append(rest, value)
		}
	}
	return rest
}

// reasons explains Services, each once.
type reasons struct {
	explain func(namespace, name string) kube.Explanation
	known   map[string]reason
}

func newReasons(explain func(string, string) kube.Explanation) *reasons {
	return &reasons{explain: explain, known: map[string]reason{}}
}

// of returns the explanation of a Service port: namespace/name:port.
func (r *reasons) of(service string) reason {
	if known, ok := r.known[service]; ok || r.explain == nil {
		return known
	}
	var result reason
	name, port, _ := strings.Cut(service, ":")
	if namespace, name, ok := strings.Cut(name, "/"); ok {
		explanation := r.explain(namespace, name)
		result = reason{explanation: &explanation, port: port}
	}
	r.known[service] = result
	return result
}

// reason is the explanation of a Service port, nil if it is not known.
type reason struct {
	explanation *kube.Explanation
	port        string
}

// notServed returns why the frontend does not belong to the Service.
func (r reason) notServed(f dataplane.Frontend) string {
	if r.explanation == nil {
		return ""
	}
	if reason := r.explanation.NotServed; reason != kube.Served {
		return string(reason)
	}
	for _, p := range r.explanation.Ports {
		for _, c := range p.Frontends {
			if c.Frontend == f && !c.Owned {
				return fmt.Sprintf("it belongs to Service %s", c.Owner)
			}
		}
	}
	return "the Service does not have this address and port"
}

// endpoints returns the endpoints as values. A programmed endpoint gets the reason why it is not
// desired, and a desired one the EndpointSlice that contains it.
func (r reason) endpoints(list []dataplane.Endpoint, local, programmed bool) []Value {
	values := make([]Value, 0, len(list))
	for _, e := range list {
		v := Value{Value: e.Addr.String()}
		if e.Local {
			v.Value += " local"
		}
		v.Reason = r.endpoint(e, local, programmed)
		values = append(values, v)
	}
	return values
}

func (r reason) endpoint(e dataplane.Endpoint, local, programmed bool) string {
	if r.explanation == nil || r.explanation.NotServed != kube.Served {
		return ""
	}
	for _, p := range r.explanation.Ports {
		if p.Key.Port != r.port || p.Key.Family != dataplane.FamilyOf(e.Addr.Addr()) {
			continue
		}
		for _, x := range p.Endpoints {
			if x.Addr != e.Addr {
				continue
			}
			exclusion := x.Cluster
			if local {
				exclusion = x.Local
			}
			if exclusion == kube.Selected {
				return "EndpointSlice " + x.EndpointSlice
			}
			return fmt.Sprintf("EndpointSlice %s: %s", x.EndpointSlice, exclusion)
		}
	}
	if programmed {
		return "in no EndpointSlice"
	}
	return ""
}
