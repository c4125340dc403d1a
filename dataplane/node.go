package dataplane

import (
	"net/netip"
	"slices"
)

// Node is what a Dataplane must know of the node besides Services. Its lists
// are sorted and without doubles where [Node.Equal] is to hold. A Node that has
// changed takes effect with [Dataplane.Replace], and so for all Services at once.
type Node struct {
	// PodCIDRs, PodInterface and PodInterfacePrefix say how a client is told to
	// be a pod: by its address, by the interface that its packets arrive on, or
	// by the beginning of that interface's name. At most one of the three is
	// set. They decide on [MasqueradeOffCluster]: of a family without a PodCIDR no
	// client is foreign where PodCIDRs is what is set, and so where nothing is.
	// The node's own connections arrive on no interface, so that they are
	// foreign to PodInterface and PodInterfacePrefix.
	PodCIDRs           []netip.Prefix
	PodInterface       string
	PodInterfacePrefix string

	// LocalPodCIDRs are networks of which clients count as pods of this node
	// for [ServiceSpec.ExternalTrafficPolicyLocal], besides those that PodCIDRs, PodInterface
	// and PodInterfacePrefix tell.
	LocalPodCIDRs []netip.Prefix

	// MasqueradeAll makes every client of a [MasqueradeOffCluster] Service a
	// foreign one.
	MasqueradeAll bool

	// PrimaryAddrs are the node's primary addresses, of both families. A client on this
	// node that uses a frontend's own address as its source counts as having
	// these, for [ServiceSpec.SourceRanges].
	PrimaryAddrs []netip.Addr

	// NodePortAddrs are the addresses of this node, of both families, on which
	// the frontends with the unspecified address answer. Loopback addresses among
	// them have no effect.
	NodePortAddrs []netip.Addr

	// NodePortNetworks are networks of which every address is one of this node's,
	// by a local route, and on which these frontends answer, too. Loopback
	// addresses in them have no effect.
	NodePortNetworks []netip.Prefix

	// LocalhostNodePorts says that something on this node listens on the node
	// ports of TCP at loopback addresses, so that connections to these are left
	// alone. All others to a node port at a loopback address are rejected: those
	// of UDP and SCTP, and without LocalhostNodePorts those of TCP.
	LocalhostNodePorts bool

	// ProtectLoopback drops packets to 127.0.0.0/8 that arrive by another interface
	// than lo, which the kernel lets in with the sysctl route_localnet. Packets that
	// were sent to another address and translated to a loopback address pass.
	ProtectLoopback bool

	// PingServiceIPs makes the node answer ICMP echo requests to the addresses
	// of frontends that have an endpoint for the one who asks. A frontend with
	// [ServiceSpec.SourceRanges] takes no part.
	PingServiceIPs bool

	// ServiceCIDRs are the networks that cluster IPs are given from. Connections
	// to an address in them that is no frontend's are dropped.
	ServiceCIDRs []netip.Prefix

	// AheadOfOthers makes the node translate connections before other programs'
	// rules do, such as those that another Service proxy has left behind. Otherwise
	// connections that others translate are left to them.
	AheadOfOthers bool
}

// Equal reports whether n and o mean the same.
func (n Node) Equal(o Node) bool {
	return slices.Equal(n.PodCIDRs, o.PodCIDRs) &&
		n.PodInterface == o.PodInterface &&
		n.PodInterfacePrefix == o.PodInterfacePrefix &&
		slices.Equal(n.LocalPodCIDRs, o.LocalPodCIDRs) &&
		n.MasqueradeAll == o.MasqueradeAll &&
		slices.Equal(n.PrimaryAddrs, o.PrimaryAddrs) &&
		slices.Equal(n.NodePortAddrs, o.NodePortAddrs) &&
		slices.Equal(n.NodePortNetworks, o.NodePortNetworks) &&
		n.LocalhostNodePorts == o.LocalhostNodePorts &&
		n.ProtectLoopback == o.ProtectLoopback &&
		n.PingServiceIPs == o.PingServiceIPs &&
		slices.Equal(n.ServiceCIDRs, o.ServiceCIDRs) &&
		n.AheadOfOthers == o.AheadOfOthers
}
