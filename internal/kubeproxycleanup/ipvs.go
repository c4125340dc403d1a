package kubeproxycleanup

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/ipvs"
)

// linkName is the interface that kube-proxy's mode ipvs binds cluster IPs to.
const linkName = "kube-ipvs0"

// IPVSConnections returns the number of open TCP connections of kube-proxy's virtual servers.
// They end with kube-ipvs0, because the node then no longer accepts their packets.
func IPVSConnections(ctx context.Context) (int, error) {
	link, err := findLink()
	if link == nil || err != nil {
		return 0, err
	}
	servers, err := kubeProxyServers(ctx, link)
	if err != nil {
		return 0, err
	}
	return ipvs.ActiveConnections(servers) //nolint:contextcheck // its netlink requests take milliseconds
}

// removeIPVS removes kube-proxy's virtual servers, which it recognizes by the addresses of
// kube-ipvs0 and the ports in kube-proxy's sets, and kube-ipvs0.
func removeIPVS(ctx context.Context, report func(string)) error {
	link, err := findLink()
	if link == nil || err != nil {
		return err
	}
	servers, err := kubeProxyServers(ctx, link)
	if err != nil {
		return fmt.Errorf("find kube-proxy's IPVS virtual servers: %w; to see them, run: ipvsadm -Ln", err)
	}
	deleted, err := ipvs.DeleteOtherServers(servers) //nolint:contextcheck // its netlink requests take milliseconds
	if deleted > 0 {
		report(fmt.Sprintf("%d IPVS virtual servers of kube-proxy", deleted))
	}
	if err != nil {
		err = fmt.Errorf("some of kube-proxy's IPVS virtual servers remain: %w; to delete one, run: ipvsadm -D", err)
	}
	if linkErr := netlink.LinkDel(link); linkErr != nil {
		return errors.Join(err, fmt.Errorf("interface %s remains: %w; to delete it, run: ip link delete %[1]s", linkName, linkErr))
	}
	report("interface " + linkName)
	return err
}

// findLink returns the interface kube-ipvs0, or nil if it does not exist.
func findLink() (netlink.Link, error) {
	link, err := netlink.LinkByName(linkName)
	if notFound := (netlink.LinkNotFoundError{}); errors.As(err, &notFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", linkName, err)
	}
	return link, nil
}

// kubeProxyServers returns kube-proxy's virtual servers. Those of node ports have addresses of
// other interfaces.
func kubeProxyServers(ctx context.Context, link netlink.Link) ([]ipvs.OtherServer, error) {
	bound, local := map[netip.Addr]bool{}, map[netip.Addr]bool{}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		addr, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		if addr = addr.Unmap(); a.LinkIndex == link.Attrs().Index {
			bound[addr] = true
		} else {
			local[addr] = true
		}
	}
	ports := map[dataplane.Protocol]map[uint16]bool{dataplane.TCP: {}, dataplane.UDP: {}}
	for set, protocol := range nodePortSets() {
		if err := addNodePorts(ctx, set, ports[protocol]); err != nil {
			return nil, err
		}
	}
	return ipvs.OtherServers(func(s ipvs.OtherServer) bool { //nolint:contextcheck // its netlink requests take milliseconds
		return bound[s.Addr.Addr()] || local[s.Addr.Addr()] && ports[s.Protocol][s.Addr.Port()]
	})
}
