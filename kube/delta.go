package kube

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Delta is a set of changes from a source: new, changed and deleted objects. The objects are
// shared and must not be modified. The first Delta of a source contains all objects.
type Delta struct {
	Services              []*corev1.Service
	DeletedServices       []types.NamespacedName
	EndpointSlices        []*discoveryv1.EndpointSlice
	DeletedEndpointSlices []types.NamespacedName
	// ConvertedServices and ConvertedSlices contain objects like Services and EndpointSlices do, in
	// a form that takes less memory. No name is in both.
	ConvertedServices []*ConvertedService
	ConvertedSlices   []*ConvertedSlice

	// Node is this node's object if it is new or has changed. NodeDeleted reports that the object
	// does not exist. A source without Nodes sets neither.
	Node        *corev1.Node
	NodeDeleted bool
	// NodeUnknown reports that the source could not determine in time whether the Node object
	// exists. A later Delta contains the answer.
	NodeUnknown bool

	ServiceCIDRs        []*networkingv1.ServiceCIDR
	DeletedServiceCIDRs []string

	// LocalAddrs contains all addresses of this node's interfaces. Nil means that they have not
	// changed.
	LocalAddrs []netip.Addr
	// VirtualAddrs and LocalRoutes are set together with LocalAddrs. VirtualAddrs contains the
	// addresses that only the loopback device and dummy interfaces have. LocalRoutes contains the
	// networks that are entirely local to this node through a local route.
	VirtualAddrs []netip.Addr
	LocalRoutes  []netip.Prefix
}
