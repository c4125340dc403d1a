package kube

import (
	"cmp"
	"encoding/json"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

func FuzzParseAddr(f *testing.F) {
	for _, text := range []string{"10.0.0.1", "010.000.0.1", "fd00::1", "::ffff:10.0.0.1", "fe80::1%eth0", "0.0.0.0", "::", "x", ""} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		addr, err := parseAddr(text)
		if err != nil {
			if addr.IsValid() {
				t.Errorf("%q: got both the address %s and the error %v", text, addr, err)
			}
			return
		}
		if addr.IsUnspecified() || addr.Is4In6() || addr.Zone() != "" {
			t.Errorf("%q: %s", text, addr)
		}
		if again, err := parseAddr(addr.String()); err != nil || again != addr {
			t.Errorf("%q: %s is parsed as %s, %v", text, addr, again, err)
		}
		if ip := net.ParseIP(text); ip != nil && !ip.Equal(addr.AsSlice()) {
			t.Errorf("%q: got %s, but package net returns %s", text, addr, ip)
		}
	})
}

// FuzzSourceRanges checks that for any loadBalancerSourceRanges, the Service is open to all
// clients only if its valid entries say so, and that the dataplane accepts the result.
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
			// The family is open: all valid entries must agree.
			everything, mine, unreadable := false, 0, 0
			for _, entry := range entries {
				p, err := netip.ParsePrefix(trimLeadingZeros(strings.TrimSpace(entry)))
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
				t.Errorf("%q: open to every client of %s without any valid entry", text, family)
			}
		}
	})
}

// trimLeadingZeros removes leading zeros from the octets and the prefix length of an IPv4
// network.
func trimLeadingZeros(text string) string {
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
				t.Errorf("%q: got both %+v and the error %v", text, got, err)
			}
			return
		}
		if got.IsZero() != (strings.TrimSpace(text) == "") {
			t.Errorf("%q: %+v", text, got)
		}
		// The parsed value must select addresses on a node that has them.
		opts := Options{NodePortAddresses: got}
		var local []netip.Addr
		for _, p := range got.CIDRs {
			if p != p.Masked() || p.Addr().Is4In6() {
				t.Errorf("%q: network %s", text, p)
			}
			local = append(local, p.Addr())
		}
		found, _ := nodePortAddrs(opts, networks{localAddrs: local, localAddrsKnown: true}, nil, nil)
		for _, a := range found {
			if !anyContains(got.CIDRs, a) && !a.IsLoopback() && !got.All {
				t.Errorf("%q: %s is served", text, a)
			}
		}
	})
}

// FuzzObjects checks for any JSON of a Service and an EndpointSlice that the dataplane accepts
// the result, that applying the objects again changes nothing, and that deleting them removes
// everything.
func FuzzObjects(f *testing.F) {
	for _, seed := range []struct{ service, slice string }{
		{
			`{"metadata":{"name":"web","namespace":"default"},"spec":{"clusterIP":"10.96.0.1","clusterIPs":["10.96.0.1","fd00::1"],"type":"LoadBalancer",
			"externalIPs":["192.0.2.9","x"],"loadBalancerSourceRanges":["10.0.0.0/8"],"externalTrafficPolicy":"Local","healthCheckNodePort":31000,
			"sessionAffinity":"ClientIP","ports":[{"name":"http","port":80,"nodePort":30080,"protocol":"TCP"}]},
			"status":{"loadBalancer":{"ingress":[{"ip":"203.0.113.1"},{"hostname":"x"},{"ip":"203.0.113.1","ipMode":"Proxy"}]}}}`,
			`{"metadata":{"name":"web-1","namespace":"default","labels":{"kubernetes.io/service-name":"web"}},"addressType":"IPv4",
			"ports":[{"name":"http","port":8080,"protocol":"TCP"}],"endpoints":[{"addresses":["10.244.0.1"],"conditions":{"ready":true},"nodeName":"n"}]}`,
		},
		{
			`{"metadata":{"name":"web"},"spec":{"clusterIPs":["127.0.0.1","::"],"ports":[{"port":-1},{"port":70000,"nodePort":-5,"protocol":"x"}]}}`,
			`{"metadata":{"name":"web-1","labels":{"kubernetes.io/service-name":"web"}},"addressType":"IPv6","ports":[{"port":null}],
			"endpoints":[{},{"addresses":null},{"addresses":["fe80::1%eth0","10.0.0.1"],"hints":{"forZones":[{"name":""}]}}]}`,
		},
		{`{}`, `{}`},
	} {
		f.Add([]byte(seed.service), []byte(seed.slice))
	}
	f.Fuzz(func(t *testing.T, serviceJSON, sliceJSON []byte) {
		service, slice := &corev1.Service{}, &discoveryv1.EndpointSlice{}
		if json.Unmarshal(serviceJSON, service) != nil || json.Unmarshal(sliceJSON, slice) != nil {
			return
		}
		tracker := NewTracker(Options{NodeName: "n"})
		delta := Delta{Services: []*corev1.Service{service}, EndpointSlices: []*discoveryv1.EndpointSlice{slice}}
		got := tracker.Apply(delta)
		for key, s := range got.Changes {
			if s == nil {
				t.Fatalf("%s is deleted before it was added", key)
			}
			if _, err := dataplane.NewService(s.Key, slices.Clone(s.Frontends), s.ServiceSpec); err != nil {
				t.Errorf("%s: the dataplane rejects it: %v", key, err)
			}
		}
		if again := tracker.Apply(delta); len(again.Changes) > 0 || len(again.Problems) > 0 {
			t.Errorf("applying the same objects changes %d keys and reports the problems %v", len(again.Changes), again.Problems)
		}
		gone := tracker.Apply(Delta{
			DeletedServices:       []types.NamespacedName{{Namespace: service.Namespace, Name: service.Name}},
			DeletedEndpointSlices: []types.NamespacedName{{Namespace: slice.Namespace, Name: slice.Name}},
		})
		for key, s := range gone.Changes {
			if s != nil {
				t.Errorf("%s remains after its Service was deleted", key)
			}
		}
		if len(gone.Changes) != len(got.Changes) {
			t.Errorf("%d keys were added and %d deleted", len(got.Changes), len(gone.Changes))
		}
	})
}
