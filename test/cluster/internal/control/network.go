package control

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/test/cluster/internal/node"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// bridge connects the nodes and the host of the control plane.
type bridge struct {
	link netlink.Link
}

// createNetwork creates the bridge in the network namespace of the control plane.
func createNetwork() (*bridge, error) {
	for name, value := range map[string]string{
		"net/ipv4/ip_forward":                 "1",
		"net/ipv6/conf/all/forwarding":        "1",
		"net/bridge/bridge-nf-call-iptables":  "0",
		"net/bridge/bridge-nf-call-ip6tables": "0",
		// A load balancer chooses the node by ports too.
		"net/ipv4/fib_multipath_hash_policy": "1",
		"net/ipv6/fib_multipath_hash_policy": "1",
	} {
		path := filepath.Join("/proc/sys", name)
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			return nil, fmt.Errorf("set %s to %s: %w", name, value, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return nil, err
	}
	b := &bridge{link: &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "lan"}}}
	if err := netlink.LinkAdd(b.link); err != nil {
		return nil, fmt.Errorf("create a bridge: %w", err)
	}
	for _, address := range topology.Host() {
		if err := node.AddAddress(b.link, address); err != nil {
			return nil, fmt.Errorf("add address %s: %w", address, err)
		}
	}
	return b, netlink.LinkSetUp(b.link)
}

// connect connects the network namespace of a process to the bridge, in place of an earlier process
// of the node: the kernel removes the interface of a namespace some time after its last process has
// ended.
func (b *bridge) connect(n topology.Node, pid int) error {
	if old, err := netlink.LinkByName(n.Name); err == nil {
		if err := netlink.LinkDel(old); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove interface %s: %w", n.Name, err)
		}
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name, attributes.MasterIndex = n.Name, b.link.Attrs().Index
	veth := &netlink.Veth{LinkAttrs: attributes, PeerName: node.Interface, PeerNamespace: netlink.NsPid(pid)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("create interface %s: %w", n.Name, err)
	}
	if err := netlink.LinkSetUp(veth); err != nil {
		return err
	}
	return node.AddPodRoutes(b.link, n)
}
