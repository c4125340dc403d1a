package kube

import (
	"net/netip"
	"strings"
	"testing"
)

func TestSubtractOverlaps(t *testing.T) {
	for name, test := range map[string]struct {
		services, pods, own string
		want, overlaps      string
	}{
		"no overlap":                          {"10.96.0.0/16", "10.244.0.0/16", "192.0.2.1", "10.96.0.0/16", ""},
		"inside a larger pod network":         {"10.96.0.0/16", "10.0.0.0/8", "192.0.2.1", "10.96.0.0/16", ""},
		"contains a pod network":              {"10.244.0.0/15", "10.244.0.0/16", "", "10.245.0.0/16", "10.244.0.0/15 10.244.0.0/16"},
		"equal to the pod network":            {"10.244.0.0/16", "10.244.0.0/16", "", "", "10.244.0.0/16 10.244.0.0/16"},
		"contains an address of this node":    {"192.0.2.0/30", "", "192.0.2.1", "192.0.2.0/32 192.0.2.2/31", "192.0.2.0/30 192.0.2.1/32"},
		"contains two addresses of this node": {"192.0.2.0/30", "", "192.0.2.1 192.0.2.2", "192.0.2.0/32 192.0.2.3/32", "192.0.2.0/30 192.0.2.1/32, 192.0.2.0/30 192.0.2.2/32"},
		"the other family is ignored":         {"fd00::/112 10.96.0.0/16", "10.244.0.0/16", "2001:db8::1", "fd00::/112 10.96.0.0/16", ""},
		"IPv6":                                {"fd00::/126", "fd00::2/127", "", "fd00::/127", "fd00::/126 fd00::2/127"},
	} {
		t.Run(name, func(t *testing.T) {
			own := map[netip.Addr]struct{}{}
			for a := range strings.FieldsSeq(test.own) {
				own[netip.MustParseAddr(a)] = struct{}{}
			}
			got, overlaps := subtractOverlaps(parseNetworks(strings.Fields(test.services)), parseNetworks(strings.Fields(test.pods)), own)
			var texts, pairs []string
			for _, p := range got {
				texts = append(texts, p.String())
			}
			for _, o := range overlaps {
				pairs = append(pairs, o.ServiceCIDR.String()+" "+o.Other.String())
			}
			if joined := strings.Join(texts, " "); joined != test.want {
				t.Errorf("got %q, want %q", joined, test.want)
			}
			if joined := strings.Join(pairs, ", "); joined != test.overlaps {
				t.Errorf("overlaps are %q, want %q", joined, test.overlaps)
			}
		})
	}
}

// FuzzSubtract checks for any address that the result contains it if and only if the first
// network contains it and the second does not.
func FuzzSubtract(f *testing.F) {
	f.Add([]byte{10, 0, 0, 0}, uint8(8), []byte{10, 96, 0, 0}, uint8(12), []byte{10, 96, 0, 1})
	f.Add([]byte{10, 0, 0, 0}, uint8(32), []byte{10, 0, 0, 0}, uint8(0), []byte{10, 0, 0, 0})
	f.Fuzz(func(t *testing.T, a []byte, aBits uint8, b []byte, bBits uint8, c []byte) {
		addrA, okA := netip.AddrFromSlice(a)
		addrB, okB := netip.AddrFromSlice(b)
		addr, okC := netip.AddrFromSlice(c)
		if !okA || !okB || !okC {
			return
		}
		p, errP := addrA.Prefix(int(aBits))
		o, errO := addrB.Prefix(int(bBits))
		if errP != nil || errO != nil {
			return
		}
		in := 0
		for _, part := range subtract(nil, p, o) {
			if part.Contains(addr) {
				in++
			}
		}
		if want := p.Contains(addr) && !o.Contains(addr); (in == 1) != want || in > 1 {
			t.Errorf("%s without %s has %s in %d of its networks, want it in one: %t", p, o, addr, in, want)
		}
	})
}
