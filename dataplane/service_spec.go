package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Masquerade says which clients of a Service are masqueraded: the endpoint sees
// an address of the node, so that its reply comes back this way. A pod that
// reaches itself through its Service is masqueraded whatever this says.
type Masquerade uint8

const (
	// MasqueradeOffCluster is: clients that are no pods, as [Node] tells them, and
	// with Node.MasqueradeAll every client. This is how cluster IPs are served.
	MasqueradeOffCluster Masquerade = iota
	// MasqueradeAlways is: every client.
	MasqueradeAlways
	// MasqueradeFromNode is: the node's own connections only.
	MasqueradeFromNode
)

// String returns "foreign", "always" or "node".
func (m Masquerade) String() string {
	switch m {
	case MasqueradeOffCluster:
		return "foreign"
	case MasqueradeAlways:
		return "always"
	case MasqueradeFromNode:
		return "node"
	default:
		return fmt.Sprintf("Masquerade(%d)", uint8(m))
	}
}

// Verdict is what happens to a new connection that no endpoint can take.
type Verdict uint8

const (
	// Reject tells the client: with an ICMP port unreachable, or alike.
	Reject Verdict = iota
	// Drop leaves the client without an answer, so that a load balancer that
	// has not yet heard of this node's lack of endpoints tries again.
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

// MaxAffinity is the longest session affinity there is: what the API server
// accepts in spec.sessionAffinityConfig.clientIP.timeoutSeconds.
const MaxAffinity = 24 * time.Hour

// ServiceSpec is what happens to the connections to the frontends of a Service.
// The zero Treatment rejects them.
type ServiceSpec struct {
	// Endpoints take the connections, each of which goes to one of them, chosen
	// as Scheduler says. They are sorted by address and unique; their order has
	// no meaning.
	Endpoints []Endpoint

	// ExternalTrafficPolicyLocal is externalTrafficPolicy: Local. Endpoints then take only
	// the connections of this node itself and of its pods, which reach the whole
	// cluster this way; those of every other client go to one of LocalEndpoints.
	// Which clients are this node's pods, [Node] tells.
	ExternalTrafficPolicyLocal bool
	// LocalEndpoints are sorted and unique as Endpoints are. There are none
	// unless ExternalTrafficPolicyLocal is set.
	LocalEndpoints []Endpoint

	// Masquerade says which clients' connections are masqueraded.
	Masquerade Masquerade

	// NoEndpointsVerdict is the verdict on connections for which the list they would go
	// to is empty.
	NoEndpointsVerdict Verdict

	// Affinity, if not zero, makes the connections of one client address to one
	// frontend go to one endpoint, as long as that endpoint is there and the
	// client's last new connection is not longer ago than this. It is a number of
	// whole seconds. What is remembered outlives the Dataplane.
	Affinity time.Duration

	// SourceRanges, if there are any, are the only networks whose clients may
	// connect; other clients' packets are dropped. They are sorted and unique,
	// without host bits, and may overlap. A client on this node may have the
	// frontend's own address; it counts as having the node's, that is, those of
	// [Node.PrimaryAddrs].
	SourceRanges []netip.Prefix

	// Scheduler is the kernel's name of the IPVS scheduler that picks the
	// endpoints, such as lc: 1 to [MaxSchedulerNameLen] lower-case letters, digits and
	// underscores. Empty means the backend's own way.
	//
	// Scheduler belongs to package ipvs. A backend without schedulers refuses a Service
	// that names one, with an error that wraps [ErrUnsupported]. The agent hands such a
	// backend none: its entry in internal/backend lists the schedulers that it knows.
	Scheduler string
}

// MaxSchedulerNameLen is the length of the longest name of a scheduler: the kernel's
// IP_VS_SCHEDNAME_MAXLEN, less the zero at the end.
const MaxSchedulerNameLen = 15

// Equal reports whether t and o treat connections alike.
func (t ServiceSpec) Equal(o ServiceSpec) bool {
	return slices.Equal(t.Endpoints, o.Endpoints) &&
		t.ExternalTrafficPolicyLocal == o.ExternalTrafficPolicyLocal &&
		slices.Equal(t.LocalEndpoints, o.LocalEndpoints) &&
		t.Masquerade == o.Masquerade &&
		t.NoEndpointsVerdict == o.NoEndpointsVerdict &&
		t.Affinity == o.Affinity &&
		slices.Equal(t.SourceRanges, o.SourceRanges) &&
		t.Scheduler == o.Scheduler
}

// String returns the endpoints, and what is not as in the zero Treatment, in one
// line: "[10.0.0.1:80 10.0.0.2:80(local)] masquerade=always".
func (t ServiceSpec) String() string {
	var b strings.Builder
	writeEndpoints(&b, t.Endpoints)
	if t.ExternalTrafficPolicyLocal {
		b.WriteString(" external=")
		writeEndpoints(&b, t.LocalEndpoints)
	}
	if t.Masquerade != MasqueradeOffCluster {
		fmt.Fprintf(&b, " masquerade=%s", t.Masquerade)
	}
	if t.NoEndpointsVerdict != Reject {
		fmt.Fprintf(&b, " no-endpoints=%s", t.NoEndpointsVerdict)
	}
	if t.Affinity != 0 {
		fmt.Fprintf(&b, " affinity=%s", t.Affinity)
	}
	if len(t.SourceRanges) > 0 {
		fmt.Fprintf(&b, " source-ranges=%v", t.SourceRanges)
	}
	if t.Scheduler != "" {
		fmt.Fprintf(&b, " scheduler=%s", t.Scheduler)
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

// normalize sorts the lists and removes doubles. A list that is in order is not
// written to, so that Services may share it.
func (t *ServiceSpec) normalize() {
	t.Endpoints = normalizeEndpoints(t.Endpoints)
	t.LocalEndpoints = normalizeEndpoints(t.LocalEndpoints)
	propagateLocalFrom(t.Endpoints, t.LocalEndpoints)
	propagateLocalFrom(t.LocalEndpoints, t.Endpoints)
	if !slices.IsSortedFunc(t.SourceRanges, netip.Prefix.Compare) {
		slices.SortFunc(t.SourceRanges, netip.Prefix.Compare)
	}
	t.SourceRanges = compact(t.SourceRanges, func(a, b netip.Prefix) bool { return a == b })
}

func normalizeEndpoints(endpoints []Endpoint) []Endpoint {
	byAddr := func(a, b Endpoint) int { return a.Addr.Compare(b.Addr) }
	if !slices.IsSortedFunc(endpoints, byAddr) {
		slices.SortFunc(endpoints, byAddr)
	}
	propagateLocal(endpoints)
	return compact(endpoints, func(a, b Endpoint) bool { return a.Addr == b.Addr })
}

// compact is slices.CompactFunc, but reads only where there are no doubles.
func compact[E any](s []E, same func(a, b E) bool) []E {
	for i := 1; i < len(s); i++ {
		if same(s[i-1], s[i]) {
			return slices.CompactFunc(s, same)
		}
	}
	return s
}

// propagateLocal makes all endpoints of an address local if one of them is. They are
// sorted, so they stand together.
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

// propagateLocalFrom makes endpoints local whose address is in the other list, if that
// one is. Both are sorted.
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

func (t *ServiceSpec) validate(family Family) error {
	if len(t.LocalEndpoints) > 0 && !t.ExternalTrafficPolicyLocal {
		return errors.New("local endpoints without externalTrafficPolicy: Local")
	}
	for _, list := range [...][]Endpoint{t.Endpoints, t.LocalEndpoints} {
		if n := len(list); n > MaxEndpoints {
			return fmt.Errorf("%d endpoints, want at most %d", n, MaxEndpoints)
		}
		for _, e := range list {
			if err := validateEndpoint(e.Addr, family); err != nil {
				return err
			}
		}
	}
	if t.Masquerade > MasqueradeFromNode {
		return fmt.Errorf("unknown masquerade %s", t.Masquerade)
	}
	if t.NoEndpointsVerdict > Drop {
		return fmt.Errorf("unknown verdict %s", t.NoEndpointsVerdict)
	}
	if t.Affinity < 0 || t.Affinity > MaxAffinity || t.Affinity%time.Second != 0 {
		return fmt.Errorf("affinity %s, want whole seconds up to %s", t.Affinity, MaxAffinity)
	}
	for _, p := range t.SourceRanges {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || FamilyOf(p.Addr()) != family {
			return fmt.Errorf("source range %s, want a network of the family %s without host bits", p, family)
		}
	}
	if len(t.Scheduler) > MaxSchedulerNameLen || strings.ContainsFunc(t.Scheduler, invalidInSchedulerName) {
		return fmt.Errorf("scheduler %q, want up to %d lower-case letters, digits and underscores", t.Scheduler, MaxSchedulerNameLen)
	}
	return nil
}

func invalidInSchedulerName(r rune) bool {
	return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_'
}
