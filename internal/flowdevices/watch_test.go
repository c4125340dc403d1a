package flowdevices

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
)

// TestWatch follows real interfaces while they come, change and go.
func TestWatch(t *testing.T) {
	t.Parallel()
	ns := nettest.NamespaceT(t)
	handle, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	delivered := make(chan []Device, 100)
	w := New(Options{NetNS: ns.Fd()}, func(devices []Device) { delivered <- devices })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()

	check := func(step string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", step, err)
		}
	}
	var last []string
	await := func(step string, want ...string) {
		t.Helper()
		timeout := time.After(10 * time.Second)
		for {
			if diff := cmp.Diff(fmt.Sprint(want), fmt.Sprint(last)); diff == "" {
				return
			}
			select {
			case devices := <-delivered:
				last = nil
				for _, d := range devices {
					last = append(last, d.Name)
				}
			case <-timeout:
				t.Fatalf("%s: devices %v, want %v", step, last, want)
			}
		}
	}
	// Other interfaces may exist by default, such as sit0.
	var initial []string
	select {
	case devices := <-delivered:
		for _, d := range devices {
			initial = append(initial, d.Name)
		}
		last = initial
	case <-time.After(10 * time.Second):
		t.Fatal("nothing is delivered at the start")
	}
	with := func(names ...string) []string { return append(slices.Clip(initial), names...) }

	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	check("add a bridge", handle.LinkAdd(bridge))
	await("a bridge", with("br0")...)
	// The kernel creates the peer of a veth first.
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth0"}, PeerName: "peer0"}
	check("add a veth", handle.LinkAdd(veth))
	await("a veth", with("br0", "peer0", "veth0")...)
	check("add a port", handle.LinkSetMaster(veth, bridge))
	w.SetPodInterfaces(PodInterfaces{Bridge: "br1"})
	await("a port of a bridge without pods", with("br0", "peer0")...)
	w.SetPodInterfaces(PodInterfaces{Bridge: "br0"})
	await("a port of the pods' bridge", with("br0", "peer0", "veth0")...)
	w.SetPodInterfaces(PodInterfaces{Bridge: "br1"})
	await("again", with("br0", "peer0")...)
	check("remove a port", handle.LinkSetNoMaster(veth))
	await("no port any more", with("br0", "peer0", "veth0")...)
	check("rename", handle.LinkSetName(veth, "veth9"))
	await("another name", with("br0", "peer0", "veth9")...)
	check("delete", handle.LinkDel(bridge))
	await("the bridge is gone", with("peer0", "veth9")...)
	check("delete", handle.LinkDel(veth))
	await("the veth is gone", initial...)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
