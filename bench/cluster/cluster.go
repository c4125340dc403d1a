// Package cluster generates the Kubernetes objects that benchmarks program: Services with a cluster
// IP and one port, usually of TCP, and one EndpointSlice each. The addresses are the ones of package
// testbed.
package cluster

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"fairlead.io/fairlead/bench/testbed"
)

// Properties that all generated Services share.
const (
	Namespace  = "bench"
	Port       = 80   // of Services
	TargetPort = 8000 // of endpoints
	portName   = "http"
	// NodeName is the name of the measured node. One endpoint in ten is on it.
	NodeName   = "node"
	otherNode  = "other"
	localEvery = 10
)

// Service is a Service and the addresses of its endpoints, in the order of the EndpointSlice.
type Service struct {
	Index     int
	Endpoints []netip.Addr

	udp bool
}

// NewService returns the i-th Service, with endpoints in [testbed.BackgroundCIDR] that no other
// Service has. The addresses suffice for 800,000 Services of 10 endpoints.
func NewService(i, endpoints int) *Service {
	s := &Service{Index: i, Endpoints: make([]netip.Addr, endpoints)}
	for e := range s.Endpoints {
		s.Endpoints[e] = testbed.AddrPlus(testbed.BackgroundCIDR.Addr(), i*endpoints+e+1)
	}
	return s
}

// NewUDPService returns a Service like [NewService] with a UDP port.
func NewUDPService(i, endpoints int) *Service {
	s := NewService(i, endpoints)
	s.udp = true
	return s
}

// WatchedAddr returns the n-th endpoint address that the probe watches.
func WatchedAddr(n int) netip.Addr { return testbed.AddrPlus(testbed.WatchedCIDR.Addr(), n+1) }

// Addr returns the Service's cluster IP and port. No generated Service has the first address,
// which the Service default/kubernetes has in a real cluster.
func (s *Service) Addr() netip.AddrPort {
	return netip.AddrPortFrom(testbed.AddrPlus(testbed.ServiceCIDR.Addr(), s.Index+2), Port)
}

// Target returns the address and port of an endpoint.
func (s *Service) Target(endpoint int) netip.AddrPort {
	return netip.AddrPortFrom(s.Endpoints[endpoint], TargetPort)
}

func (s *Service) protocol() corev1.Protocol {
	if s.udp {
		return corev1.ProtocolUDP
	}
	return corev1.ProtocolTCP
}

// withEndpoints returns a copy of the Service with other endpoints.
func (s *Service) withEndpoints(endpoints []netip.Addr) *Service {
	return &Service{Index: s.Index, Endpoints: endpoints, udp: s.udp}
}

// WithReplacedEndpoint returns a copy of the Service whose last endpoint has the address addr.
func (s *Service) WithReplacedEndpoint(addr netip.Addr) *Service {
	endpoints := slices.Clone(s.Endpoints)
	endpoints[len(endpoints)-1] = addr
	return s.withEndpoints(endpoints)
}

// WithEndpoint returns a copy of the Service with an additional endpoint.
func (s *Service) WithEndpoint(addr netip.Addr) *Service {
	return s.withEndpoints(append(slices.Clone(s.Endpoints), addr))
}

// WithoutEndpoint returns a copy of the Service without the given endpoint.
func (s *Service) WithoutEndpoint(addr netip.Addr) *Service {
	return s.withEndpoints(slices.DeleteFunc(slices.Clone(s.Endpoints), func(a netip.Addr) bool { return a == addr }))
}

func (s *Service) name() string { return "service-" + strconv.Itoa(s.Index) }

// Name returns the name of the Service object.
func (s *Service) Name() types.NamespacedName {
	return types.NamespacedName{Namespace: Namespace, Name: s.name()}
}

// SliceName returns the name of the EndpointSlice object.
func (s *Service) SliceName() types.NamespacedName {
	return types.NamespacedName{Namespace: Namespace, Name: s.name() + "-x7k2p"}
}

// Object returns the Service object with the fields that an API server sets.
func (s *Service) Object() *corev1.Service {
	addr := s.Addr().Addr().String()
	return &corev1.Service{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: Namespace, Name: s.name(), UID: types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", s.Index)),
		},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: addr, ClusterIPs: []string{addr},
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}, IPFamilyPolicy: new(corev1.IPFamilyPolicySingleStack),
			SessionAffinity: corev1.ServiceAffinityNone, InternalTrafficPolicy: new(corev1.ServiceInternalTrafficPolicyCluster),
			Selector: map[string]string{"app": s.name()},
			Ports: []corev1.ServicePort{{
				Name: portName, Protocol: s.protocol(), Port: Port, TargetPort: intstr.FromInt32(TargetPort),
			}},
		},
	}
}

// Slice returns the EndpointSlice object with the fields that the EndpointSlice controller sets.
func (s *Service) Slice() *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: Namespace, Name: s.SliceName().Name,
			Labels: map[string]string{
				discoveryv1.LabelServiceName: s.name(),
				discoveryv1.LabelManagedBy:   "endpointslice-controller.k8s.io",
			},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: new(portName), Protocol: new(s.protocol()), Port: new(int32(TargetPort))}},
		Endpoints:   make([]discoveryv1.Endpoint, len(s.Endpoints)),
	}
	for i, addr := range s.Endpoints {
		node := otherNode
		if i%localEvery == 0 {
			node = NodeName
		}
		slice.Endpoints[i] = discoveryv1.Endpoint{
			Addresses:  []string{addr.String()},
			NodeName:   &node,
			Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)},
		}
	}
	return slice
}

// Node returns the object of the measured node, with the given address.
func Node(addr netip.Addr) *corev1.Node {
	return &corev1.Node{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{Name: NodeName, UID: "00000000-0000-4000-8000-ffffffffffff"},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: addr.String()}}},
	}
}

// ServiceCIDR returns the ServiceCIDR object of the cluster.
func ServiceCIDR() *networkingv1.ServiceCIDR {
	return &networkingv1.ServiceCIDR{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "ServiceCIDR"},
		ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"},
		Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{testbed.ServiceCIDR.String()}},
	}
}
