package kube

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// A family of node ports without an address is reported once until an address serves it.
func TestNodePortsWithoutAddress(t *testing.T) {
	t.Parallel()
	key := dataplane.Key{Namespace: "shop", Name: "web", Family: dataplane.IPv4, Kind: dataplane.NodePort}
	cluster := dataplane.Key{Namespace: "shop", Name: "web", Family: dataplane.IPv6}
	served := dataplane.Node{NodePortNetworks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	var c nodePortCheck
	steps := []struct {
		name string
		do   func()
		want bool
	}{
		{"no node port", func() { c.updateServices(map[dataplane.Key]*dataplane.Service{cluster: {}}) }, false},
		{"a node port", func() { c.updateServices(map[dataplane.Key]*dataplane.Service{key: {}}) }, true},
		{"again", func() {}, false},
		{"a network", func() { c.setNode(served, nil) }, false},
		{"an address of the other family", func() { c.setNode(dataplane.Node{NodePortAddrs: []netip.Addr{netip.IPv6Loopback()}}, nil) }, true},
		{"a loopback address", func() { c.setNode(dataplane.Node{}, []netip.Addr{netip.MustParseAddr("127.0.0.1")}) }, false},
		{"neither", func() {
			c.updateServices(map[dataplane.Key]*dataplane.Service{key: nil})
			c.setNode(dataplane.Node{}, nil)
		}, false},
	}
	for _, step := range steps {
		step.do()
		got := c.newlyWithoutAddress()
		if len(got) > 0 != step.want || step.want && (len(got) != 1 || got[0] != NodePortsWithoutAddress{Family: dataplane.IPv4, Example: key}) {
			t.Errorf("%s: %v, want a report: %t", step.name, got, step.want)
		}
	}
}

func TestIsPriority(t *testing.T) {
	t.Parallel()
	for namespace, want := range map[string]bool{"kube-system": true, "kube-system-2": false, "default": false} {
		if got := IsPriority(dataplane.Key{Namespace: namespace, Name: "dns"}); got != want {
			t.Errorf("%s: %t", namespace, got)
		}
	}
}
