package kube

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"fairlead.io/fairlead/dataplane"
)

// newService returns the Service default/name with the port http, 80/TCP, and the given cluster
// IPs, modified by changes.
func newService(name, clusterIPs string, changes ...func(*corev1.Service)) *corev1.Service {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: corev1.ServiceSpec{
			Type:       corev1.ServiceTypeClusterIP,
			ClusterIPs: strings.Fields(clusterIPs),
			Ports: []corev1.ServicePort{
				{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(8080)},
			},
		},
	}
	for _, ip := range svc.Spec.ClusterIPs {
		family := corev1.IPv4Protocol
		if strings.Contains(ip, ":") {
			family = corev1.IPv6Protocol
		}
		svc.Spec.IPFamilies = append(svc.Spec.IPFamilies, family)
	}
	if len(svc.Spec.ClusterIPs) > 0 {
		svc.Spec.ClusterIP = svc.Spec.ClusterIPs[0]
	}
	for _, change := range changes {
		change(svc)
	}
	return svc
}

func port(name string, protocol corev1.Protocol, number int32) corev1.ServicePort {
	return corev1.ServicePort{Name: name, Protocol: protocol, Port: number, TargetPort: intstr.FromInt32(8080)}
}

func ports(ports ...corev1.ServicePort) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.Ports = ports }
}

// age sets the age of a Service relative to a fixed time.
func age(d time.Duration) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		svc.CreationTimestamp = metav1.NewTime(time.Unix(1_800_000_000, 0).Add(-d))
	}
}

// newSlice returns the EndpointSlice default/name of a Service with the port http, 8080/TCP. Its
// family is the family of the first endpoint.
func newSlice(name, service string, endpoints []discoveryv1.Endpoint, changes ...func(*discoveryv1.EndpointSlice)) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: name,
			Labels: map[string]string{discoveryv1.LabelServiceName: service},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   endpoints,
		Ports:       []discoveryv1.EndpointPort{slicePort("http", corev1.ProtocolTCP, 8080)},
	}
	if len(endpoints) > 0 && strings.Contains(endpoints[0].Addresses[0], ":") {
		slice.AddressType = discoveryv1.AddressTypeIPv6
	}
	for _, change := range changes {
		change(slice)
	}
	return slice
}

func slicePort(name string, protocol corev1.Protocol, number int32) discoveryv1.EndpointPort {
	return discoveryv1.EndpointPort{Name: &name, Protocol: &protocol, Port: &number}
}

func slicePorts(ports ...discoveryv1.EndpointPort) func(*discoveryv1.EndpointSlice) {
	return func(slice *discoveryv1.EndpointSlice) { slice.Ports = ports }
}

// eps parses endpoints. Each text is an address followed by any of
//
//	@name          on the node called name
//	!ready         and !serving: the condition is false
//	+ready         and +serving, +terminating: the condition is true
//	zone=a,b       hints.forZones
//	node=a,b       hints.forNodes
func eps(texts ...string) []discoveryv1.Endpoint {
	var endpoints []discoveryv1.Endpoint
	for _, text := range texts {
		words := strings.Fields(text)
		ep := discoveryv1.Endpoint{Addresses: []string{words[0]}}
		for _, word := range words[1:] {
			if list, ok := strings.CutPrefix(word, "zone="); ok {
				hints(&ep).ForZones = zones(strings.Split(list, ","))
				continue
			}
			if list, ok := strings.CutPrefix(word, "node="); ok {
				hints(&ep).ForNodes = nodes(strings.Split(list, ","))
				continue
			}
			value := word[0] == '+'
			switch word[1:] {
			case "ready":
				ep.Conditions.Ready = &value
			case "serving":
				ep.Conditions.Serving = &value
			case "terminating":
				ep.Conditions.Terminating = &value
			default:
				if word[0] != '@' {
					panic(fmt.Sprintf("endpoint %q: unknown word %q", text, word))
				}
				node := word[1:]
				ep.NodeName = &node
			}
		}
		endpoints = append(endpoints, ep)
	}
	return endpoints
}

func hints(ep *discoveryv1.Endpoint) *discoveryv1.EndpointHints {
	if ep.Hints == nil {
		ep.Hints = &discoveryv1.EndpointHints{}
	}
	return ep.Hints
}

func zones(names []string) []discoveryv1.ForZone {
	var zones []discoveryv1.ForZone
	for _, name := range names {
		zones = append(zones, discoveryv1.ForZone{Name: name})
	}
	return zones
}

func nodes(names []string) []discoveryv1.ForNode {
	var nodes []discoveryv1.ForNode
	for _, name := range names {
		nodes = append(nodes, discoveryv1.ForNode{Name: name})
	}
	return nodes
}

// nodePorts sets the node ports, and the type to NodePort unless it is LoadBalancer.
func nodePorts(numbers ...int32) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
			svc.Spec.Type = corev1.ServiceTypeNodePort
		}
		for i, number := range numbers {
			svc.Spec.Ports[i].NodePort = number
		}
	}
}

func externalIPs(ips ...string) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.ExternalIPs = ips }
}

// ingress sets the type to LoadBalancer and adds load balancer IPs.
func ingress(ips ...string) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		svc.Spec.Type = corev1.ServiceTypeLoadBalancer
		for _, ip := range ips {
			svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
		}
	}
}

func ofType(t corev1.ServiceType) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.Type = t }
}

func internalPolicy(policy corev1.ServiceInternalTrafficPolicy) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.InternalTrafficPolicy = &policy }
}

func externalPolicy(policy corev1.ServiceExternalTrafficPolicy) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.ExternalTrafficPolicy = policy }
}

func healthCheckNodePort(port int32) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.HealthCheckNodePort = port }
}

func sourceRangesOf(ranges ...string) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.LoadBalancerSourceRanges = ranges }
}

func withUID(uid types.UID) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.UID = uid }
}

// clientIP enables session affinity.
func clientIP(svc *corev1.Service) { svc.Spec.SessionAffinity = corev1.ServiceAffinityClientIP }

func timeout(seconds int32) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		clientIP(svc)
		svc.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{
			ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds},
		}
	}
}

// scheduler selects an IPVS scheduler.
func balancing(value string) func(*corev1.Service) { return annotation(AnnotationBalancing, value) }

func annotation(name, value string) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		if svc.Annotations == nil {
			svc.Annotations = map[string]string{}
		}
		svc.Annotations[name] = value
	}
}

func scheduler(name string) func(*corev1.Service) {
	return annotation(AnnotationIPVSScheduler, name)
}

// newNode returns the Node "here" with the given InternalIPs, modified by changes.
func newNode(ips string, changes ...func(*corev1.Node)) *corev1.Node {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "here"}}
	for ip := range strings.FieldsSeq(ips) {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip})
	}
	for _, change := range changes {
		change(node)
	}
	return node
}

func inZone(zone string) func(*corev1.Node) {
	return func(node *corev1.Node) { node.Labels = map[string]string{corev1.LabelTopologyZone: zone} }
}

func podCIDRs(cidrs ...string) func(*corev1.Node) {
	return func(node *corev1.Node) { node.Spec.PodCIDRs = cidrs }
}

func newServiceCIDR(name string, cidrs ...string) *networkingv1.ServiceCIDR {
	return &networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: cidrs},
	}
}

func addrs(texts string) []netip.Addr {
	list := []netip.Addr{}
	for text := range strings.FieldsSeq(texts) {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

func cidrs(texts string) []netip.Prefix {
	var list []netip.Prefix
	for text := range strings.FieldsSeq(texts) {
		list = append(list, netip.MustParsePrefix(text))
	}
	return list
}

func named(name string) types.NamespacedName {
	return types.NamespacedName{Namespace: "default", Name: name}
}

// serviceText returns a Service as text:
//
//	10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080(local)
//
// followed by all fields that differ from the zero ServiceSpec:
//
//	0.0.0.0:30080/TCP -> 10.0.0.1:8080, others -> none, masquerade from-node, drop
func serviceText(svc *dataplane.Service) string {
	if svc == nil {
		return "gone"
	}
	var words []string
	for _, f := range svc.Frontends {
		words = append(words, f.String())
	}
	words = append(words, "->")
	words = append(words, endpointTexts(svc.Endpoints)...)
	parts := []string{strings.Join(words, " ")}
	if svc.ExternalTrafficPolicyLocal {
		others := endpointTexts(svc.LocalEndpoints)
		if len(others) == 0 {
			others = []string{"none"}
		}
		parts = append(parts, "others -> "+strings.Join(others, " "))
	}
	if svc.Masquerade != dataplane.MasqueradeOffCluster {
		parts = append(parts, "masquerade "+svc.Masquerade.String())
	}
	if svc.NoEndpointsVerdict != dataplane.Reject {
		parts = append(parts, svc.NoEndpointsVerdict.String())
	}
	if len(svc.Serving) > 0 {
		parts = append(parts, fmt.Sprint("still serving ", svc.Serving))
	}
	if svc.Affinity != 0 {
		parts = append(parts, "affinity "+svc.Affinity.String())
	}
	if len(svc.SourceRanges) > 0 {
		parts = append(parts, fmt.Sprintf("from %v", svc.SourceRanges))
	}
	if svc.Scheduler != "" {
		parts = append(parts, "scheduler "+svc.Scheduler)
	}
	return strings.Join(parts, ", ")
}

func endpointTexts(endpoints []dataplane.Endpoint) []string {
	var words []string
	for _, e := range endpoints {
		word := e.Addr.String()
		if e.Local {
			word += "(local)"
		}
		words = append(words, word)
	}
	return words
}

func problemTexts(problems []Problem) []string {
	var texts []string
	for _, p := range problems {
		texts = append(texts, p.String())
	}
	return texts
}

func serviceTexts(changes map[dataplane.Key]*dataplane.Service) map[string]string {
	out := map[string]string{}
	for key, svc := range changes {
		if svc != nil && svc.Key != key {
			panic(fmt.Sprintf("the Service of key %s has the key %s", key, svc.Key))
		}
		out[key.String()] = serviceText(svc)
	}
	return out
}

// manyEndpoints returns the i-th slice of a Service, with n endpoints that no other slice has.
func manyEndpoints(service string, i, n int) *discoveryv1.EndpointSlice {
	var texts []string
	for pod := range n {
		texts = append(texts, fmt.Sprintf("10.%d.%d.%d @there", i, pod>>8, pod&0xff))
	}
	return newSlice(fmt.Sprintf("%s-%d", service, i), service, eps(texts...))
}
