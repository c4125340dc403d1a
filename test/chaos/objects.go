package main

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"fairlead.io/fairlead/internal/nettest"
)

const (
	namespace = "chaos"
	nodeName  = "node"
	portName  = "port"
)

// serviceCIDRs returns the networks of cluster IPs.
func serviceCIDRs() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")}
}

// service is a dual-stack Service with one port.
type service struct {
	name     string
	protocol string // in the notation of nettest
	// targetPort is the port of the endpoints, unique to the Service.
	targetPort uint16
	nodePort   uint16        // 0 means none
	affinity   time.Duration // 0 means none
	// clusterIPs and endpoints have one element per family, IPv4 first.
	clusterIPs [2]netip.Addr
	endpoints  [2]*endpoints
}

const servicePort = 80

// clusterIPs returns the nth address of each Service network.
func clusterIPs(n int) [2]netip.Addr {
	var addrs [2]netip.Addr
	for family, network := range serviceCIDRs() {
		b := network.Addr().AsSlice()
		b[len(b)-2], b[len(b)-1] = byte(n>>8), byte(n) //nolint:gosec // the networks have 16 bits
		addrs[family], _ = netip.AddrFromSlice(b)
	}
	return addrs
}

// clusterAddrPort returns the cluster IP of a family with the port.
func (s *service) clusterAddrPort(family int) netip.AddrPort {
	return netip.AddrPortFrom(s.clusterIPs[family], servicePort)
}

// object returns the Service object.
func (s *service) object() *corev1.Service {
	o := &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: s.name, UID: types.UID("chaos-" + s.name)},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: s.clusterIPs[0].String(),
			ClusterIPs:            []string{s.clusterIPs[0].String(), s.clusterIPs[1].String()},
			IPFamilies:            []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol},
			IPFamilyPolicy:        new(corev1.IPFamilyPolicyRequireDualStack),
			SessionAffinity:       corev1.ServiceAffinityNone,
			InternalTrafficPolicy: new(corev1.ServiceInternalTrafficPolicyCluster),
			Ports: []corev1.ServicePort{{
				Name: portName, Protocol: s.apiProtocol(), Port: servicePort, TargetPort: intstr.FromInt32(int32(s.targetPort)),
				NodePort: int32(s.nodePort),
			}},
		},
	}
	if s.nodePort != 0 {
		o.Spec.Type = corev1.ServiceTypeNodePort
		o.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	}
	if s.affinity != 0 {
		o.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		o.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{
			ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(int32(s.affinity.Seconds()))},
		}
	}
	return o
}

func (s *service) apiProtocol() corev1.Protocol { return corev1.Protocol(strings.ToUpper(s.protocol)) }

// endpointSlice returns the EndpointSlice of a family with these addresses.
func (s *service) endpointSlice(family int, addrs []netip.Addr) *discoveryv1.EndpointSlice {
	kind := [2]discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6}[family]
	o := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: s.name + "-" + strings.ToLower(string(kind)),
			Labels: map[string]string{
				discoveryv1.LabelServiceName: s.name, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
			},
		},
		AddressType: kind,
		Ports:       []discoveryv1.EndpointPort{{Name: new(portName), Protocol: new(s.apiProtocol()), Port: new(int32(s.targetPort))}},
	}
	for _, addr := range addrs {
		o.Endpoints = append(o.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{addr.String()}, NodeName: new(nodeName),
			Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)},
		})
	}
	return o
}

// backgroundService returns the nth Service that no client connects to, and the unused
// addresses of its endpoints.
func backgroundService(n int) (*service, [2][]netip.Addr) {
	const endpoints = 10
	s := &service{name: fmt.Sprintf("background-%d", n), protocol: nettest.TCP, targetPort: 8080, clusterIPs: clusterIPs(1000 + n)}
	var addrs [2][]netip.Addr
	for i := range endpoints {
		k := n*endpoints + i
		addrs[0] = append(addrs[0], netip.AddrFrom4([4]byte{10, 245 + byte(k>>16), byte(k >> 8), byte(k)})) //nolint:gosec // the low bits
		v6 := netip.MustParseAddr("fd00:10:245::").As16()
		v6[13], v6[14], v6[15] = byte(k>>16), byte(k>>8), byte(k) //nolint:gosec // the low bits
		addrs[1] = append(addrs[1], netip.AddrFrom16(v6))
	}
	return s, addrs
}

// nodeObject returns the Node object.
func nodeObject(addrs []netip.Addr, podCIDRs []netip.Prefix) *corev1.Node {
	o := &corev1.Node{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{Name: nodeName, UID: "chaos-node"},
	}
	for _, p := range podCIDRs {
		o.Spec.PodCIDRs = append(o.Spec.PodCIDRs, p.String())
	}
	o.Spec.PodCIDR = o.Spec.PodCIDRs[0]
	for _, a := range addrs {
		o.Status.Addresses = append(o.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	return o
}
