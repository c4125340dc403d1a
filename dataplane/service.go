package dataplane

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Protocol is a transport protocol, by its IANA number.
type Protocol uint8

// The protocols a Kubernetes Service port can have.
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

// Family is an IP family. A dual-stack Service port is two Services here, one
// a family.
type Family uint8

// The IP families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String returns IPv4 or IPv6, as Kubernetes spells them in spec.ipFamilies.
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

// FamilyOf returns the family of addr. An IPv4-mapped IPv6 address counts as
// IPv6, so that [NewService] refuses it.
func FamilyOf(addr netip.Addr) Family {
	if addr.Is4() {
		return IPv4
	}
	return IPv6
}

// Kind is what sort of address the frontends of a Service have.
type Kind uint8

// The kinds of frontends that one port of a Kubernetes Service can have.
const (
	ClusterIP    Kind = iota
	NodePort          // the addresses of this node: Frontend.Addr is the unspecified one
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

// Key identifies one port of one Kubernetes Service in one IP family, as far as
// it has frontends of one kind. What a backend can't do for one kind leaves the
// others alone.
type Key struct {
	// Namespace and Name are the Kubernetes Service's.
	Namespace, Name string
	// Port is the name of the Service port; empty where the Service has a
	// single, unnamed port.
	Port string
	// Family is the family of every address in the Service.
	Family Family
	// Kind is the kind of every frontend in the Service.
	Kind Kind
}

// Service returns namespace and name of the Kubernetes Service and the port as
// people write them: namespace/name, or namespace/name:port for a named port.
func (k Key) Service() string {
	if k.Port == "" {
		return k.Namespace + "/" + k.Name
	}
	return k.Namespace + "/" + k.Name + ":" + k.Port
}

// String returns namespace/name:port, the family, and the kind if it is not
// ClusterIP.
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

// Frontend is where clients connect to: a protocol, an address and a port. The
// unspecified address (0.0.0.0 or ::) stands for every address of this node on
// which node ports are served, [Node.NodePortAddrs]; a frontend with one of these
// addresses and the same port goes before it.
//
// A Frontend belongs to at most one Service. Collisions are settled before
// Services reach a Dataplane.
type Frontend struct {
	Protocol Protocol
	Addr     netip.AddrPort
}

// String returns address, port and protocol: "10.96.0.10:80/TCP", or
// "[fd00::10]:80/TCP".
func (f Frontend) String() string { return f.Addr.String() + "/" + f.Protocol.String() }

// Compare orders frontends by address, port and protocol.
func (f Frontend) Compare(o Frontend) int {
	return cmp.Or(f.Addr.Compare(o.Addr), cmp.Compare(f.Protocol, o.Protocol))
}

// Endpoint is where a connection can end: a pod's address and the port the pod
// listens on.
type Endpoint struct {
	Addr netip.AddrPort
	// Local says that the endpoint may be a pod of this node. Such a pod can
	// reach itself through its Service, which works only when that connection
	// is masqueraded (hairpin). It is the pod that is local: if one of several
	// ports of an address is, in either list, [NewService] makes all of them so.
	Local bool
}

// Service is one port of a Kubernetes Service in one IP family with its
// frontends of one kind, and the [ServiceSpec] of the connections to them.
//
// A Service is a value. Make one with [NewService]; once handed over it must
// not be changed.
type Service struct {
	Key Key
	// Frontends are sorted and unique; there is at least one.
	Frontends []Frontend
	ServiceSpec

	// Serving are the endpoints to which no new connection goes and which still
	// serve those that they have: pods that terminate, and pods that a traffic
	// policy or a topology hint leaves out. They are sorted and unique. They are
	// there for UDP and SCTP only, where a flow to an endpoint that is neither here
	// nor in the Treatment is to be forgotten, so that its client moves on. Set it
	// with [Service.WithServing].
	//
	// Serving belongs to connection tracking, not to the contract: internal/conntrack
	// reads it, and package ipvs to let such endpoints keep their connections. New
	// connections do not depend on it, [State] does not have it, and a Dataplane has
	// nothing to write where only this changes.
	Serving []netip.AddrPort
}

// MaxEndpoints is the number of endpoints a Service can have: as many as there
// are 16-bit slots. Kubernetes itself documents 1,000 endpoints a slice and no
// limit a Service.
const MaxEndpoints = 1<<16 - 1

// ErrInvalid is returned by [NewService], wrapped with the field and the fix.
var ErrInvalid = errors.New("invalid Service")

// NewService returns the Service with its lists sorted and free of duplicates,
// or an error that wraps [ErrInvalid]. It takes the lists over: the caller must
// not write to them again. Lists that are sorted and free of duplicates may be
// shared by several Services.
func NewService(key Key, frontends []Frontend, treatment ServiceSpec) (*Service, error) {
	s := &Service{Key: key, Frontends: frontends, ServiceSpec: treatment}
	slices.SortFunc(s.Frontends, Frontend.Compare)
	s.Frontends = slices.Compact(s.Frontends)
	s.normalize()
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrInvalid, key, err)
	}
	return s, nil
}

// WithServing returns a copy of s with this as Serving, sorted and free of
// duplicates, or an error that wraps [ErrInvalid]. It takes the list over, as
// [NewService] does, and shares all others with s.
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
			return fmt.Errorf("frontend %s: want UDP or SCTP where endpoints are listed that serve without new connections", f)
		}
	}
	return nil
}

func (s *Service) validate() error {
	if s.Key.Name == "" || s.Key.Namespace == "" {
		return errors.New("the key has no namespace or no name")
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
			return fmt.Errorf("frontend %s: want the unspecified address for a NodePort, and for nothing else", f)
		}
	}
	return s.ServiceSpec.validate(s.Key.Family)
}

func validateAddrPort(a netip.AddrPort, family Family) error {
	switch {
	case !a.IsValid():
		return errors.New("no address")
	case a.Addr().Is4In6():
		return errors.New("an IPv4-mapped IPv6 address, want plain IPv4")
	case a.Addr().Zone() != "":
		return errors.New("an address with a zone, want one without")
	case FamilyOf(a.Addr()) != family:
		return fmt.Errorf("not of the Service's family %s", family)
	case a.Port() == 0:
		return errors.New("port 0, want 1 to 65535")
	}
	return nil
}

// validateEndpoint says what is wrong with the address of an endpoint.
func validateEndpoint(a netip.AddrPort, family Family) error {
	if err := validateAddrPort(a, family); err != nil {
		return fmt.Errorf("endpoint %s: %w", a, err)
	}
	if a.Addr().IsUnspecified() {
		return fmt.Errorf("endpoint %s: the unspecified address is no pod's", a)
	}
	return nil
}

// Equal reports whether s and o mean the same. Both may be nil.
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
