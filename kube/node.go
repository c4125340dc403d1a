package kube

import (
	"net/netip"
)

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

// NodePortAddresses says on which of this node's addresses node ports are
// served, as kube-proxy's --nodeport-addresses. The zero value stands for the
// node's primary addresses: those in its Node object.
type NodePortAddresses struct {
	Primary, Localhost, All bool
	CIDRs                   []netip.Prefix
}

// HealthCheck is what a health-check node port answers.
type HealthCheck struct {
	// Port is spec.healthCheckNodePort.
	Port uint16
	// LocalEndpoints is the number of ready pods on this node.
	LocalEndpoints int
}

// NodeHealth is what a Node object says about whether load balancers should
// send connections to this node.
type NodeHealth struct {
	// Exists says that there is a Node object.
	Exists bool
	// Leaving says that the node is being deleted, or that the cluster
	// autoscaler is about to.
	Leaving bool
}

// Eligible reports whether the node can take connections for long.
func (h NodeHealth) Eligible() bool { return h.Exists && !h.Leaving }
