package kube

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestClusterIPOwnedByNode checks that a cluster IP that is also an address of the node is not
// served while the node has it. Addresses of dummy interfaces are exempt, because NodeLocal
// DNSCache uses them. Addresses that no Service can have are never served.
func TestClusterIPOwnedByNode(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{NodeName: "here"})
	served, node := "10.96.0.5:80/TCP ->", "0.0.0.0:30080/TCP ->, masquerade always"
	step := func(what string, d Delta, want want, problems int) {
		t.Helper()
		got := tracker.Apply(d)
		if diff := cmp.Diff(want, serviceTexts(got.Changes)); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", what, diff)
		}
		if len(got.Problems) != problems {
			t.Errorf("%s: problems %v, want %d", what, got.Problems, problems)
		}
	}
	const key, nodeKey = "default/web:http IPv4", "default/web:http IPv4 NodePort"
	step("no interface addresses known", Delta{Services: one(newService("web", "10.96.0.5", nodePorts(30080)))},
		want{key: served, nodeKey: node}, 0)
	step("an interface has it", Delta{LocalAddrs: addrs("10.96.0.5 192.0.2.1")}, want{key: "gone"}, 1)
	step("only a dummy interface has it", Delta{LocalAddrs: addrs("10.96.0.5 192.0.2.1"), VirtualAddrs: addrs("10.96.0.5")}, want{key: served}, 0)
	step("the Node object lists it", Delta{Node: newNode("10.96.0.5")}, want{key: "gone"}, 1)
	step("the Node object no longer lists it", Delta{Node: newNode("192.0.2.1")}, want{key: served}, 0)
	for _, addr := range []string{"127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "::1", "fe80::1", "ff02::1"} {
		step(addr, Delta{Services: one(newService("bad", addr))}, want{}, 1)
	}
}
