package kube

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Delta is what a source delivers: objects that are new or have changed, and
// objects that are gone. The objects are shared and must not be changed. The
// first Delta of a source holds everything there is.
type Delta struct {
	Services              []*corev1.Service
	DeletedServices       []types.NamespacedName
	EndpointSlices        []*discoveryv1.EndpointSlice
	DeletedEndpointSlices []types.NamespacedName

	// Node is this node's object where it is new or has changed, and
	// NodeDeleted says that it is gone. A source without Nodes sets neither.
	Node        *corev1.Node
	NodeDeleted bool
	// NodeUnknown says that the source could not find out in time whether there is
	// a Node. A later Delta says it.
	NodeUnknown bool

	ServiceCIDRs        []*networkingv1.ServiceCIDR
	DeletedServiceCIDRs []string

	// LocalAddrs, if not nil, are all addresses that this node's interfaces now
	// have: nil says that they have not changed.
	LocalAddrs []netip.Addr
	// VirtualAddrs are, where LocalAddrs is not nil, those of them that only the
	// loopback device and dummy interfaces have, and LocalRoutes the networks of
	// which every address is this node's by a local route.
	VirtualAddrs []netip.Addr
	LocalRoutes  []netip.Prefix
}
