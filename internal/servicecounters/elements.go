package servicecounters

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// element identifies a counter. endpoint is the zero AddrPort for the counter of the frontend.
type element struct {
	frontend dataplane.Frontend
	endpoint netip.AddrPort
}

// elementsOf returns the counters of a Service.
func elementsOf(s *dataplane.Service) map[element]struct{} {
	all := map[element]struct{}{}
	for _, f := range s.Frontends {
		all[element{frontend: f}] = struct{}{}
		for _, list := range [][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
			for _, e := range list {
				all[element{f, e.Addr}] = struct{}{}
			}
		}
	}
	return all
}

// key encodes the element like a packet.
func (e element) key() []byte {
	b := appendAddrPort(nil, e.frontend.Addr, byte(e.frontend.Protocol))
	if e.endpoint.IsValid() {
		b = append(b, e.endpoint.Addr().AsSlice()...)
		b = append(binary.BigEndian.AppendUint16(b, e.endpoint.Port()), 0, 0)
	}
	return b
}

// appendAddrPort appends address, protocol and port, each padded to 32 bits.
func appendAddrPort(b []byte, a netip.AddrPort, protocol byte) []byte {
	b = append(b, a.Addr().AsSlice()...)
	b = append(b, protocol, 0, 0, 0)
	return append(binary.BigEndian.AppendUint16(b, a.Port()), 0, 0)
}

// parseElement decodes a key. It reports false for a key of another length.
func parseElement(b []byte, addrLen int) (element, bool) {
	frontendLen := addrLen + 8
	if len(b) != frontendLen && len(b) != frontendLen+addrLen+4 {
		return element{}, false
	}
	addrPort := func(b []byte, port int) netip.AddrPort {
		addr, _ := netip.AddrFromSlice(b[:addrLen])
		return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[port:]))
	}
	e := element{frontend: dataplane.Frontend{Protocol: dataplane.Protocol(b[addrLen]), Addr: addrPort(b, addrLen+4)}}
	if len(b) > frontendLen {
		e.endpoint = addrPort(b[frontendLen:], addrLen)
	}
	return e, true
}

// maxComment is the length of the longest comment that `nft` prints.
const maxComment = 127

// comment returns the comment on the elements of a Service: its name and its kind.
func comment(k dataplane.Key) string {
	kind := " " + k.Kind.String()
	name := k.Service()
	return name[:min(len(name), maxComment-len(kind))] + kind
}

func sortedElements(m map[element]struct{}) []element {
	return slices.SortedFunc(maps.Keys(m), func(a, b element) int {
		if c := a.frontend.Compare(b.frontend); c != 0 {
			return c
		}
		return a.endpoint.Compare(b.endpoint)
	})
}
