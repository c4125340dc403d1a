// Package kubetest creates Kubernetes objects for tests of packages that do not import their
// types. The caller owns the objects and may change their fields.
package kubetest

import (
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Node returns a Node with the given InternalIPs.
func Node(name string, addrs ...string) *corev1.Node {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, addr := range addrs {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: addr})
	}
	return node
}

// Service returns a Service of type ClusterIP with one unnamed port, 80/TCP.
func Service(namespace, name string, clusterIP netip.Addr) *corev1.Service {
	family := corev1.IPv4Protocol
	if clusterIP.Is6() {
		family = corev1.IPv6Protocol
	}
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: clusterIP.String(), ClusterIPs: []string{clusterIP.String()},
			IPFamilies: []corev1.IPFamily{family}, Ports: []corev1.ServicePort{{Port: 80, Protocol: corev1.ProtocolTCP}},
		},
	}
}

// EndpointSlice returns the EndpointSlice SERVICE-1 of a Service, with one unnamed port,
// 8080/TCP, and one endpoint. changed is the value of the annotation
// endpoints.kubernetes.io/last-change-trigger-time.
func EndpointSlice(namespace, service string, endpoint netip.Addr, changed time.Time) *discoveryv1.EndpointSlice {
	addressType := discoveryv1.AddressTypeIPv4
	if endpoint.Is6() {
		addressType = discoveryv1.AddressTypeIPv6
	}
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: service + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: service},
			Annotations: map[string]string{corev1.EndpointsLastChangeTriggerTime: changed.UTC().Format(time.RFC3339Nano)},
		},
		AddressType: addressType,
		Ports:       []discoveryv1.EndpointPort{{Name: new(""), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{endpoint.String()}}},
	}
}

// ServiceCIDR returns a ServiceCIDR with the given networks.
func ServiceCIDR(name string, cidrs ...string) *networkingv1.ServiceCIDR {
	return &networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       networkingv1.ServiceCIDRSpec{CIDRs: cidrs},
	}
}
