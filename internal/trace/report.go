package trace

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/nft"
)

// Connection is a new connection.
type Connection struct {
	// Client and Target are the names that the user has given.
	Client string `json:"client"`
	Target string `json:"target"`
	// Source has the port 0, because the client's port does not matter.
	Source      netip.Addr     `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	Protocol    string         `json:"protocol"`
	// Interface is the interface on which the connection arrives. It is empty for connections of
	// the node itself.
	Interface string `json:"interface,omitempty"`
}

// Step is one decision. Object and Field name what decides.
type Step struct {
	nft.Step

	Object string `json:"object,omitempty"`
	Field  string `json:"field,omitempty"`
}

// Endpoint is an endpoint of the Service, whether connections can reach it or not.
type Endpoint struct {
	Addr netip.AddrPort `json:"address"`
	// Pod is the namespace and name of the pod, and Node the name of its node, if known.
	Pod           string `json:"pod,omitempty"`
	Node          string `json:"node,omitempty"`
	EndpointSlice string `json:"endpointSlice,omitempty"`
	// Excluded says why the connection cannot reach the endpoint. It is empty for candidates.
	Excluded string `json:"excluded,omitempty"`
}

// Result is a possible result.
type Result struct {
	nft.Outcome

	// Source and Destination are the addresses in the packet when it leaves the rules.
	Source      netip.Addr     `json:"source"`
	Destination netip.AddrPort `json:"destination"`
}

// Report explains a connection.
type Report struct {
	Connection Connection `json:"connection"`
	// State is the state that the steps and results belong to: "kernel" or "desired".
	State string `json:"state"`
	// Mode is the programmed mode. It is empty if nothing is programmed.
	Mode      string     `json:"mode,omitempty"`
	Steps     []Step     `json:"steps"`
	Endpoints []Endpoint `json:"endpoints,omitempty"`
	Results   []Result   `json:"results"`
	// Differences says in which points the kernel's state is not the desired state.
	Differences []string `json:"differences,omitempty"`
	// Notes lists the parts that the report does not contain.
	Notes []string `json:"notes,omitempty"`
}

// Desired is the desired state of the node.
type Desired struct {
	Tracker  *kube.Tracker
	Node     dataplane.Node
	Services []*dataplane.Service
	// Pods contains what the EndpointSlices say about the pods of endpoint addresses.
	Pods map[netip.Addr]Pod
}

// Pod is the pod of an endpoint.
type Pod struct{ Name, Node string }

// Explain explains a connection. walker is nil if the kernel's state is unknown, and desired is nil
// if the desired state is unknown. One of them must be known.
func Explain(c Connection, p dataplane.Protocol, host *Host, walker *nft.Walker, desired *Desired) (*Report, error) {
	packet := nft.Packet{
		Protocol: p, Source: netip.AddrPortFrom(c.Source, clientPort), Destination: c.Destination, InInterface: c.Interface,
	}
	r := &Report{Connection: c}
	var kernel, wanted *nft.Walk
	var err error
	if walker != nil {
		if kernel, err = walker.Walk(host, packet); err != nil {
			return nil, fmt.Errorf("evaluate the rules in the kernel: %w", err)
		}
	}
	if desired != nil {
		plain := *host
		plain.balance = false
		services := desired.Services
		if host.balance { // IPVS selects the endpoint, not the rules
			services = withoutSchedulers(services)
		}
		if wanted, err = nft.WalkRendered(&plain, packet, desired.Node, services); err != nil {
			return nil, fmt.Errorf("evaluate the rules of the desired state: %w", err)
		}
	}
	walk := kernel
	r.State = "kernel"
	if kernel == nil {
		walk, r.State = wanted, "desired"
	}
	var port *kube.PortExplanation
	if desired != nil {
		port = desired.findPort(walk.Frontend)
		if selects(walk) {
			r.Endpoints = desired.endpoints(port, walk)
		}
	}
	for _, s := range addUnwritten(walk, port) {
		r.Steps = append(r.Steps, desired.annotate(s, c, walk, port))
	}
	for _, o := range walk.Outcomes {
		result := Result{Outcome: o, Source: c.Source, Destination: c.Destination}
		if o.Verdict == nft.Translated {
			result.Destination = o.Endpoint
		}
		if o.Masqueraded {
			source, ok, err := host.SourceFor(result.Destination.Addr())
			if err != nil {
				return nil, err
			}
			if ok {
				result.Source = source
			}
		}
		r.Results = append(r.Results, result)
	}
	if kernel != nil && wanted != nil {
		r.Differences = differences(kernel, wanted)
	}
	return r, nil
}

// withoutSchedulers returns copies of the Services without their schedulers.
func withoutSchedulers(services []*dataplane.Service) []*dataplane.Service {
	all := make([]*dataplane.Service, 0, len(services))
	for _, s := range services {
		plain := *s
		plain.Scheduler = ""
		all = append(all, &plain)
	}
	return all
}

// selects reports whether the rules select an endpoint, or refuse the connection because the list
// of endpoints is empty.
func selects(w *nft.Walk) bool {
	return slices.ContainsFunc(w.Outcomes, func(o nft.Outcome) bool {
		return o.Verdict == nft.Translated || strings.HasSuffix(o.Counter, "-endpoints")
	})
}

// addUnwritten adds decisions that need no rule: a traffic policy that applies to every client, and
// a client that session affinity does not remember. p may be nil.
func addUnwritten(w *nft.Walk, p *kube.PortExplanation) []nft.Step {
	if p == nil || !selects(w) {
		return w.Steps
	}
	has := func(d nft.Decision) bool {
		return slices.ContainsFunc(w.Steps, func(s nft.Step) bool { return s.Decision == d })
	}
	var added []nft.Step
	if !has(nft.DecideList) {
		text := "the traffic policy is Cluster, so endpoints of all nodes can receive the connection"
		if p.TrafficPolicyLocal {
			text = "the traffic policy is Local, so only endpoints of this node can receive the connection"
		}
		added = append(added, nft.Step{Decision: nft.DecideList, Text: text})
	}
	if p.Spec.Affinity > 0 && !has(nft.DecideAffinity) {
		added = append(added, nft.Step{
			Decision: nft.DecideAffinity,
			Text:     fmt.Sprintf("session affinity: no endpoint is remembered for the client; the selected one is remembered for %s", p.Spec.Affinity),
		})
	}
	// They follow the decisions about the client, and come before the first decision about the
	// endpoint.
	i := slices.IndexFunc(w.Steps, func(s nft.Step) bool { return isSelected(s.Decision) || s.Decision == nft.DecideAffinity })
	if i < 0 {
		i = len(w.Steps)
	}
	return slices.Insert(slices.Clone(w.Steps), i, added...)
}

// clientPort is an arbitrary port of the client. No rule looks at it.
const clientPort = 50_000

// findPort returns the explanation of the port that owns a frontend, or nil.
func (d *Desired) findPort(f dataplane.Frontend) *kube.PortExplanation {
	for _, s := range d.Services {
		if !slices.Contains(s.Frontends, f) {
			continue
		}
		for _, name := range d.Tracker.ServiceNames() {
			if name.Namespace != s.Key.Namespace || name.Name != s.Key.Name {
				continue
			}
			for _, p := range d.Tracker.Explain(name).Ports {
				if p.Key == s.Key {
					return &p
				}
			}
		}
	}
	return nil
}

// endpoints returns the endpoints of a port, as the client sees them.
func (d *Desired) endpoints(p *kube.PortExplanation, w *nft.Walk) []Endpoint {
	if p == nil {
		return nil
	}
	local := w.LocalList || p.TrafficPolicyLocal && p.Key.Kind == dataplane.ClusterIP
	var all []Endpoint
	for _, e := range p.Endpoints {
		excluded := e.Cluster
		if local {
			excluded = e.Local
		}
		pod := d.Pods[e.Addr.Addr()]
		all = append(all, Endpoint{Addr: e.Addr, Pod: pod.Name, Node: pod.Node, EndpointSlice: e.EndpointSlice, Excluded: string(excluded)})
	}
	return all
}

// annotate adds the object and the field that decide a step. d and p may be nil.
func (d *Desired) annotate(s nft.Step, c Connection, w *nft.Walk, p *kube.PortExplanation) Step {
	a := Step{Step: s}
	if w.Service != "" {
		name, _, _ := strings.Cut(w.Service, ":")
		a.Object = "Service " + name
	}
	policy := ""
	var kind dataplane.Kind
	if p != nil {
		policy, kind = p.TrafficPolicyField, p.Key.Kind
	}
	switch s.Decision {
	case nft.DecideFrontend:
		if p != nil {
			a.Field = frontendField(p, kind)
		}
	case nft.DecideSource:
		a.Field = "spec.loadBalancerSourceRanges"
	case nft.DecideList:
		a.Field = policy
	case nft.DecideAffinity:
		a.Field = "spec.sessionAffinity"
	case nft.DecideMasquerade:
		if a.Field = policy; p != nil && kind == dataplane.ClusterIP {
			a.Object, a.Field = "", "detectLocal (--cluster-cidr)"
		}
	case nft.DecideRefused:
		d.annotateRefusal(&a, c, policy, w)
	case nft.DecideNoFrontend:
		a.Object = ""
		d.annotateNoFrontend(&a, c)
	case nft.DecideEndpoint:
		a.Field = "metadata.annotations[" + kube.AnnotationBalancing + "]"
	case nft.DecideHairpin, nft.DecideLoopback, nft.DecideVirtual, nft.DecideBalancer, nft.DecideUnsupported:
	}
	return a
}

func frontendField(p *kube.PortExplanation, kind dataplane.Kind) string {
	switch kind {
	case dataplane.NodePort:
		return p.Field + ".nodePort"
	case dataplane.ExternalIP:
		return "spec.externalIPs, " + p.Field
	case dataplane.LoadBalancer:
		return "status.loadBalancer.ingress, " + p.Field
	case dataplane.ClusterIP:
	}
	return "spec.clusterIPs, " + p.Field
}

// annotateRefusal names what refuses a connection, by the counter of the rule.
func (d *Desired) annotateRefusal(a *Step, c Connection, policy string, w *nft.Walk) {
	switch counter := w.Outcomes[0].Counter; counter {
	case "dropped-source-ranges":
		a.Field = "spec.loadBalancerSourceRanges"
	case "rejected-no-endpoints":
		a.Field = "EndpointSlices"
	case "dropped-no-endpoints", "dropped-no-local-endpoints":
		a.Field = policy
	case "rejected-undeclared-port":
		a.Object, a.Field = d.serviceAt(c.Destination.Addr()), "spec.ports"
	case "dropped-no-service":
		a.Object, a.Field = "ServiceCIDR", "spec.cidrs"
	default:
		if strings.HasPrefix(counter, "rejected-localhost-") {
			a.Field = "nodePortAddresses (--nodeport-addresses)"
		}
	}
}

// serviceAt returns the Service that has a cluster IP.
func (d *Desired) serviceAt(addr netip.Addr) string {
	if d == nil {
		return ""
	}
	var names []string
	for _, name := range d.Tracker.ServicesAt(addr) {
		names = append(names, name.String())
	}
	if len(names) == 0 {
		return ""
	}
	return "Service " + strings.Join(names, ", ")
}

// annotateNoFrontend says why no Service serves a destination that Services mention.
func (d *Desired) annotateNoFrontend(a *Step, c Connection) {
	if d == nil {
		return
	}
	if service := d.serviceAt(c.Destination.Addr()); service != "" {
		a.Object, a.Field = service, "spec.ports"
	}
	address := c.Destination.Addr().String()
	for _, name := range d.Tracker.ServiceNames() {
		e := d.Tracker.Explain(name)
		for _, p := range e.Problems {
			if strings.Contains(p.Message, address) && strings.HasPrefix(p.Message, address) {
				a.Object, a.Field = "Service "+name.String(), p.Field
				a.Text += ": " + p.Message
				return
			}
		}
	}
}

// NotServed returns why a Service is not served, with the field. It is empty for a Service that is
// served.
func (d *Desired) NotServed(namespace, service string) string {
	for _, name := range d.Tracker.ServiceNames() {
		if name.Namespace == namespace && name.Name == service {
			return string(d.Tracker.Explain(name).NotServed)
		}
	}
	return ""
}

// differences compares the results of two walks.
func differences(kernel, wanted *nft.Walk) []string {
	var all []string
	add := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	if kernel.Frontend != wanted.Frontend || kernel.Service != wanted.Service {
		name := func(w *nft.Walk) string {
			if w.Service == "" {
				return "no Service"
			}
			return "Service " + w.Service
		}
		add("the destination belongs to %s in the kernel, and to %s in the desired state", name(kernel), name(wanted))
	}
	type key struct {
		nft.WalkVerdict
		endpoint netip.AddrPort
	}
	index := func(w *nft.Walk) map[key]nft.Outcome {
		outcomes := map[key]nft.Outcome{}
		for _, o := range w.Outcomes {
			outcomes[key{o.Verdict, o.Endpoint}] = o
		}
		return outcomes
	}
	have, want := index(kernel), index(wanted)
	for _, o := range kernel.Outcomes {
		w, ok := want[key{o.Verdict, o.Endpoint}]
		switch {
		case !ok && o.Verdict == nft.Translated:
			add("the kernel sends connections to %s, which the desired state does not", o.Endpoint)
		case !ok:
			add("in the kernel, the connection is %s; in the desired state, it is not", o.Verdict)
		case o.Masqueraded != w.Masqueraded:
			add("connections to %s: masqueraded is %t in the kernel, and %t in the desired state", o.Endpoint, o.Masqueraded, w.Masqueraded)
		}
	}
	if kernel.Remembered.IsValid() {
		return all // the other endpoints are not visible
	}
	for _, o := range wanted.Outcomes {
		if _, ok := have[key{o.Verdict, o.Endpoint}]; ok {
			continue
		}
		if o.Verdict == nft.Translated {
			add("the kernel sends no connections to %s, which the desired state does", o.Endpoint)
		} else {
			add("in the desired state, the connection is %s; in the kernel, it is not", o.Verdict)
		}
	}
	return all
}
