package flowdevices

import (
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nlconn"
)

// Device is a network interface that takes part in flow offload.
type Device struct {
	Index uint32
	Name  string
}

// PodInterfaces identifies the interfaces of pods: --detect-local-mode and its settings. At most one
// field is set. If none is set, pods are detected by their addresses, so any interface may belong to
// one.
type PodInterfaces struct {
	// Bridge is the name of the bridge that the pods are connected to.
	Bridge string
	// Prefix is a prefix of the names of the pods' interfaces.
	Prefix string
}

// link is a network interface.
type link struct {
	Device

	loopback bool
	// kind is the type of a virtual interface (IFLA_INFO_KIND), empty for most hardware.
	kind string
	// master is the index of the bridge or bond that the interface belongs to, and slaveKind the
	// master's type (IFLA_INFO_SLAVE_KIND).
	master    uint32
	slaveKind string
}

const (
	kindBridge = "bridge"
	kindVeth   = "veth"
)

// unusedKinds returns the types of interfaces that forward no packets.
func unusedKinds() []string { return []string{"dummy", "ifb", "nlmon", "vcan"} }

// aggregating returns the types of masters that receive the packets of their interfaces before the
// flowtable can, or instead of it.
func aggregating() []string { return []string{"bond", "team", "openvswitch"} }

// links are the interfaces of a node by index.
type links map[uint32]link

// devices returns the interfaces that take part, sorted by index.
func (l links) devices(pods PodInterfaces) []Device {
	var all []Device
	for _, i := range l {
		if l.takesPart(i, pods) {
			all = append(all, i.Device)
		}
	}
	slices.SortFunc(all, func(a, b Device) int { return int(a.Index) - int(b.Index) })
	return all
}

// takesPart reports whether an interface takes part. Interfaces of containers that are known not to be
// pods do not: veth interfaces in another bridge, or without the prefix.
func (l links) takesPart(i link, pods PodInterfaces) bool {
	switch {
	case i.loopback, slices.Contains(unusedKinds(), i.kind), slices.Contains(aggregating(), i.slaveKind):
		return false
	case i.kind != kindVeth || i.slaveKind != kindBridge:
		return true
	case pods.Bridge != "":
		return l[i.master].Name == pods.Bridge
	default:
		return strings.HasPrefix(i.Name, pods.Prefix)
	}
}

// parseLink decodes an RTM_NEWLINK or RTM_DELLINK message. It reports false for a message about a port
// of a bridge, which has the family AF_BRIDGE: RTM_DELLINK then means that the interface has left the
// bridge.
func parseLink(m netlink.Message) (link, bool) {
	// struct ifinfomsg, see linux/rtnetlink.h.
	if len(m.Data) < unix.SizeofIfInfomsg || m.Data[0] != unix.AF_UNSPEC {
		return link{}, false
	}
	i := link{
		Device:   Device{Index: nlconn.Uint32(m.Data[4:8])},
		loopback: nlconn.Uint32(m.Data[8:12])&unix.IFF_LOOPBACK != 0,
	}
	for typ, value := range nlconn.Attributes(m.Data[unix.SizeofIfInfomsg:]) {
		switch typ {
		case unix.IFLA_IFNAME:
			i.Name = unix.ByteSliceToString(value)
		case unix.IFLA_MASTER:
			i.master = nlconn.Uint32(value)
		case unix.IFLA_LINKINFO:
			for typ, value := range nlconn.Attributes(value) {
				switch typ {
				case unix.IFLA_INFO_KIND:
					i.kind = unix.ByteSliceToString(value)
				case unix.IFLA_INFO_SLAVE_KIND:
					i.slaveKind = unix.ByteSliceToString(value)
				}
			}
		}
	}
	return i, i.Name != ""
}
