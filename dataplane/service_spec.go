package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Masquerade selects the clients whose connections are masqueraded. A pod that connects to itself
// through its Service is always masqueraded.
type Masquerade uint8

const (
	// MasqueradeOffCluster masquerades connections from clients outside the pod network, see
	// [Node.PodCIDRs]. [Node.MasqueradeAll] extends it to every client. Cluster IPs use it.
	MasqueradeOffCluster Masquerade = iota
	// MasqueradeAlways masquerades the connections of every client.
	MasqueradeAlways
	// MasqueradeFromNode masquerades only the connections that this node itself opens.
	MasqueradeFromNode
)

// String returns "off-cluster", "always" or "from-node".
func (m Masquerade) String() string {
	switch m {
	case MasqueradeOffCluster:
		return "off-cluster"
	case MasqueradeAlways:
		return "always"
	case MasqueradeFromNode:
		return "from-node"
	default:
		return fmt.Sprintf("Masquerade(%d)", uint8(m))
	}
}

// Verdict is the action for a new connection that no endpoint can receive. Either verdict refuses
// the connection.
type Verdict uint8

const (
	// Reject answers the client with an error such as ICMP port unreachable.
	Reject Verdict = iota
	// Drop discards the packet without an answer. A load balancer that has not noticed yet that
	// this node has no endpoints then tries again.
	Drop
)

// String returns "reject" or "drop".
func (v Verdict) String() string {
	switch v {
	case Reject:
		return "reject"
	case Drop:
		return "drop"
	default:
		return fmt.Sprintf("Verdict(%d)", uint8(v))
	}
}

// MaxAffinity is the longest session affinity timeout. The API server accepts the same maximum
// for spec.sessionAffinityConfig.clientIP.timeoutSeconds.
const MaxAffinity = 24 * time.Hour

// ServiceSpec is the desired handling of connections to the frontends of a Service. The zero
// ServiceSpec rejects all connections.
type ServiceSpec struct {
	// Endpoints receive the connections. Each connection goes to one endpoint, selected as
	// described for Scheduler. The list is sorted by address and has no duplicates; the order has
	// no meaning.
	Endpoints []Endpoint

	// ExternalTrafficPolicyLocal corresponds to externalTrafficPolicy: Local. If set, only this
	// node and its pods use Endpoints and so reach the whole cluster. All other clients use
	// LocalEndpoints. See [Node] for how pods of this node are identified.
	ExternalTrafficPolicyLocal bool
	// LocalEndpoints is sorted and deduplicated like Endpoints. It is empty unless
	// ExternalTrafficPolicyLocal is set.
	LocalEndpoints []Endpoint

	// Masquerade selects the clients whose connections are masqueraded.
	Masquerade Masquerade

	// NoEndpointsVerdict applies to connections whose endpoint list is empty.
	NoEndpointsVerdict Verdict

	// Affinity is the session affinity timeout, a multiple of one second, or zero for no
	// affinity. New connections from one client address to one frontend go to the same endpoint
	// while that endpoint exists, until Affinity has passed since the client's last new
	// connection. The kernel keeps the recorded clients when the Dataplane is closed.
	Affinity time.Duration

	// SourceRanges restricts the frontends to clients in these networks, unless it is empty.
	// Packets of other clients are dropped. The prefixes are sorted, unique and masked, and may
	// overlap. A client on this node may use the frontend's address as its source address. It
	// then counts as having the node's addresses, [Node.PrimaryAddrs].
	SourceRanges []netip.Prefix

	// Scheduler names the algorithm that selects endpoints: [RoundRobin], [SourceHash], or the
	// kernel's name of an IPVS scheduler, for example lc. It has 1 to [MaxSchedulerNameLen]
	// lower-case letters, digits and underscores. If it is empty, the backend selects endpoints
	// in its default way.
	//
	// A backend fails a Service with a scheduler that it does not support with an error that
	// wraps [ErrUnsupported]. The agent never passes such a Service to a backend: the backend's
	// entry in internal/backend lists the schedulers that it supports.
	Scheduler string
}

// Schedulers that do not depend on IPVS.
const (
	// RoundRobin selects the endpoints of a Service in turn. It is also the kernel's name of the
	// IPVS scheduler.
	RoundRobin = "rr"
	// SourceHash selects the endpoint by a hash of the client's address, without its port. If an
	// endpoint is removed, its clients move to the other endpoints. If one is added, it gets its
	// share of clients from each of the others. Other clients keep their endpoint.
	SourceHash = "source_hash"
)

// SourceHashSlots is the number of parts into which [SourceHash] divides the clients of an endpoint
// list if the backend stores the endpoint of each part.
const SourceHashSlots = 1024

// MaxSchedulerNameLen is the maximum length of a scheduler name: the kernel's
// IP_VS_SCHEDNAME_MAXLEN without the terminating zero byte.
const MaxSchedulerNameLen = 15

// Equal reports whether s and o handle connections in the same way.
func (s ServiceSpec) Equal(o ServiceSpec) bool {
	return slices.Equal(s.Endpoints, o.Endpoints) &&
		s.ExternalTrafficPolicyLocal == o.ExternalTrafficPolicyLocal &&
		slices.Equal(s.LocalEndpoints, o.LocalEndpoints) &&
		s.Masquerade == o.Masquerade &&
		s.NoEndpointsVerdict == o.NoEndpointsVerdict &&
		s.Affinity == o.Affinity &&
		slices.Equal(s.SourceRanges, o.SourceRanges) &&
		s.Scheduler == o.Scheduler
}

// String returns one line with the endpoints and all fields that differ from the zero
// ServiceSpec: "[10.0.0.1:80 10.0.0.2:80(local)] masquerade=always".
func (s ServiceSpec) String() string {
	var b strings.Builder
	writeEndpoints(&b, s.Endpoints)
	if s.ExternalTrafficPolicyLocal {
		b.WriteString(" external=")
		writeEndpoints(&b, s.LocalEndpoints)
	}
	if s.Masquerade != MasqueradeOffCluster {
		fmt.Fprintf(&b, " masquerade=%s", s.Masquerade)
	}
	if s.NoEndpointsVerdict != Reject {
		fmt.Fprintf(&b, " no-endpoints=%s", s.NoEndpointsVerdict)
	}
	if s.Affinity != 0 {
		fmt.Fprintf(&b, " affinity=%s", s.Affinity)
	}
	if len(s.SourceRanges) > 0 {
		fmt.Fprintf(&b, " source-ranges=%v", s.SourceRanges)
	}
	if s.Scheduler != "" {
		fmt.Fprintf(&b, " scheduler=%s", s.Scheduler)
	}
	return b.String()
}

func writeEndpoints(b *strings.Builder, endpoints []Endpoint) {
	b.WriteByte('[')
	for i, e := range endpoints {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(e.Addr.String())
		if e.Local {
			b.WriteString("(local)")
		}
	}
	b.WriteByte(']')
}

// normalize sorts and deduplicates the lists. It does not write to a list that is already in
// order, so that Services can share it.
func (s *ServiceSpec) normalize() {
	s.Endpoints = normalizeEndpoints(s.Endpoints)
	s.LocalEndpoints = normalizeEndpoints(s.LocalEndpoints)
	propagateLocalFrom(s.Endpoints, s.LocalEndpoints)
	propagateLocalFrom(s.LocalEndpoints, s.Endpoints)
	if !slices.IsSortedFunc(s.SourceRanges, netip.Prefix.Compare) {
		slices.SortFunc(s.SourceRanges, netip.Prefix.Compare)
	}
	s.SourceRanges = compact(s.SourceRanges, func(a, b netip.Prefix) bool { return a == b })
}

func normalizeEndpoints(endpoints []Endpoint) []Endpoint {
	byAddr := func(a, b Endpoint) int { return a.Addr.Compare(b.Addr) }
	if !slices.IsSortedFunc(endpoints, byAddr) {
		slices.SortFunc(endpoints, byAddr)
	}
	propagateLocal(endpoints)
	return compact(endpoints, func(a, b Endpoint) bool { return a.Addr == b.Addr })
}

// compact is like slices.CompactFunc, but it does not write to a slice without duplicates.
func compact[E any](s []E, same func(a, b E) bool) []E {
	for i := 1; i < len(s); i++ {
		if same(s[i-1], s[i]) {
			return slices.CompactFunc(s, same)
		}
	}
	return s
}

// propagateLocal marks every endpoint of an address as local if any is. The endpoints are
// sorted, so those with the same address are adjacent.
func propagateLocal(endpoints []Endpoint) {
	for len(endpoints) > 0 {
		n := 1
		local := endpoints[0].Local
		for n < len(endpoints) && endpoints[n].Addr.Addr() == endpoints[0].Addr.Addr() {
			local = local || endpoints[n].Local
			n++
		}
		for i := range endpoints[:n] {
			if endpoints[i].Local != local {
				endpoints[i].Local = local
			}
		}
		endpoints = endpoints[n:]
	}
}

// propagateLocalFrom marks the endpoints whose address is local in others. Both lists are sorted.
func propagateLocalFrom(endpoints, others []Endpoint) {
	for i := range endpoints {
		addr := endpoints[i].Addr.Addr()
		for len(others) > 0 && others[0].Addr.Addr().Less(addr) {
			others = others[1:]
		}
		if len(others) == 0 {
			return
		}
		if others[0].Addr.Addr() == addr && others[0].Local && !endpoints[i].Local {
			endpoints[i].Local = true
		}
	}
}

func (s *ServiceSpec) validate(family Family) error {
	if len(s.LocalEndpoints) > 0 && !s.ExternalTrafficPolicyLocal {
		return errors.New("local endpoints without externalTrafficPolicy Local, want none")
	}
	for _, list := range [...][]Endpoint{s.Endpoints, s.LocalEndpoints} {
		if n := len(list); n > MaxEndpoints {
			return fmt.Errorf("%d endpoints, want at most %d", n, MaxEndpoints)
		}
		for _, e := range list {
			if err := validateEndpoint(e.Addr, family); err != nil {
				return err
			}
		}
	}
	if s.Masquerade > MasqueradeFromNode {
		return fmt.Errorf("unknown masquerade %s", s.Masquerade)
	}
	if s.NoEndpointsVerdict > Drop {
		return fmt.Errorf("unknown verdict %s", s.NoEndpointsVerdict)
	}
	if s.Affinity < 0 || s.Affinity > MaxAffinity || s.Affinity%time.Second != 0 {
		return fmt.Errorf("affinity %s, want whole seconds up to %s", s.Affinity, MaxAffinity)
	}
	for _, p := range s.SourceRanges {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || FamilyOf(p.Addr()) != family {
			return fmt.Errorf("source range %s, want a network of the family %s without host bits", p, family)
		}
	}
	if len(s.Scheduler) > MaxSchedulerNameLen || strings.ContainsFunc(s.Scheduler, invalidInSchedulerName) {
		return fmt.Errorf("scheduler %q, want up to %d lower-case letters, digits and underscores", s.Scheduler, MaxSchedulerNameLen)
	}
	return nil
}

func invalidInSchedulerName(r rune) bool {
	return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_'
}
