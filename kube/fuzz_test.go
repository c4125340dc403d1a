package kube

import (
	"cmp"
	"net"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"fairlead/dataplane"
)

func FuzzParseAddr(f *testing.F) {
	for _, text := range []string{"10.0.0.1", "010.000.0.1", "fd00::1", "::ffff:10.0.0.1", "fe80::1%eth0", "0.0.0.0", "::", "x", ""} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		addr, err := parseAddr(text)
		if err != nil {
			if addr.IsValid() {
				t.Errorf("%q: an address %s and an error %v", text, addr, err)
			}
			return
		}
		if addr.IsUnspecified() || addr.Is4In6() || addr.Zone() != "" {
			t.Errorf("%q: %s", text, addr)
		}
		if again, err := parseAddr(addr.String()); err != nil || again != addr {
			t.Errorf("%q: %s reads back as %s, %v", text, addr, again, err)
		}
		if ip := net.ParseIP(text); ip != nil && !ip.Equal(addr.AsSlice()) {
			t.Errorf("%q: %s, but package net reads %s", text, addr, ip)
		}
	})
}

// FuzzSourceRanges says that whatever is written in loadBalancerSourceRanges,
// the Service is open to everyone only where the entries that can be read say
// so, and that the dataplane takes the result.
func FuzzSourceRanges(f *testing.F) {
	for _, text := range []string{
		"", "10.0.0.0/8", "10.0.0.0/8,fd00::/8", " 10.1.2.3/8 ,x", "0.0.0.0/0", "::/0,1.2.3.4", "010.0.0.0/8", "::ffff:10.0.0.0/104", ",", "1.2.3.4/-1", "1.2.3.4/+8",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		entries := strings.Split(text, ",")
		if text == "" {
			entries = nil
		}
		svc := newService("web", "10.96.0.1 fd00::1", ingress("192.0.2.1", "2001:db8::1"), sourceRangesOf(entries...))
		got := NewTracker(Options{}).Apply(Delta{Services: []*corev1.Service{svc}})
		for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
			key := dataplane.Key{Namespace: "default", Name: "web", Port: "http", Family: family, Kind: dataplane.LoadBalancer}
			if got.Changes[key] == nil {
				t.Fatalf("%q: %s is not served: %v", text, key, got.Problems)
			}
			ranges := got.Changes[key].SourceRanges
			if len(ranges) > 0 || len(entries) == 0 {
				continue
			}
			// Open: everything that can be read must agree.
			everything, mine, unreadable := false, 0, 0
			for _, entry := range entries {
				p, err := netip.ParsePrefix(withoutZeros(strings.TrimSpace(entry)))
				switch {
				case err != nil:
					unreadable++
				case p.Addr().Is4In6() && p.Bits() >= 96:
					if family == dataplane.IPv4 {
						mine++
						everything = everything || p.Bits() == 96
					}
				case dataplane.FamilyOf(p.Addr()) == family:
					mine++
					everything = everything || p.Bits() == 0
				}
			}
			if !everything && mine > 0 {
				t.Errorf("%q: open to every client of %s", text, family)
			}
			if unreadable == len(entries) && family == dataplane.IPv4 && !strings.Contains(text, ":") {
				t.Errorf("%q: no entry can be read, and it is open to every client of %s", text, family)
			}
		}
	})
}

// withoutZeros removes leading zeros from the octets and the prefix length of an
// IPv4 network.
func withoutZeros(text string) string {
	addr, bits, ok := strings.Cut(text, "/")
	if !ok {
		return text
	}
	decimal := func(text string) string {
		if text == "" {
			return ""
		}
		return cmp.Or(strings.TrimLeft(text, "0"), "0")
	}
	octets := strings.Split(addr, ".")
	for i := range octets {
		if len(octets) == 4 {
			octets[i] = decimal(octets[i])
		}
	}
	return strings.Join(octets, ".") + "/" + decimal(bits)
}

func FuzzParseNodePortAddresses(f *testing.F) {
	for _, text := range []string{"", "primary", "primary,localhost,all", "all,all", "192.0.2.7/24,2001:db8::/32", " primary ,10.0.0.0/8", "x"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		values := strings.Split(text, ",")
		got, err := ParseNodePortAddresses(values)
		if err != nil {
			if !got.IsZero() {
				t.Errorf("%q: %+v and an error %v", text, got, err)
			}
			return
		}
		if got.IsZero() != (strings.TrimSpace(text) == "") {
			t.Errorf("%q: %+v", text, got)
		}
		// What is parsed must mean something to a node with such addresses.
		opts := Options{NodePortAddresses: got}
		var local []netip.Addr
		for _, p := range got.CIDRs {
			if p != p.Masked() || p.Addr().Is4In6() {
				t.Errorf("%q: network %s", text, p)
			}
			local = append(local, p.Addr())
		}
		found := nodePortAddrs(opts, networks{localAddrs: local, known: true}, nil, nil)
		for _, a := range found {
			if !within(got.CIDRs, a) && !a.IsLoopback() && !got.All {
				t.Errorf("%q: %s is served", text, a)
			}
		}
	})
}
