package nft

import (
	"bytes"
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// FuzzElements encodes a frontend, a slot and an endpoint from the input and checks that
// parsing returns the same values. It also feeds the input to the parsers. They must not
// panic, and must reject input that they would encode differently.
func FuzzElements(f *testing.F) {
	f.Add([]byte{10, 96, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0, 10, 1, 0, 1, 0x1f, 0x90, 0, 0}, uint16(3), false)
	f.Add(bytes.Repeat([]byte{0xfd}, 56), uint16(0xffff), true)
	f.Fuzz(func(t *testing.T, b []byte, slot uint16, v6 bool) {
		table := newTable(dataplane.IPv4)
		if v6 {
			table = newTable(dataplane.IPv6)
		}
		parseElement(b)
		_ = parseElements(b, func(element, bool) {})
		if f, _, err := table.parseFrontend(b); err == nil {
			l := endpointList(slot & 1)
			key := table.encodeSlotKey(f, l, uint32(slot))
			if gotFrontend, gotList, got, err := table.parseSlot(key); err != nil || got != int(slot) || gotFrontend != f || gotList != l {
				t.Fatalf("slot %d of list %d of %v became %d of %d of %v, %v", slot, l, f, got, gotList, gotFrontend, err)
			}
			if gotFrontend, got, err := table.parseSticky(table.encodeStickyKey(f, endpointID(slot))); err != nil || got != endpointID(slot) || gotFrontend != f {
				t.Fatalf("ID %d of %v became %d of %v, %v", slot, f, got, gotFrontend, err)
			}
			p := netip.PrefixFrom(f.Addr.Addr(), int(slot)%(8*table.addrLen+1)).Masked()
			if gotFrontend, got, err := table.parseSourceRangeKey(table.encodeSourceRangeKey(f, p), p.Bits()); err != nil || got != p || gotFrontend != f {
				t.Fatalf("range %v of %v became %v of %v, %v", p, f, got, gotFrontend, err)
			}
			a, err := table.parseAddrPort(b)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := table.parseAddrPort(table.encodeAddrPort(a)); err != nil || got != a {
				t.Fatalf("endpoint %v became %v, %v", a, got, err)
			}
			got, gotFrontend, err := table.parseHairpin(table.encodeHairpinKey(a.Addr(), f))
			if err != nil || got != a.Addr() || gotFrontend != f {
				t.Fatalf("hairpin of %v and %v became %v and %v, %v", a, f, got, gotFrontend, err)
			}
		}
		if f, l, slot, err := table.parseSlot(b); err == nil && len(b) != len(table.encodeSlotKey(f, l, uint32(slot))) {
			t.Fatalf("%x was parsed as slot %d of %v", b, slot, f)
		}
		if c, err := table.parseClass(b); err == nil && !bytes.Equal(table.encodeClass(c), b) {
			t.Fatalf("%x was parsed as class %d", b, c)
		}
		_, _, _ = table.parseHairpin(b)
	})
}
