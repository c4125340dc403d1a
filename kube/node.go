package kube

import (
	"iter"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"fairlead.io/fairlead/dataplane"
)

// taintToBeDeleted is put on a node by the cluster autoscaler before it drains
// the node.
const taintToBeDeleted = "ToBeDeletedByClusterAutoscaler"

// DetectLocalMode says how a client is told to be a pod, by the values of
// kube-proxy's --detect-local-mode.
type DetectLocalMode string

// The modes, see [DetectLocal].
const (
	DetectByClusterCIDR         DetectLocalMode = "ClusterCIDR"
	DetectByNodeCIDR            DetectLocalMode = "NodeCIDR"
	DetectByBridgeInterface     DetectLocalMode = "BridgeInterface"
	DetectByInterfaceNamePrefix DetectLocalMode = "InterfaceNamePrefix"
)

// DetectLocal says how a client is told to be a pod. Clients that are none are
// masqueraded when they connect to a cluster IP.
type DetectLocal struct {
	// Mode is DetectByClusterCIDR if it is empty.
	Mode DetectLocalMode
	// ClusterCIDRs are the networks of all pods, for DetectByClusterCIDR. Without
	// one of a family no client of that family is masqueraded. Unlike kube-proxy,
	// which reads the first of a family, all of them count.
	ClusterCIDRs []netip.Prefix
	// Interface is the bridge that pods are connected to, for
	// DetectByBridgeInterface.
	Interface string
	// InterfacePrefix is how the names of pods' interfaces begin, for
	// DetectByInterfaceNamePrefix.
	InterfacePrefix string
}

// NodeHealth is what a Node object says about whether load balancers should
// send connections to this node.
type NodeHealth struct {
	// Exists says that there is a Node object.
	Exists bool
	// ToBeDeleted says that the node is being deleted, or that the cluster
	// autoscaler is about to.
	ToBeDeleted bool
}

// Eligible reports whether the node can take connections for long.
func (h NodeHealth) Eligible() bool { return h.Exists && !h.ToBeDeleted }

// nodeInfo are what counts of a Node object.
type nodeInfo struct {
	health    NodeHealth
	zone      string
	podCIDRs  []string
	addresses []corev1.NodeAddress
}

// newNodeInfo returns what counts of a Node object. The lists are the object's.
func newNodeInfo(node *corev1.Node) nodeInfo {
	facts := nodeInfo{
		health: NodeHealth{
			Exists: true,
			ToBeDeleted: node.DeletionTimestamp != nil ||
				slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == taintToBeDeleted }),
		},
		zone:      node.Labels[corev1.LabelTopologyZone],
		podCIDRs:  node.Spec.PodCIDRs,
		addresses: node.Status.Addresses,
	}
	if len(facts.podCIDRs) == 0 && node.Spec.PodCIDR != "" {
		facts.podCIDRs = []string{node.Spec.PodCIDR}
	}
	return facts
}

// equalNetwork reports whether f and o mean the same for dataplane.Node.
func (f nodeInfo) equalNetwork(o nodeInfo) bool {
	return slices.Equal(f.podCIDRs, o.podCIDRs) && slices.Equal(f.addresses, o.addresses)
}

// networks are all that dataplane.Node is made of, besides the Options.
type networks struct {
	node nodeInfo
	// serviceCIDRs has the networks of each ServiceCIDR object.
	serviceCIDRs map[string][]netip.Prefix
	// localAddrs are the addresses of this node's interfaces; known says
	// whether they were ever delivered.
	localAddrs      []netip.Addr
	localAddrsKnown bool
	// virtualAddrs and localRoutes are Delta's.
	virtualAddrs []netip.Addr
	localRoutes  []netip.Prefix
}

// ownAddrs returns the addresses by which other hosts, and the API server, know
// this node: those of the Node object, and those of its interfaces. Addresses that
// only the loopback device and dummy interfaces have are not among them unless the
// Node object names them, since this is how others bind cluster IPs: NodeLocal
// DNSCache that of the cluster's DNS, kube-proxy in its mode ipvs all of them.
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

// symmetricDifference yields what is in one of the sets only.
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

// onInterfaces returns, sorted, those of the node's primary addresses that an
// interface has, or all if it is not known what interfaces have: an address that
// none has is a NAT's in front of the node, and no packet here carries it.
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

// canonicalAddr returns the address as package dataplane writes it.
func canonicalAddr(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// newDataplaneNode returns what the dataplane must know of the node.
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

// parseNetworks returns those that are networks. The API server lets no others
// into Nodes and ServiceCIDRs.
func parseNetworks(texts []string) []netip.Prefix {
	parsed := make([]netip.Prefix, 0, len(texts))
	for _, text := range texts {
		if network, err := parseNetwork(text); err == nil {
			parsed = append(parsed, network)
		}
	}
	return parsed
}

// primaryAddrs returns the node's primary addresses, at most one a family: the
// first InternalIP, or else the first ExternalIP. The address given as override
// replaces that of its family.
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
