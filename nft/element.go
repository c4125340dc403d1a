package nft

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// element is an element of a set or map. In a concatenation, each part is padded to 32
// bits. Numbers are in network byte order, except slots, list IDs and endpoint IDs, which are
// packet priorities in host byte order: the kernel's numgen expression generates slots, and
// rules compare the major number of priorities.
type element = nftables.SetElement

func (t *table) appendFrontend(b []byte, f dataplane.Frontend) []byte {
	b = append(b, f.Addr.Addr().AsSlice()...)
	b = append(b, byte(f.Protocol), 0, 0, 0)
	return appendPort(b, f.Addr.Port())
}

func appendPort(b []byte, port uint16) []byte {
	return append(binary.BigEndian.AppendUint16(b, port), 0, 0)
}

func (t *table) encodeFrontend(f dataplane.Frontend) []byte {
	return t.appendFrontend(make([]byte, 0, t.addrLen+8), f)
}

func (t *table) encodeSlotKey(f dataplane.Frontend, l endpointList, slot uint32) []byte {
	b := t.appendFrontend(make([]byte, 0, t.addrLen+12), f)
	return binary.NativeEndian.AppendUint32(b, l.slotBase()|slot)
}

// encodeEndpointID encodes an ID as a packet priority.
func (*table) encodeEndpointID(n endpointID) []byte {
	return binary.NativeEndian.AppendUint32(nil, n.priority())
}

func (t *table) encodeStickyKey(f dataplane.Frontend, n endpointID) []byte {
	b := t.appendFrontend(make([]byte, 0, t.addrLen+12), f)
	return append(b, t.encodeEndpointID(n)...)
}

func (t *table) encodeSourceRangeKey(f dataplane.Frontend, p netip.Prefix) []byte {
	b := t.appendFrontend(make([]byte, 0, 2*t.addrLen+8), f)
	return append(b, p.Addr().AsSlice()...)
}

// encodeClass encodes a class in network byte order, although it becomes the packet's
// priority, because `nft` prints it in this order: 0:3 for three slots.
func (*table) encodeClass(c serviceClass) []byte {
	return binary.BigEndian.AppendUint32(nil, uint32(c))
}

func (t *table) encodeAddrPort(a netip.AddrPort) []byte {
	b := append(make([]byte, 0, t.addrLen+4), a.Addr().AsSlice()...)
	return appendPort(b, a.Port())
}

func (t *table) encodeHairpinKey(a netip.Addr, f dataplane.Frontend) []byte {
	b := make([]byte, 0, 3*t.addrLen+8)
	b = append(b, a.AsSlice()...)
	b = append(b, a.AsSlice()...)
	return t.appendFrontend(b, f)
}

// errUnexpectedElement is returned for an element that this package never writes.
var errUnexpectedElement = errors.New("element is not in a format of this package")

func (t *table) parseFrontend(b []byte) (dataplane.Frontend, []byte, error) {
	if len(b) < t.addrLen+8 {
		return dataplane.Frontend{}, nil, errUnexpectedElement
	}
	addr, _ := netip.AddrFromSlice(b[:t.addrLen])
	b = b[t.addrLen:]
	f := dataplane.Frontend{
		Protocol: dataplane.Protocol(b[0]),
		Addr:     netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[4:])),
	}
	return f, b[8:], nil
}

func (t *table) parseSlot(b []byte) (dataplane.Frontend, endpointList, int, error) {
	f, rest, err := t.parseFrontend(b)
	if err != nil || len(rest) != 4 {
		return f, 0, 0, errUnexpectedElement
	}
	slot := binary.NativeEndian.Uint32(rest)
	for l := range numEndpointLists {
		if slot&^uint32(classSizeMask) == l.slotBase() {
			return f, l, int(slot & uint32(classSizeMask)), nil
		}
	}
	return f, 0, 0, errUnexpectedElement
}

func (*table) parseID(b []byte) (endpointID, error) {
	if len(b) != 4 {
		return 0, errUnexpectedElement
	}
	priority := binary.NativeEndian.Uint32(b)
	if priority&endpointIDMask != endpointIDMajor {
		return 0, errUnexpectedElement
	}
	return endpointID(bits.ReverseBytes16(uint16(priority))), nil //nolint:gosec // the minor number
}

func (t *table) parseSticky(b []byte) (dataplane.Frontend, endpointID, error) {
	f, rest, err := t.parseFrontend(b)
	if err != nil {
		return f, 0, err
	}
	n, err := t.parseID(rest)
	return f, n, err
}

func (t *table) parseSourceRangeKey(b []byte, prefixLength int) (dataplane.Frontend, netip.Prefix, error) {
	f, rest, err := t.parseFrontend(b)
	if err != nil || len(rest) != t.addrLen {
		return f, netip.Prefix{}, errUnexpectedElement
	}
	addr, _ := netip.AddrFromSlice(rest)
	p := netip.PrefixFrom(addr, prefixLength)
	if p != p.Masked() {
		return f, p, errUnexpectedElement
	}
	return f, p, nil
}

func (*table) parseClass(b []byte) (serviceClass, error) {
	if len(b) != 4 {
		return 0, errUnexpectedElement
	}
	return serviceClass(binary.BigEndian.Uint32(b)), nil
}

func (t *table) parseAddrPort(b []byte) (netip.AddrPort, error) {
	if len(b) < t.addrLen+2 {
		return netip.AddrPort{}, errUnexpectedElement
	}
	addr, _ := netip.AddrFromSlice(b[:t.addrLen])
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[t.addrLen:])), nil
}

func (t *table) parseHairpin(b []byte) (netip.Addr, dataplane.Frontend, error) {
	n := t.addrLen
	if len(b) < 2*n || !slices.Equal(b[:n], b[n:2*n]) {
		return netip.Addr{}, dataplane.Frontend{}, errUnexpectedElement
	}
	addr, _ := netip.AddrFromSlice(b[:n])
	f, _, err := t.parseFrontend(b[2*n:])
	return addr, f, err
}

// intervalElements returns the elements of an interval set for prefixes that do not
// overlap: the first address of each, and the first address after it.
func intervalElements(prefixes []netip.Prefix) []element {
	var elements []element
	for _, p := range prefixes {
		elements = append(elements, element{Key: p.Addr().AsSlice()})
		if end := lastAddr(p).Next(); end.IsValid() {
			elements = append(elements, element{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return elements
}

func lastAddr(p netip.Prefix) netip.Addr {
	b, mask := p.Addr().AsSlice(), make([]byte, p.Addr().BitLen()/8)
	setLeadingBits(mask, p.Bits())
	for i := range b {
		b[i] |= ^mask[i]
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// setLeadingBits sets the first n bits.
func setLeadingBits(b []byte, n int) {
	for i := range n {
		b[i/8] |= 0x80 >> (i % 8)
	}
}
