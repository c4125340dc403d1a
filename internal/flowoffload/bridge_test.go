package flowoffload

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
	"fairlead.io/fairlead/internal/kmod"
	"fairlead.io/fairlead/internal/nettest"
)

// bridge adds a bridge to the node, with pods whose interfaces belong to it, as the CNI plugin bridge does.
func (n *testNode) bridge(pods int) (hosts []*nettest.Host) {
	n.t.Helper()
	check := func(err error) {
		n.t.Helper()
		if err != nil {
			n.t.Fatal(err)
		}
	}
	node, err := netlink.NewHandleAt(netns.NsHandle(n.Node.Fd()), unix.NETLINK_ROUTE)
	check(err)
	defer node.Close()
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}}
	check(node.LinkAdd(bridge))
	check(node.LinkSetUp(bridge))
	gateway := &net.IPNet{IP: net.IPv4(10, 244, 200, 1), Mask: net.CIDRMask(24, 32)}
	check(node.AddrAdd(bridge, &netlink.Addr{IPNet: gateway}))
	for i := range pods {
		addr := netip.AddrFrom4([4]byte{10, 244, 200, byte(10 + i)})
		host, err := nettest.NewStandaloneHost(fmt.Sprintf("bridged%d", i+1), addr)
		check(err)
		n.t.Cleanup(func() { _ = host.Close() })
		veth := netlink.NewVeth(netlink.LinkAttrs{Name: fmt.Sprintf("port%d", i+1), MasterIndex: bridge.Index, TxQLen: -1})
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(host.Fd())
		check(node.LinkAdd(veth))
		check(node.LinkSetUp(veth))
		check(node.LinkSetHairpin(veth, true))
		pod, err := netlink.NewHandleAt(netns.NsHandle(host.Fd()), unix.NETLINK_ROUTE)
		check(err)
		eth, err := pod.LinkByName("eth0")
		check(err)
		check(pod.LinkSetUp(eth))
		subnet := &net.IPNet{IP: gateway.IP.Mask(gateway.Mask), Mask: gateway.Mask}
		check(pod.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: subnet, Scope: netlink.SCOPE_LINK, Src: addr.AsSlice()}))
		check(pod.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: gateway.IP, Src: addr.AsSlice()}))
		pod.Close()
		host.ServeT(n.t, nettest.TCP, podPort)
		host.ServeT(n.t, nettest.UDP, podPort)
		hosts = append(hosts, host)
	}
	return hosts
}

// loadBridgeNetfilter loads the module br_netfilter in a virtual machine. On another machine it would
// change how all bridges filter packets.
func loadBridgeNetfilter(t *testing.T) {
	t.Helper()
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(strings.Fields(string(cmdline)), "fairlead.vm=1") {
		if err := kmod.Load("br_netfilter"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBridge checks connections of pods in a bridge, whose packets the flowtable sends from one port of
// the bridge to another interface.
func TestBridge(t *testing.T) {
	n := newTestNode(t)
	loadBridgeNetfilter(t)
	bridged := n.bridge(2)
	if err := n.Node.Do(func() error { return os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("1"), 0) }); err != nil {
		t.Skipf("the kernel has no bridge netfilter: %v", err)
	}
	spec := func(hosts ...*nettest.Host) (s dataplane.ServiceSpec) {
		for _, h := range hosts {
			s.Endpoints = append(s.Endpoints, dataplane.Endpoint{Addr: netip.AddrPortFrom(h.IPv4, podPort), Local: true})
		}
		return s
	}
	n.node.PodInterface, n.node.PodCIDRs = "cni0", nil
	n.replace(
		dataplanetest.NewService(t, "bridged", dataplane.ClusterIP, spec(bridged[1]), "tcp 10.96.0.10:80", "udp 10.96.0.10:80"),
		dataplanetest.NewService(t, "routed", dataplane.ClusterIP, spec(n.pods[0]), "tcp 10.96.0.11:80"),
		dataplanetest.NewService(t, "self", dataplane.ClusterIP, spec(bridged[0]), "tcp 10.96.0.12:80"),
	)
	for _, test := range []struct {
		name string
		from *nettest.Host
		to   string
		// want says that the connection must be offloaded. It must work in any case.
		want bool
	}{
		{"from outside to a port of the bridge", n.Outside, "tcp 10.96.0.10:80", true},
		{"from a routed pod", n.pods[0], "udp 10.96.0.10:80", n.dp.table.withUDP},
		{"from a port of the bridge to a routed pod", bridged[0], "tcp 10.96.0.11:80", true},
		{"between ports of the bridge", bridged[0], "tcp 10.96.0.10:80", false},
		{"from a port to itself", bridged[0], "tcp 10.96.0.12:80", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			n.t = t
			c := n.open(test.from, test.to)
			c.ask(2 * threshold)
			// The bridge may not have learned all addresses yet.
			for deadline := time.Now().Add(3 * time.Second); !n.offloaded(c.client) && time.Now().Before(deadline); {
				c.ask(2)
			}
			t.Logf("offloaded %t, bypasses the hook %t", n.offloaded(c.client), c.bypasses())
			if test.want {
				c.awaitOffload()
			}
			c.ask(50)
		})
	}
	n.t = t
}
