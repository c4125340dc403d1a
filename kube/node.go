package kube

import (
	"iter"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"fairlead.io/fairlead/dataplane"
)

// taintToBeDeleted is the taint that the cluster autoscaler adds to a node before it drains the
// node.
const taintToBeDeleted = "ToBeDeletedByClusterAutoscaler"

// DetectLocalMode is a way to detect pod traffic. The values are those of kube-proxy's
// --detect-local-mode.
type DetectLocalMode string

// Modes of [DetectLocal].
const (
	DetectByClusterCIDR         DetectLocalMode = "ClusterCIDR"
	DetectByNodeCIDR            DetectLocalMode = "NodeCIDR"
	DetectByBridgeInterface     DetectLocalMode = "BridgeInterface"
	DetectByInterfaceNamePrefix DetectLocalMode = "InterfaceNamePrefix"
)

// DetectLocal defines how to detect pod traffic. All other clients are masqueraded when they
// connect to a cluster IP.
type DetectLocal struct {
	// Mode is the detection mode. An empty Mode means DetectByClusterCIDR.
	Mode DetectLocalMode
	// ClusterCIDRs are the networks of all pods, for DetectByClusterCIDR. If a family has no
	// network, no client of that family is masqueraded. All networks of a family are used, while
	// kube-proxy uses only the first.
	ClusterCIDRs []netip.Prefix
	// Interface is the bridge that connects the pods, for DetectByBridgeInterface.
	Interface string
	// InterfacePrefix is the common prefix of the pods' interface names, for
	// DetectByInterfaceNamePrefix.
	InterfacePrefix string
}

// NodeHealth is the part of a Node object that determines whether load balancers should send
// connections to this node.
type NodeHealth struct {
	// Exists reports whether the Node object exists.
	Exists bool
	// ToBeDeleted reports that the node is being deleted, or that the cluster autoscaler is about
	// to delete it.
	ToBeDeleted bool
}

// Eligible reports whether load balancers should send new connections to the node.
func (h NodeHealth) Eligible() bool { return h.Exists && !h.ToBeDeleted }

// nodeInfo is the part of a Node object that the Tracker uses.
type nodeInfo struct {
	health    NodeHealth
	zone      string
	podCIDRs  []string
	addresses []corev1.NodeAddress
}

// newNodeInfo returns the nodeInfo of a Node object. It shares the object's lists.
func newNodeInfo(node *corev1.Node) nodeInfo {
	info := nodeInfo{
		health: NodeHealth{
			Exists: true,
			ToBeDeleted: node.DeletionTimestamp != nil ||
				slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == taintToBeDeleted }),
		},
		zone:      node.Labels[corev1.LabelTopologyZone],
		podCIDRs:  node.Spec.PodCIDRs,
		addresses: node.Status.Addresses,
	}
	if len(info.podCIDRs) == 0 && node.Spec.PodCIDR != "" {
		info.podCIDRs = []string{node.Spec.PodCIDR}
	}
	return info
}

// equalNetwork reports whether i and o result in the same dataplane.Node.
func (i nodeInfo) equalNetwork(o nodeInfo) bool {
	return slices.Equal(i.podCIDRs, o.podCIDRs) && slices.Equal(i.addresses, o.addresses)
}

// networks contains all inputs of dataplane.Node except the Options.
type networks struct {
	node nodeInfo
	// serviceCIDRs contains the networks of each ServiceCIDR object by name.
	serviceCIDRs map[string][]netip.Prefix
	// localAddrs are the addresses of this node's interfaces. localAddrsKnown is set once they
	// were delivered.
	localAddrs      []netip.Addr
	localAddrsKnown bool
	// virtualAddrs and localRoutes have the meaning of the fields of Delta.
	virtualAddrs []netip.Addr
	localRoutes  []netip.Prefix
}

// ownAddrs returns the addresses by which other hosts and the API server reach this node: the
// addresses of the Node object and of its interfaces. An address that only the loopback device
// and dummy interfaces have is excluded unless the Node object lists it, because other programs
// bind cluster IPs this way: NodeLocal DNSCache binds the cluster IP of cluster DNS, and
// kube-proxy in ipvs mode binds every cluster IP.
func (n *networks) ownAddrs(override netip.Addr) map[netip.Addr]struct{} {
	own := map[netip.Addr]struct{}{}
	if override.IsValid() {
		own[canonicalAddr(override)] = struct{}{}
	}
	for _, a := range n.node.addresses {
		if addr, err := parseAddr(a.Address); err == nil && (a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP) {
			own[addr] = struct{}{}
		}
	}
	for _, a := range n.localAddrs {
		if _, ok := slices.BinarySearchFunc(n.virtualAddrs, a, netip.Addr.Compare); !ok {
			own[canonicalAddr(a)] = struct{}{}
		}
	}
	return own
}

// symmetricDifference yields the elements that are in exactly one of the sets.
func symmetricDifference(a, b map[netip.Addr]struct{}) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		for _, sets := range [...][2]map[netip.Addr]struct{}{{a, b}, {b, a}} {
			for addr := range sets[0] {
				if _, ok := sets[1][addr]; !ok && !yield(addr) {
					return
				}
			}
		}
	}
}

// onInterfaces returns the primary addresses, sorted, that an interface has or that a local route
// contains. It returns every primary address if the interface addresses are not known. Any other
// address belongs to a NAT device in front of the node, and no packet on this node carries it.
func (n *networks) onInterfaces(primary []netip.Addr) []netip.Addr {
	var addrs []netip.Addr
	for _, a := range primary {
		if !a.IsLoopback() && (!n.localAddrsKnown || slices.ContainsFunc(n.localAddrs, func(l netip.Addr) bool { return canonicalAddr(l) == a }) || anyContains(n.localRoutes, a)) {
			addrs = append(addrs, a)
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs
}

// canonicalAddr returns the address without zone and IPv4 mapping, as package dataplane requires.
func canonicalAddr(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// newDataplaneNode returns the dataplane.Node for the options and networks.
func newDataplaneNode(opts Options, in networks) dataplane.Node {
	n := dataplane.Node{
		LocalPodCIDRs:  outermost(parseNetworks(in.node.podCIDRs)),
		MasqueradeAll:  opts.MasqueradeAll,
		PingServiceIPs: opts.PingServiceIPs,
	}
	switch opts.DetectLocal.Mode {
	case DetectByClusterCIDR, "":
		n.PodCIDRs = outermost(opts.DetectLocal.ClusterCIDRs)
	case DetectByNodeCIDR:
		n.PodCIDRs = n.LocalPodCIDRs
	case DetectByBridgeInterface:
		n.PodInterface = opts.DetectLocal.Interface
	case DetectByInterfaceNamePrefix:
		n.PodInterfacePrefix = opts.DetectLocal.InterfacePrefix
	}
	var serviceCIDRs []netip.Prefix
	for _, cidrs := range in.serviceCIDRs {
		serviceCIDRs = append(serviceCIDRs, cidrs...)
	}
	n.ServiceCIDRs = outermost(serviceCIDRs)
	n.PrimaryAddrs = in.onInterfaces(primaryAddrs(in.node.addresses, opts.BindAddress))
	n.NodePortAddrs, n.NodePortNetworks = nodePortAddrs(opts, in, n.PrimaryAddrs, n.ServiceCIDRs)
	n.LocalhostNodePorts = len(loopbackAddrs(opts.NodePortAddresses, in)) > 0
	n.ProtectLoopback = opts.ProtectLoopback || n.LocalhostNodePorts
	return n
}

// parseNetworks returns the valid networks. The API server accepts no others in Nodes and
// ServiceCIDRs.
func parseNetworks(texts []string) []netip.Prefix {
	parsed := make([]netip.Prefix, 0, len(texts))
	for _, text := range texts {
		if network, err := ParseNetwork(text); err == nil {
			parsed = append(parsed, network)
		}
	}
	return parsed
}

// primaryAddrs returns the node's primary addresses, at most one per family: the first
// InternalIP, or else the first ExternalIP. A valid and specified override replaces the address
// of its family.
func primaryAddrs(addresses []corev1.NodeAddress, override netip.Addr) []netip.Addr {
	var primary []netip.Addr
	add := func(addr netip.Addr) {
		if !hasFamilyOf(primary, addr) {
			primary = append(primary, addr)
		}
	}
	if override.IsValid() && !override.IsUnspecified() {
		add(canonicalAddr(override))
	}
	for _, t := range [...]corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for _, a := range addresses {
			if a.Type != t {
				continue
			}
			if addr, err := parseAddr(a.Address); err == nil {
				add(addr)
			}
		}
	}
	return primary
}
