package nft

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
)

// bigEndian reports the byte order of this machine.
func bigEndian() bool { return binary.NativeEndian.Uint16([]byte{0, 1}) == 1 }

// TestByteOrder checks the bytes of elements and expressions. Addresses and ports are in network
// byte order everywhere. Packet priorities are numbers in host byte order, because the kernel
// generates slots and compares the priorities with masks. A class is the exception: the tables
// only look it up.
func TestByteOrder(t *testing.T) {
	t.Parallel()
	v4 := newTable(dataplane.IPv4)
	front := dataplane.Frontend{Addr: netip.MustParseAddrPort("10.96.0.1:80"), Protocol: dataplane.TCP}
	const frontend = "0a600001" + "06000000" + "00500000"
	match := func(exprs []expr.Any) []byte {
		var b []byte
		for _, e := range exprs {
			switch e := e.(type) {
			case *expr.Bitwise:
				b = append(b, e.Mask...)
			case *expr.Cmp:
				b = append(b, e.Data...)
			}
		}
		return b
	}
	for name, test := range map[string]struct {
		got         []byte
		little, big string
	}{
		"frontend":                   {v4.encodeFrontend(front), frontend, frontend},
		"class":                      {v4.encodeClass(classNodePort | 3), "00400003", "00400003"},
		"port":                       {encodePort(8080), "1f90", "1f90"},
		"endpoint":                   {v4.encodeAddrPort(front.Addr), "0a60000100500000", "0a60000100500000"},
		"slot 3 of the cluster list": {v4.encodeSlotKey(front, clusterEndpoints, 3), frontend + "03001dfa", frontend + "fa1d0003"},
		"slot 258 of the local list": {v4.encodeSlotKey(front, localEndpoints, 258), frontend + "02011cfa", frontend + "fa1c0102"},
		"endpoint ID 1234":           {v4.encodeEndpointID(0x1234), "1234fafa", "fafa3412"},
		"client of endpoint ID 1234": {v4.encodeStickyKey(front, 0x1234), frontend + "1234fafa", frontend + "fafa3412"},
		"list ID":                    {v4.encodeListID(0x0102), "020118fa", "fa180102"},
		"slot in a list":             {v4.encodeListSlotKey(0x0102, clusterEndpoints, 3), "020118fa03001dfa", "fa180102fa1d0003"},
		"match slots":                {match(matchSlot()), "0000feff00001cfa", "fffe0000fa1c0000"},
		"match endpoint IDs":         {match(matchEndpointID()), "0000ffff0000fafa", "ffff0000fafa0000"},
		"match cluster endpoint IDs": {match(matchEndpointIDInList(clusterEndpoints)), "0001ffff0000fafa", "ffff0100fafa0000"},
		"match local endpoint IDs":   {match(matchEndpointIDInList(localEndpoints)), "0001ffff0001fafa", "ffff0100fafa0100"},
		"match new and invalid":      {match(matchNewOrInvalid()), "0900000000000000", "0000000900000000"},
		"match new connections":      {match(matchCtStateNew()), "0800000000000000", "0000000800000000"},
		"match local source address": {match(matchSourceLocal(expr.CmpOpEq)), "02000000", "00000002"},
	} {
		want := test.little
		if bigEndian() {
			want = test.big
		}
		if got := hex.EncodeToString(test.got); got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}

// TestPrioritiesAreDistinct checks that no priority is in two of the ranges that rules
// distinguish, with the numbers that the kernel compares.
func TestPrioritiesAreDistinct(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		kind         string
		priority     func(n uint16) uint32
		isID, isSlot bool
	}{
		{"cluster slot", func(n uint16) uint32 { return clusterEndpoints.slotBase() | uint32(n) }, false, true},
		{"local slot", func(n uint16) uint32 { return localEndpoints.slotBase() | uint32(n) }, false, true},
		{"endpoint ID", func(n uint16) uint32 { return endpointID(n).priority() }, true, false},
		{"list ID", func(n uint16) uint32 { return listIDBase | uint32(n) }, false, false},
	} {
		for n := range 1 << 16 {
			priority := test.priority(uint16(n)) //nolint:gosec // below 1 << 16
			if got := priority&endpointIDMask == endpointIDMajor; got != test.isID {
				t.Fatalf("%s %#x is matched as endpoint ID: %t", test.kind, priority, got)
			}
			if got := priority&slotMask == slotMajor; got != test.isSlot {
				t.Fatalf("%s %#x is matched as slot: %t", test.kind, priority, got)
			}
		}
	}
}
