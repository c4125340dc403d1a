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

// Key identifies one port of one Service in one IP family.
type Key struct {
	// Namespace and Name are the Kubernetes Service's.
	Namespace, Name string
	// Port is the name of the Service port; empty where the Service has a
	// single, unnamed port.
	Port string
	// Family is the family of every address in the Service.
	Family Family
}

// Service returns the key without its family as people write it:
// namespace/name, or namespace/name:port for a named port.
func (k Key) Service() string {
	if k.Port == "" {
		return k.Namespace + "/" + k.Name
	}
	return k.Namespace + "/" + k.Name + ":" + k.Port
}

// String returns namespace/name:port and the family.
func (k Key) String() string { return k.Service() + " " + k.Family.String() }

// Compare orders keys by namespace, name, port and family.
func (k Key) Compare(o Key) int {
	return cmp.Or(
		strings.Compare(k.Namespace, o.Namespace),
		strings.Compare(k.Name, o.Name),
		strings.Compare(k.Port, o.Port),
		cmp.Compare(k.Family, o.Family),
	)
}

// Frontend is where clients connect to: a protocol, an address and a port. The
// unspecified address (0.0.0.0 or ::) stands for every address of this node on
// which node ports are served.
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
	// ports of an address is, [NewService] makes all of them so.
	Local bool
}

// Service is one port of a Kubernetes Service in one IP family: connections to
// any of its frontends go to one of its endpoints, chosen at random. Without
// endpoints they are rejected.
//
// A Service is a value. Make one with [NewService]; once handed over it must
// not be changed.
type Service struct {
	Key Key
	// Frontends are sorted and unique; there is at least one.
	Frontends []Frontend
	// Endpoints are sorted by address and unique. Their order has no meaning.
	Endpoints []Endpoint
}

// MaxEndpoints is the number of endpoints a Service can have: as many as there
// are 16-bit slots. Kubernetes itself documents 1,000 endpoints a slice and no
// limit a Service.
const MaxEndpoints = 1<<16 - 1

// ErrInvalid is returned by [NewService], wrapped with the field and the fix.
var ErrInvalid = errors.New("invalid Service")

// NewService returns the Service with its frontends and endpoints sorted and
// free of duplicates, or an error that wraps [ErrInvalid]. It takes the slices
// over: the caller must not use them again.
func NewService(key Key, frontends []Frontend, endpoints []Endpoint) (*Service, error) {
	s := &Service{Key: key, Frontends: frontends, Endpoints: endpoints}
	slices.SortFunc(s.Frontends, Frontend.Compare)
	s.Frontends = slices.Compact(s.Frontends)
	slices.SortFunc(s.Endpoints, func(a, b Endpoint) int {
		return a.Addr.Compare(b.Addr)
	})
	shareLocal(s.Endpoints)
	s.Endpoints = slices.CompactFunc(s.Endpoints, func(a, b Endpoint) bool { return a.Addr == b.Addr })
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrInvalid, key, err)
	}
	return s, nil
}

// shareLocal makes all endpoints of an address local if one of them is. They are
// sorted, so they stand together.
func shareLocal(endpoints []Endpoint) {
	for len(endpoints) > 0 {
		n := 1
		local := endpoints[0].Local
		for n < len(endpoints) && endpoints[n].Addr.Addr() == endpoints[0].Addr.Addr() {
			local = local || endpoints[n].Local
			n++
		}
		for i := range endpoints[:n] {
			endpoints[i].Local = local
		}
		endpoints = endpoints[n:]
	}
}

func (s *Service) validate() error {
	if s.Key.Name == "" || s.Key.Namespace == "" {
		return errors.New("the key has no namespace or no name")
	}
	if s.Key.Family != IPv4 && s.Key.Family != IPv6 {
		return fmt.Errorf("the key's family is %s, want IPv4 or IPv6", s.Key.Family)
	}
	if len(s.Frontends) == 0 {
		return errors.New("no frontends, want at least one")
	}
	if n := len(s.Endpoints); n > MaxEndpoints {
		return fmt.Errorf("%d endpoints, want at most %d", n, MaxEndpoints)
	}
	for _, f := range s.Frontends {
		if f.Protocol != TCP && f.Protocol != UDP && f.Protocol != SCTP {
			return fmt.Errorf("frontend %s: unknown protocol, want TCP, UDP or SCTP", f)
		}
		if err := checkAddr(f.Addr, s.Key.Family); err != nil {
			return fmt.Errorf("frontend %s: %w", f, err)
		}
	}
	for _, e := range s.Endpoints {
		if err := checkAddr(e.Addr, s.Key.Family); err != nil {
			return fmt.Errorf("endpoint %s: %w", e.Addr, err)
		}
		if e.Addr.Addr().IsUnspecified() {
			return fmt.Errorf("endpoint %s: the unspecified address is no pod's", e.Addr)
		}
	}
	return nil
}

func checkAddr(a netip.AddrPort, family Family) error {
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
		slices.Equal(s.Endpoints, o.Endpoints)
}
