package main

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/inspect"
	"fairlead.io/fairlead/ipvs"
)

// getAPIVersion is the version of the objects that `fairlead get` prints.
const getAPIVersion = "fairlead.io/v1alpha1"

// none and unknown are kubectl's texts for missing values.
const (
	none    = "<none>"
	unknown = "<unknown>"
)

// typeMeta and objectMeta identify an object as in Kubernetes.
type typeMeta struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
}

type objectMeta struct {
	Namespace string            `json:"namespace,omitempty"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels,omitempty"`
}

// serviceObject is a Service as the kernel holds it.
type serviceObject struct {
	typeMeta

	Metadata  objectMeta       `json:"metadata"`
	Mode      string           `json:"mode"`
	Frontends []frontendObject `json:"frontends"`
}

func (o *serviceObject) objectName() string { return "service/" + o.Metadata.Name }

type frontendObject struct {
	Kind       string           `json:"kind"`
	PortName   string           `json:"portName,omitempty"`
	Address    string           `json:"address"`
	Port       uint16           `json:"port"`
	Protocol   string           `json:"protocol"`
	Spec       specObject       `json:"spec"`
	Endpoints  []endpointObject `json:"endpoints"`
	Statistics *statistics      `json:"statistics,omitempty"`
}

// specObject says how the kernel handles the connections to a frontend.
type specObject struct {
	Masquerade                    string   `json:"masquerade"`
	ExternalTrafficPolicy         string   `json:"externalTrafficPolicy"`
	WithoutEndpoints              string   `json:"withoutEndpoints"`
	SessionAffinityTimeoutSeconds int      `json:"sessionAffinityTimeoutSeconds,omitempty"`
	SourceRanges                  []string `json:"sourceRanges,omitempty"`
	SharedList                    bool     `json:"sharedList"`
	Class                         string   `json:"class"`
	Scheduler                     string   `json:"scheduler,omitempty"`
}

type endpointObject struct {
	Address string `json:"address"`
	Port    uint16 `json:"port"`
	State   string `json:"state"`
	// Local is nil for a draining endpoint: the kernel no longer knows where it runs.
	Local *bool `json:"local,omitempty"`
	// Clients says which clients' new connections the endpoint gets.
	Clients     string      `json:"clients"`
	Connections *int        `json:"connections,omitempty"`
	Statistics  *statistics `json:"statistics,omitempty"`
	Frontends   []string    `json:"frontends,omitempty"`
}

// statistics are the counters of a virtual server or a destination.
type statistics struct {
	Connections     uint64 `json:"connections"`
	IncomingPackets uint64 `json:"incomingPackets"`
	OutgoingPackets uint64 `json:"outgoingPackets"`
	IncomingBytes   uint64 `json:"incomingBytes"`
	OutgoingBytes   uint64 `json:"outgoingBytes"`
}

func newStatistics(s *ipvs.Stats) *statistics {
	if s == nil {
		return nil
	}
	return &statistics{s.Connections, s.InPackets, s.OutPackets, s.InBytes, s.OutBytes}
}

// endpointsObject is the list of a Service's endpoints as the kernel holds them.
type endpointsObject struct {
	typeMeta

	Metadata  objectMeta       `json:"metadata"`
	Mode      string           `json:"mode"`
	Endpoints []endpointObject `json:"endpoints"`
}

func (o *endpointsObject) objectName() string { return "endpoints/" + o.Metadata.Name }

// counterObject is a counter of refused packets.
type counterObject struct {
	typeMeta

	Metadata objectMeta `json:"metadata"`
	Family   string     `json:"family"`
	Packets  uint64     `json:"packets"`
	Bytes    uint64     `json:"bytes"`
}

func (o *counterObject) objectName() string { return "counter/" + o.Metadata.Name }

// byService calls yield with the frontends of each Service, in order.
func (r *getResult) byService(yield func(meta objectMeta, frontends []*inspect.Frontend)) {
	name := func(f *inspect.Frontend) string {
		namespace, name, _ := f.Service()
		return namespace + "/" + name
	}
	frontends := slices.Clone(r.frontends)
	slices.SortStableFunc(frontends, func(a, b *inspect.Frontend) int { return strings.Compare(name(a), name(b)) })
	for len(frontends) > 0 {
		n := slices.IndexFunc(frontends, func(f *inspect.Frontend) bool { return name(f) != name(frontends[0]) })
		if n < 0 {
			n = len(frontends)
		}
		namespace, service, _ := frontends[0].Service()
		yield(objectMeta{Namespace: namespace, Name: service, Labels: r.objects.labels(frontends[0])}, frontends[:n])
		frontends = frontends[n:]
	}
}

func (r *getResult) serviceObjects() []any {
	var all []any
	r.byService(func(meta objectMeta, frontends []*inspect.Frontend) {
		o := &serviceObject{typeMeta: typeMeta{getAPIVersion, "Service"}, Metadata: meta, Mode: r.kernel.Mode}
		for _, f := range frontends {
			o.Frontends = append(o.Frontends, r.frontendObject(f))
		}
		all = append(all, o)
	})
	return all
}

func (r *getResult) frontendObject(f *inspect.Frontend) frontendObject {
	_, _, port := f.Service()
	o := frontendObject{
		Kind: f.KindName(), PortName: port, Address: f.Frontend.Addr.Addr().String(), Port: f.Frontend.Addr.Port(), Protocol: f.Frontend.Protocol.String(),
		Spec: specObject{
			Masquerade: f.Binding.Masquerade.String(), ExternalTrafficPolicy: trafficPolicy(f), WithoutEndpoints: f.Binding.NoEndpointsVerdict.String(),
			SessionAffinityTimeoutSeconds: int(f.Binding.Affinity / time.Second), SharedList: f.SharedList, Class: f.Class, Scheduler: f.Binding.Scheduler,
		},
		Endpoints: []endpointObject{}, Statistics: newStatistics(f.Stats),
	}
	for _, p := range f.Binding.SourceRanges {
		o.Spec.SourceRanges = append(o.Spec.SourceRanges, p.String())
	}
	for _, e := range f.Endpoints {
		o.Endpoints = append(o.Endpoints, r.endpointObject(f, e))
	}
	return o
}

func (r *getResult) endpointObject(f *inspect.Frontend, e inspect.Endpoint) endpointObject {
	o := endpointObject{
		Address: e.Addr.Addr().String(), Port: e.Addr.Port(), State: r.endpointState(f, e), Clients: endpointClients(f, e), Statistics: newStatistics(e.Stats),
	}
	if !e.Draining() {
		o.Local = &e.Local
	}
	if r.kernel.ConnectionsCounted {
		o.Connections = &e.Connections
	}
	return o
}

// endpointState returns the state of an endpoint. The kernel does not distinguish ready endpoints
// from endpoints that serve while they terminate.
func (r *getResult) endpointState(f *inspect.Frontend, e inspect.Endpoint) string {
	switch {
	case e.Draining():
		return "Draining"
	case r.objects.servingTerminating(f, e.Addr):
		return "ServingTerminating"
	default:
		return "Ready"
	}
}

// endpointClients says which clients' new connections an endpoint gets: those of all clients, of
// the node and its pods only, of clients outside the cluster only, or of none.
func endpointClients(f *inspect.Frontend, e inspect.Endpoint) string {
	switch {
	case e.Draining():
		return "None"
	case !f.Binding.ExternalTrafficPolicyLocal || e.ForCluster && e.ForExternal:
		return "All"
	case e.ForCluster:
		return "Internal"
	default:
		return "External"
	}
}

func trafficPolicy(f *inspect.Frontend) string {
	if f.Binding.ExternalTrafficPolicyLocal {
		return "Local"
	}
	return "Cluster"
}

func (r *getResult) endpointObjects() []any {
	var all []any
	r.byService(func(meta objectMeta, frontends []*inspect.Frontend) {
		o := &endpointsObject{typeMeta{getAPIVersion, "Endpoints"}, meta, r.kernel.Mode, []endpointObject{}}
		for _, e := range r.endpointsOf(frontends) {
			o.Endpoints = append(o.Endpoints, e.endpointObject)
		}
		all = append(all, o)
	})
	return all
}

// serviceEndpoint is an endpoint of one or more frontends of a Service port.
type serviceEndpoint struct {
	endpointObject

	addr     netip.AddrPort
	protocol dataplane.Protocol
	portName string
}

// endpointsOf returns the endpoints of a Service's frontends, sorted by port and address. An
// endpoint with different states at two frontends is listed twice.
func (r *getResult) endpointsOf(frontends []*inspect.Frontend) []*serviceEndpoint {
	type key struct {
		addr            netip.AddrPort
		protocol        dataplane.Protocol
		portName, state string
	}
	all := map[key]*serviceEndpoint{}
	for _, f := range frontends {
		_, _, port := f.Service()
		selectsFrontend := len(r.queries) == 0 || slices.ContainsFunc(r.queries, func(q serviceQuery) bool {
			return q.matches(r.kernel, f) && (q.name != "" || q.matchesFrontend(r.kernel, f))
		})
		for _, e := range f.Endpoints {
			if !selectsFrontend && !slices.ContainsFunc(r.queries, func(q serviceQuery) bool { return q.matchesEndpoint(e) }) {
				continue
			}
			o := r.endpointObject(f, e)
			k := key{e.Addr, f.Frontend.Protocol, port, o.State}
			at, ok := all[k]
			if !ok {
				at = &serviceEndpoint{endpointObject: o, addr: e.Addr, protocol: f.Frontend.Protocol, portName: port}
				all[k] = at
			} else {
				at.add(o)
			}
			at.Frontends = append(at.Frontends, f.Frontend.String())
		}
	}
	return slices.SortedFunc(maps.Values(all), func(a, b *serviceEndpoint) int {
		return cmp.Or(strings.Compare(a.portName, b.portName), cmp.Compare(a.protocol, b.protocol), a.addr.Compare(b.addr), strings.Compare(a.State, b.State))
	})
}

// add adds the same endpoint at another frontend.
func (e *serviceEndpoint) add(o endpointObject) {
	if e.Clients != o.Clients {
		e.Clients = "All"
	}
	if e.Connections != nil && o.Connections != nil {
		sum := *e.Connections + *o.Connections
		e.Connections = &sum
	}
}

func (r *getResult) counterObjects() []any {
	var all []any
	for _, c := range r.kernel.Counters {
		all = append(all, &counterObject{typeMeta{getAPIVersion, "Counter"}, objectMeta{Name: c.Name}, c.Family.String(), c.Packets, c.Bytes})
	}
	return all
}

// withNamespace adds a column with the namespace for all namespaces.
func (r *getResult) withNamespace(t *table, columns []string) {
	if r.options.allNamespaces {
		columns = append([]string{"NAMESPACE"}, columns...)
	}
	t.columns = columns
}

func (r *getResult) addRow(t *table, namespace, key string, cells []string) {
	if r.options.allNamespaces {
		cells = append([]string{namespace}, cells...)
	}
	t.rows = append(t.rows, tableRow{namespace + " " + key, cells})
}

func (r *getResult) serviceTable(wide bool) table {
	var t table
	columns := []string{"NAME", "KIND", "FRONTEND", "ENDPOINTS", "DRAINING", "TRAFFIC-POLICY", "AFFINITY", "SOURCE-RANGES"}
	isIPVS := slices.ContainsFunc(r.frontends, func(f *inspect.Frontend) bool { return f.Stats != nil })
	haveSchedulers := isIPVS || slices.ContainsFunc(r.frontends, func(f *inspect.Frontend) bool { return f.Binding.Scheduler != "" })
	if wide {
		columns = append(columns, "MASQUERADE", "WITHOUT-ENDPOINTS", "LIST", "CLASS")
		if haveSchedulers {
			columns = append(columns, "SCHEDULER")
		}
		if isIPVS {
			columns = append(columns, "TOTAL-CONNECTIONS", "BYTES-IN", "BYTES-OUT")
		}
	}
	r.withNamespace(&t, columns)
	for _, f := range r.frontends {
		namespace, name, port := f.Service()
		if port != "" {
			name += ":" + port
		}
		cells := []string{
			name, f.KindName(), f.Frontend.String(), endpointCount(f), r.drainingCount(f), trafficPolicy(f), affinityText(f), sourceRangesText(f, wide),
		}
		if wide {
			cells = append(cells, f.Binding.Masquerade.String(), f.Binding.NoEndpointsVerdict.String(), listText(f), f.Class)
		}
		if wide && haveSchedulers {
			cells = append(cells, cmp.Or(f.Binding.Scheduler, none))
		}
		if wide && isIPVS {
			if f.Stats == nil {
				cells = append(cells, none, none, none)
			} else {
				cells = append(cells, formatCount(f.Stats.Connections), formatCount(f.Stats.InBytes), formatCount(f.Stats.OutBytes))
			}
		}
		r.addRow(&t, namespace, f.Frontend.String(), cells)
	}
	return t
}

func formatCount(n uint64) string { return strconv.FormatUint(n, 10) }

// endpointCount returns the number of endpoints that accept new connections, and what happens
// to connections without one.
func endpointCount(f *inspect.Frontend) string {
	n := len(f.Binding.Endpoints)
	verdict := strings.ToLower(f.Binding.NoEndpointsVerdict.String())
	switch {
	case !f.Binding.ExternalTrafficPolicyLocal && n == 0:
		return "0 (" + verdict + ")"
	case !f.Binding.ExternalTrafficPolicyLocal:
		return strconv.Itoa(n)
	case len(f.Binding.LocalEndpoints) == 0:
		return fmt.Sprintf("%d, 0 local (%s)", n, verdict)
	default:
		return fmt.Sprintf("%d, %d local", n, len(f.Binding.LocalEndpoints))
	}
}

// drainingCount returns the number of draining endpoints and of their connections.
func (r *getResult) drainingCount(f *inspect.Frontend) string {
	endpoints, connections := 0, 0
	for _, e := range f.Endpoints {
		if e.Draining() {
			endpoints++
			connections += e.Connections
		}
	}
	switch {
	case !r.kernel.ConnectionsCounted:
		return unknown
	case endpoints == 0:
		return "0"
	case connections == 1:
		return fmt.Sprintf("%d (1 connection)", endpoints)
	default:
		return fmt.Sprintf("%d (%d connections)", endpoints, connections)
	}
}

func affinityText(f *inspect.Frontend) string {
	if f.Binding.Affinity == 0 {
		return none
	}
	text := strings.Replace(f.Binding.Affinity.String(), "m0s", "m", 1) // 3h0m0s is 3h
	return strings.Replace(text, "h0m", "h", 1)
}

// sourceRangesText returns the source ranges like kubectl returns lists: shortened unless wide.
func sourceRangesText(f *inspect.Frontend, wide bool) string {
	const shown = 2
	var ranges []string
	for i, p := range f.Binding.SourceRanges {
		if !wide && i == shown {
			ranges = append(ranges, fmt.Sprintf("+ %d more...", len(f.Binding.SourceRanges)-shown))
			break
		}
		ranges = append(ranges, p.String())
	}
	return cmp.Or(strings.Join(ranges, ","), none)
}

func listText(f *inspect.Frontend) string {
	if f.SharedList {
		return "shared"
	}
	return "own"
}

func (r *getResult) endpointTable(wide bool) table {
	var t table
	columns := []string{"NAME", "ENDPOINT", "STATE", "LOCAL", "CLIENTS", "CONNECTIONS"}
	if wide {
		columns = append(columns, "FRONTENDS")
	}
	r.withNamespace(&t, columns)
	r.byService(func(meta objectMeta, frontends []*inspect.Frontend) {
		for _, e := range r.endpointsOf(frontends) {
			name := meta.Name
			if e.portName != "" {
				name += ":" + e.portName
			}
			connections := unknown
			if e.Connections != nil {
				connections = strconv.Itoa(*e.Connections)
			}
			endpoint := e.addr.String() + "/" + e.protocol.String()
			cells := []string{name, endpoint, e.State, localText(e.Local), e.Clients, connections}
			if wide {
				cells = append(cells, strings.Join(e.Frontends, ","))
			}
			r.addRow(&t, meta.Namespace, name+" "+endpoint+" "+e.State, cells)
		}
	})
	return t
}

func localText(local *bool) string {
	switch {
	case local == nil:
		return unknown
	case *local:
		return "yes"
	default:
		return "no"
	}
}

func (r *getResult) counterTable(bool) table {
	t := table{columns: []string{"NAME", "FAMILY", "PACKETS", "BYTES"}}
	for _, c := range r.kernel.Counters {
		t.rows = append(t.rows, tableRow{
			c.Name + " " + c.Family.String(), []string{c.Name, c.Family.String(), formatCount(c.Packets), formatCount(c.Bytes)},
		})
	}
	return t
}
