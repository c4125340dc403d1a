package dataplane

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Protocol is the IANA number of a transport protocol.
type Protocol uint8

// Protocols of a Kubernetes Service port.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// String returns the Kubernetes name of p: TCP, UDP or SCTP.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	default:
		return fmt.Sprintf("Protocol(%d)", uint8(p))
	}
}

// Family is an IP family. A port of a dual-stack Service becomes two Services in this package,
// one for each family.
type Family uint8

// IP families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String returns IPv4 or IPv6, the spelling of spec.ipFamilies.
func (f Family) String() string {
	switch f {
	case IPv4:
		return "IPv4"
	case IPv6:
		return "IPv6"
	default:
		return fmt.Sprintf("Family(%d)", uint8(f))
	}
}

// FamilyOf returns the family of addr. It returns IPv6 for an IPv4-mapped IPv6 address, which
// [NewService] rejects.
func FamilyOf(addr netip.Addr) Family {
	if addr.Is4() {
		return IPv4
	}
	return IPv6
}

// Kind is the kind of address that the frontends of a Service have.
type Kind uint8

// Kinds of frontends of a Kubernetes Service port.
const (
	ClusterIP    Kind = iota
	NodePort          // addresses of this node; Frontend.Addr is the unspecified address
	ExternalIP        // spec.externalIPs
	LoadBalancer      // status.loadBalancer.ingress
)

// String returns ClusterIP, NodePort, ExternalIP or LoadBalancer.
func (k Kind) String() string {
	switch k {
	case ClusterIP:
		return "ClusterIP"
	case NodePort:
		return "NodePort"
	case ExternalIP:
		return "ExternalIP"
	case LoadBalancer:
		return "LoadBalancer"
	default:
		return fmt.Sprintf("Kind(%d)", uint8(k))
	}
}

// Key identifies one port of a Kubernetes Service in one IP family, restricted to frontends of
// one kind. Each kind has its own key so that a failure of one kind does not affect the others.
type Key struct {
	// Namespace and Name identify the Kubernetes Service.
	Namespace, Name string
	// Port is the name of the Service port. It is empty for a single unnamed port.
	Port string
	// Family is the family of every address in the Service.
	Family Family
	// Kind is the kind of every frontend in the Service.
	Kind Kind
}

// Service returns namespace/name of the Kubernetes Service, followed by :port for a named port.
func (k Key) Service() string {
	if k.Port == "" {
		return k.Namespace + "/" + k.Name
	}
	return k.Namespace + "/" + k.Name + ":" + k.Port
}

// String returns the result of [Key.Service], the family, and the kind unless it is ClusterIP.
func (k Key) String() string {
	if k.Kind == ClusterIP {
		return k.Service() + " " + k.Family.String()
	}
	return k.Service() + " " + k.Family.String() + " " + k.Kind.String()
}

// Compare orders keys by namespace, name, port, family and kind.
func (k Key) Compare(o Key) int {
	return cmp.Or(
		strings.Compare(k.Namespace, o.Namespace),
		strings.Compare(k.Name, o.Name),
		strings.Compare(k.Port, o.Port),
		cmp.Compare(k.Family, o.Family),
		cmp.Compare(k.Kind, o.Kind),
	)
}

// Frontend is the protocol, address and port that clients connect to.
//
// The unspecified address (0.0.0.0 or ::) represents every address in [Node.NodePortAddrs] and
// [Node.NodePortNetworks]. A frontend with a specific address takes precedence over an
// unspecified one with the same port.
//
// A Frontend belongs to at most one Service. Conflicts are resolved before Services reach a
// Dataplane.
type Frontend struct {
	Protocol Protocol
	Addr     netip.AddrPort
}

// String returns address, port and protocol, for example "10.96.0.10:80/TCP" or
// "[fd00::10]:80/TCP".
func (f Frontend) String() string { return f.Addr.String() + "/" + f.Protocol.String() }

// Compare orders frontends by address, port and protocol.
func (f Frontend) Compare(o Frontend) int {
	return cmp.Or(f.Addr.Compare(o.Addr), cmp.Compare(f.Protocol, o.Protocol))
}

// Endpoint is a destination of connections: the address of a pod and the port that it listens on.
type Endpoint struct {
	Addr netip.AddrPort
	// Local reports that the endpoint may be a pod on this node. If a local pod connects to
	// itself through its Service (hairpin), the connection is masqueraded, because it would not
	// work otherwise. Local is a property of the address: if one endpoint of an address is local,
	// [NewService] marks every endpoint with this address, in both lists.
	Local bool
}

// Service is one port of a Kubernetes Service in one IP family, with its frontends of one kind
// and the [ServiceSpec] for their connections.
//
// A Service is immutable. Create it with [NewService].
type Service struct {
	Key Key
	// Frontends is sorted, has no duplicates and is not empty.
	Frontends []Frontend
	ServiceSpec

	// Serving lists endpoints that keep their existing flows but receive no new ones: terminating
	// pods that still serve, and pods excluded by a traffic policy or a topology hint. It is
	// sorted, has no duplicates, and is set for UDP and SCTP only. A flow to an endpoint that is
	// neither here nor in the ServiceSpec is deleted from connection tracking, so that its client
	// moves to another endpoint. Set it with [Service.WithServing].
	//
	// Serving is not part of the backend contract. Package internal/conntrack reads it, and
	// package ipvs reads it to keep connections of these endpoints. New connections do not depend
	// on it, [State] does not contain it, and a Dataplane writes nothing if only Serving changes.
	Serving []netip.AddrPort
}

// MaxEndpoints is the maximum number of endpoints of a Service. Endpoint slots are 16-bit
// numbers. Kubernetes documents a limit of 1,000 endpoints per EndpointSlice and none per
// Service.
const MaxEndpoints = 1<<16 - 1

// ErrInvalid is wrapped by the errors of [NewService] and [Service.WithServing], which name the
// field and the fix.
var ErrInvalid = errors.New("invalid Service")

// NewService returns a Service with sorted and deduplicated lists, or an error that wraps
// [ErrInvalid]. It takes ownership of the lists: the caller must not modify them afterwards.
// Several Services may share a list that is already sorted and has no duplicates.
func NewService(key Key, frontends []Frontend, spec ServiceSpec) (*Service, error) {
	s := &Service{Key: key, Frontends: frontends, ServiceSpec: spec}
	slices.SortFunc(s.Frontends, Frontend.Compare)
	s.Frontends = slices.Compact(s.Frontends)
	s.normalize()
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrInvalid, key, err)
	}
	return s, nil
}

// WithServing returns a copy of s with the given Serving list, sorted and deduplicated, or an
// error that wraps [ErrInvalid]. It takes ownership of the list. The copy shares all other lists
// with s.
func (s *Service) WithServing(serving []netip.AddrPort) (*Service, error) {
	n := *s
	if !slices.IsSortedFunc(serving, netip.AddrPort.Compare) {
		slices.SortFunc(serving, netip.AddrPort.Compare)
	}
	n.Serving = compact(serving, func(a, b netip.AddrPort) bool { return a == b })
	if err := n.validateServing(); err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrInvalid, s.Key, err)
	}
	return &n, nil
}

func (s *Service) validateServing() error {
	for _, e := range s.Serving {
		if err := validateEndpoint(e, s.Key.Family); err != nil {
			return fmt.Errorf("serving %w", err)
		}
	}
	for _, f := range s.Frontends {
		if len(s.Serving) > 0 && f.Protocol == TCP {
			return fmt.Errorf("frontend %s: serving endpoints with TCP, want UDP or SCTP", f)
		}
	}
	return nil
}

func (s *Service) validate() error {
	if s.Key.Name == "" || s.Key.Namespace == "" {
		return errors.New("the key has no namespace or no name, want both")
	}
	if s.Key.Family != IPv4 && s.Key.Family != IPv6 {
		return fmt.Errorf("the key's family is %s, want IPv4 or IPv6", s.Key.Family)
	}
	if s.Key.Kind > LoadBalancer {
		return fmt.Errorf("the key's kind is %s, want ClusterIP, NodePort, ExternalIP or LoadBalancer", s.Key.Kind)
	}
	if len(s.Frontends) == 0 {
		return errors.New("no frontends, want at least one")
	}
	for _, f := range s.Frontends {
		if f.Protocol != TCP && f.Protocol != UDP && f.Protocol != SCTP {
			return fmt.Errorf("frontend %s: unknown protocol, want TCP, UDP or SCTP", f)
		}
		if err := validateAddrPort(f.Addr, s.Key.Family); err != nil {
			return fmt.Errorf("frontend %s: %w", f, err)
		}
		if f.Addr.Addr().IsUnspecified() != (s.Key.Kind == NodePort) {
			return fmt.Errorf("frontend %s: want the unspecified address for a NodePort and a specific address for any other kind", f)
		}
	}
	return s.ServiceSpec.validate(s.Key.Family)
}

func validateAddrPort(a netip.AddrPort, family Family) error {
	switch {
	case !a.IsValid():
		return errors.New("no address, want an IP address")
	case a.Addr().Is4In6():
		return errors.New("an IPv4-mapped IPv6 address, want an IPv4 address")
	case a.Addr().Zone() != "":
		return errors.New("an address with a zone, want one without a zone")
	case FamilyOf(a.Addr()) != family:
		return fmt.Errorf("not of the Service's family %s", family)
	case a.Port() == 0:
		return errors.New("port 0, want 1 to 65535")
	}
	return nil
}

// validateEndpoint checks the address and port of an endpoint.
func validateEndpoint(a netip.AddrPort, family Family) error {
	if err := validateAddrPort(a, family); err != nil {
		return fmt.Errorf("endpoint %s: %w", a, err)
	}
	if a.Addr().IsUnspecified() {
		return fmt.Errorf("endpoint %s: the unspecified address, want a pod's address", a)
	}
	return nil
}

// Equal reports whether s and o are equal. Both may be nil.
func (s *Service) Equal(o *Service) bool {
	if s == o {
		return true
	}
	if s == nil || o == nil {
		return false
	}
	return s.Key == o.Key &&
		slices.Equal(s.Frontends, o.Frontends) &&
		s.ServiceSpec.Equal(o.ServiceSpec) &&
		slices.Equal(s.Serving, o.Serving)
}
