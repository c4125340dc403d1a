package dataplane

import (
	"net/netip"
	"slices"
)

// Node describes the node's properties that a Dataplane needs in addition to Services. Its lists
// are sorted and deduplicated; [Node.Equal] relies on it. A changed Node takes effect with
// [Dataplane.Replace], for all Services at once.
type Node struct {
	// PodCIDRs, PodInterface and PodInterfacePrefix define how to detect pod traffic for
	// [MasqueradeOffCluster]: by source address, by the name of the ingress interface, or by a
	// prefix of that name. At most one is set.
	//
	// With PodCIDRs, no client of a family without a network counts as off-cluster. If none of
	// the three fields is set, no client counts as off-cluster. The node's own connections have
	// no ingress interface, so they count as off-cluster with PodInterface and
	// PodInterfacePrefix.
	PodCIDRs           []netip.Prefix
	PodInterface       string
	PodInterfacePrefix string

	// LocalPodCIDRs are networks whose clients count as pods of this node for
	// [ServiceSpec.ExternalTrafficPolicyLocal], in addition to the clients that PodCIDRs,
	// PodInterface and PodInterfacePrefix match.
	LocalPodCIDRs []netip.Prefix

	// MasqueradeAll makes every client of a [MasqueradeOffCluster] Service count as off-cluster.
	MasqueradeAll bool

	// PrimaryAddrs are the node's primary addresses, in both families. A client on this node that
	// uses a frontend's own address as its source counts as having these addresses for
	// [ServiceSpec.SourceRanges].
	PrimaryAddrs []netip.Addr

	// NodePortAddrs are the addresses of this node, in both families, that serve frontends with
	// the unspecified address. Loopback addresses in the list have no effect.
	NodePortAddrs []netip.Addr

	// NodePortNetworks are networks that are entirely local to this node through a local route,
	// and that also serve frontends with the unspecified address. Loopback addresses in them have
	// no effect.
	NodePortNetworks []netip.Prefix

	// LocalhostNodePorts reports that a process on this node listens on the TCP node ports at
	// loopback addresses. Connections to these ports are then left alone. All other connections
	// to a node port at a loopback address are rejected: UDP and SCTP always, TCP if
	// LocalhostNodePorts is not set.
	LocalhostNodePorts bool

	// ProtectLoopback drops packets to 127.0.0.0/8 that arrive on an interface other than lo,
	// which the kernel accepts if the sysctl route_localnet is set. Packets that were sent to
	// another address and then translated to a loopback address pass.
	ProtectLoopback bool

	// PingServiceIPs makes the node answer ICMP echo requests to the address of a frontend that
	// has an endpoint for the sender. It does not apply to frontends with
	// [ServiceSpec.SourceRanges].
	PingServiceIPs bool

	// ServiceCIDRs are the networks from which cluster IPs are allocated. Connections to an
	// address in them that belongs to no frontend are dropped.
	ServiceCIDRs []netip.Prefix

	// AheadOfOthers makes the node translate connections before the rules of other programs do,
	// for example rules that another Service proxy left behind. If it is not set, connections
	// that other programs translate are left to them.
	AheadOfOthers bool
}

// Equal reports whether n and o are equal.
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
