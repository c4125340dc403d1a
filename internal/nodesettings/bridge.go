package nodesettings

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// bridge is a network bridge.
type bridge struct {
	index int
	name  string
	ports int
	addrs []netip.Addr
}

// carriesPods reports whether the bridge carries pods of a family: it has an address in a pod
// network, or any address if the pod networks are unknown.
func (b bridge) carriesPods(pods PodNetwork, ipv6 bool) bool {
	return slices.ContainsFunc(b.addrs, func(a netip.Addr) bool {
		if a.Is4() == ipv6 || a.IsLinkLocalUnicast() {
			return false
		}
		if b.name == pods.Bridge || len(pods.CIDRs) == 0 && pods.Bridge == "" {
			return true
		}
		return slices.ContainsFunc(pods.CIDRs, func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// listBridges returns the bridges in the network namespace of the calling thread.
func listBridges() ([]bridge, error) {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket to list bridges: %w", err)
	}
	// struct ifinfomsg with AF_UNSPEC, see linux/rtnetlink.h.
	messages, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, unix.SizeofIfInfomsg),
	})
	if err := errors.Join(err, conn.Close()); err != nil {
		return nil, fmt.Errorf("list bridges: %w", err)
	}
	var bridges []bridge
	ports := map[int]int{}
	for _, m := range messages {
		l, err := parseLink(m)
		if err != nil {
			return nil, fmt.Errorf("list bridges: %w", err)
		}
		if l.master != 0 {
			ports[l.master]++
		}
		if l.kind == "bridge" {
			bridges = append(bridges, bridge{index: l.index, name: l.name})
		}
	}
	for i, b := range bridges {
		bridges[i].ports = ports[b.index]
		bridges[i].addrs = bridgeAddrs(b)
	}
	return bridges, nil
}

// bridgeAddrs returns the addresses of a bridge, or none if the bridge was deleted.
func bridgeAddrs(b bridge) []netip.Addr {
	ifAddrs, err := (&net.Interface{Index: b.index, Name: b.name}).Addrs()
	if err != nil {
		return nil
	}
	var addrs []netip.Addr
	for _, a := range ifAddrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			addrs = append(addrs, p.Addr().Unmap())
		}
	}
	return addrs
}

// link is the decoded message about an interface.
type link struct {
	index, master int
	name, kind    string
}

func parseLink(m netlink.Message) (link, error) {
	var l link
	if m.Header.Type != unix.RTM_NEWLINK {
		return l, nil
	}
	if len(m.Data) < unix.SizeofIfInfomsg {
		return l, fmt.Errorf("interface message of %d bytes", len(m.Data))
	}
	l.index = int(binary.NativeEndian.Uint32(m.Data[4:])) //nolint:gosec // small
	attrs, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofIfInfomsg:])
	if err != nil {
		return l, err
	}
	for attrs.Next() {
		switch attrs.Type() {
		case unix.IFLA_IFNAME:
			l.name = attrs.String()
		case unix.IFLA_MASTER:
			l.master = int(attrs.Uint32())
		case unix.IFLA_LINKINFO:
			attrs.Nested(func(info *netlink.AttributeDecoder) error {
				for info.Next() {
					if info.Type() == unix.IFLA_INFO_KIND {
						l.kind = info.String()
					}
				}
				return nil
			})
		}
	}
	return l, attrs.Err()
}
