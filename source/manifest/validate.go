package manifest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metav1validation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// report takes one thing that is wrong: the path of the field, and a message
// with the fix.
type report func(path, message string)

func (r report) failf(path, format string, args ...any) { r(path, fmt.Sprintf(format, args...)) }

// format reports the messages of one of Kubernetes' own validation functions.
func (r report) format(path, what, value string, messages []string) {
	for _, message := range messages {
		r.failf(path, "%q is not %s: %s", value, what, plain(message))
	}
}

// plain takes the regular expression out of one of Kubernetes' messages; the
// examples that come with it say more.
func plain(message string) string {
	before, after, ok := strings.Cut(message, ", regex used for validation is '")
	if ok {
		_, after, _ = strings.Cut(after, "')")
		message = before + ")" + after
	}
	return strings.ReplaceAll(message, ",  or", " or")
}

func isProtocol(p corev1.Protocol) bool {
	return p == corev1.ProtocolTCP || p == corev1.ProtocolUDP || p == corev1.ProtocolSCTP
}

func (r report) protocol(path string, p corev1.Protocol) {
	if !isProtocol(p) {
		r.failf(path, "%q is not a protocol: use TCP, UDP or SCTP", p)
	}
}

func (r report) portNumber(path string, n int32) {
	if n < 1 || n > 65535 {
		r.failf(path, "%d is not a port: use 1 to 65535", n)
	}
}

// oneOf reports a value that is not allowed.
func oneOf[T ~string](r report, path string, value T, allowed ...T) {
	if !slices.Contains(allowed, value) {
		words := make([]string, len(allowed))
		for i, a := range allowed {
			words[i] = string(a)
		}
		last := len(words) - 1
		r.failf(path, "%q is not allowed: use %s or %s", value, strings.Join(words[:last], ", "), words[last])
	}
}

// address reports a text that is not the address of a pod or a Service.
func (r report) address(path, text string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(text)
	var problem string
	switch {
	case err != nil:
		problem = "is not an IP address"
	case addr.Zone() != "":
		problem = "has a zone"
	case addr.Is4In6():
		problem = "is an IPv4-mapped IPv6 address"
	case addr.IsUnspecified():
		problem = "is the unspecified address"
	case addr.IsLoopback():
		problem = "is a loopback address"
	case addr.IsMulticast():
		problem = "is a multicast address"
	case addr.IsLinkLocalUnicast():
		problem = "is a link-local address"
	default:
		return addr, true
	}
	r.failf(path, "%q %s: use an address such as 10.96.0.10 or fd00::10", text, problem)
	return netip.Addr{}, false
}

func (r report) metadata(meta *metav1.ObjectMeta, nameFormat func(string) []string) {
	switch {
	case meta.Name == "" && meta.GenerateName != "":
		r.failf("metadata.generateName", "there is nobody to generate names for files: write metadata.name")
	case meta.Name == "":
		r.failf("metadata.name", "missing: give the object a name")
	default:
		r.format("metadata.name", "a name", meta.Name, nameFormat(meta.Name))
	}
	r.format("metadata.namespace", "a namespace", meta.Namespace, validation.IsDNS1123Label(meta.Namespace))
	r.labels("metadata.labels", meta.Labels)
}

// labels reports keys and values that are no labels; a selector consists of
// labels too.
func (r report) labels(path string, labels map[string]string) {
	for _, key := range sortedKeys(labels) {
		at := path + "[" + key + "]"
		for _, err := range metav1validation.ValidateLabels(map[string]string{key: labels[key]}, field.NewPath(path)) {
			what, value := "a label value", labels[key]
			if err.BadValue == any(key) {
				what, value = "a label key", key
			}
			r.failf(at, "%q is not %s: %s", value, what, plain(err.Detail))
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

func defaultNamespace(meta *metav1.ObjectMeta) {
	if meta.Namespace == "" {
		meta.Namespace = corev1.NamespaceDefault
	}
}

// defaultService sets what the API server sets, except for addresses and
// families, which need to know the other Services.
func defaultService(svc *corev1.Service) {
	defaultNamespace(&svc.ObjectMeta)
	spec := &svc.Spec
	if spec.Type == "" {
		spec.Type = corev1.ServiceTypeClusterIP
	}
	if spec.SessionAffinity == "" {
		spec.SessionAffinity = corev1.ServiceAffinityNone
	}
	if spec.ClusterIP != "" && len(spec.ClusterIPs) == 0 {
		spec.ClusterIPs = []string{spec.ClusterIP}
	}
	for i := range spec.Ports {
		port := &spec.Ports[i]
		if port.Protocol == "" {
			port.Protocol = corev1.ProtocolTCP
		}
		if port.TargetPort == (intstr.IntOrString{}) {
			port.TargetPort = intstr.FromInt32(port.Port)
		}
	}
	if spec.Type != corev1.ServiceTypeExternalName && spec.InternalTrafficPolicy == nil {
		spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyCluster)
	}
	if spec.ExternalTrafficPolicy == "" && (spec.Type == corev1.ServiceTypeNodePort || spec.Type == corev1.ServiceTypeLoadBalancer) {
		spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	}
}

func isHeadless(svc *corev1.Service) bool { return svc.Spec.ClusterIP == corev1.ClusterIPNone }

func validateService(svc *corev1.Service, r report) {
	spec := &svc.Spec
	// Names that begin with a digit are allowed since Kubernetes 1.36.
	r.metadata(&svc.ObjectMeta, validation.IsDNS1123Label)
	oneOf(r, "spec.type", spec.Type,
		corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName)
	oneOf(r, "spec.sessionAffinity", spec.SessionAffinity, corev1.ServiceAffinityNone, corev1.ServiceAffinityClientIP)
	if p := spec.InternalTrafficPolicy; p != nil {
		oneOf(r, "spec.internalTrafficPolicy", *p, corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal)
	}
	if p := spec.ExternalTrafficPolicy; p != "" {
		oneOf(r, "spec.externalTrafficPolicy", p, corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)
	}
	r.labels("spec.selector", spec.Selector)
	for i, ip := range spec.ExternalIPs {
		r.address(fmt.Sprintf("spec.externalIPs[%d]", i), ip)
	}
	validateServicePorts(svc, r)
	if spec.Type == corev1.ServiceTypeExternalName {
		if spec.ClusterIP != "" {
			r.failf("spec.clusterIP", "a Service of type ExternalName has no address: remove the field")
		}
		name := strings.TrimSuffix(spec.ExternalName, ".")
		if name == "" {
			r.failf("spec.externalName", "missing: name the host that the Service stands for")
		} else {
			r.format("spec.externalName", "a host name", name, validation.IsDNS1123Subdomain(name))
		}
		return
	}
	validateFamilies(svc, r)
}

func validateServicePorts(svc *corev1.Service, r report) {
	spec := &svc.Spec
	if len(spec.Ports) == 0 && !isHeadless(svc) && spec.Type != corev1.ServiceTypeExternalName {
		r.failf("spec.ports", "missing: list at least one port")
	}
	type number struct {
		protocol corev1.Protocol
		port     int32
	}
	names, numbers := map[string]int{}, map[number]int{}
	for i := range spec.Ports {
		port := &spec.Ports[i]
		path := fmt.Sprintf("spec.ports[%d]", i)
		if port.Name == "" && len(spec.Ports) > 1 {
			r.failf(path+".name", "missing: each of several ports needs a name")
		} else if port.Name != "" {
			r.format(path+".name", "a port name", port.Name, validation.IsDNS1123Label(port.Name))
			if first, ok := names[port.Name]; ok {
				r.failf(path+".name", "%q is also the name of spec.ports[%d]: give each port a name of its own", port.Name, first)
			} else {
				names[port.Name] = i
			}
		}
		r.protocol(path+".protocol", port.Protocol)
		r.portNumber(path+".port", port.Port)
		n := number{port.Protocol, port.Port}
		if first, ok := numbers[n]; ok && isProtocol(port.Protocol) && port.Port > 0 {
			r.failf(path+".port", "%d/%s is also spec.ports[%d]: remove one, or change its port or protocol", port.Port, port.Protocol, first)
		} else {
			numbers[n] = i
		}
		if port.TargetPort.Type == intstr.String {
			r.format(path+".targetPort", "the name of a container port", port.TargetPort.StrVal, validation.IsValidPortName(port.TargetPort.StrVal))
		} else if port.TargetPort.IntVal != port.Port {
			r.portNumber(path+".targetPort", port.TargetPort.IntVal)
		}
		if port.NodePort < 0 || port.NodePort > 65535 {
			r.failf(path+".nodePort", "%d is not a port: use 1 to 65535, or remove the field", port.NodePort)
		}
	}
}

// validateFamilies checks the address fields of a Service with each other, as
// far as this needs no --service-cidr.
func validateFamilies(svc *corev1.Service, r report) {
	spec := &svc.Spec
	if p := spec.IPFamilyPolicy; p != nil {
		oneOf(r, "spec.ipFamilyPolicy", *p,
			corev1.IPFamilyPolicySingleStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack)
	}
	for i, family := range spec.IPFamilies {
		path := fmt.Sprintf("spec.ipFamilies[%d]", i)
		oneOf(r, path, family, corev1.IPv4Protocol, corev1.IPv6Protocol)
		if slices.Contains(spec.IPFamilies[:i], family) {
			r.failf(path, "%s is here twice: name each family once", family)
		}
	}
	selectorless := spec.IPFamilyPolicy == nil && len(spec.Selector) == 0 // may name both when headless
	single := spec.IPFamilyPolicy == nil || *spec.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack
	headless := isHeadless(svc)
	if single && (len(spec.ClusterIPs) > 1 || (len(spec.IPFamilies) > 1 && (!headless || !selectorless))) {
		r.failf("spec.ipFamilyPolicy", "a Service with two families needs PreferDualStack or RequireDualStack here")
	}
	if len(spec.ClusterIPs) > 2 {
		r.failf("spec.clusterIPs", "%d addresses: a Service has at most one a family", len(spec.ClusterIPs))
	}
	if len(spec.ClusterIPs) > 0 && spec.ClusterIPs[0] != spec.ClusterIP {
		r.failf("spec.clusterIPs[0]", "%q is not spec.clusterIP, which is %q: make them equal", spec.ClusterIPs[0], spec.ClusterIP)
	}
	if headless {
		if spec.Type != corev1.ServiceTypeClusterIP {
			r.failf("spec.clusterIP", "None is only for Services of type ClusterIP: remove the field, or the type")
		}
		return
	}
	var addrs []netip.Addr
	for i, text := range spec.ClusterIPs {
		path := "spec.clusterIP"
		if i > 0 {
			path = fmt.Sprintf("spec.clusterIPs[%d]", i)
		}
		addr, ok := r.address(path, text)
		if !ok {
			continue
		}
		if i < len(spec.IPFamilies) && spec.IPFamilies[i] != familyOf(addr) {
			r.failf(path, "%s is not of the family %s of spec.ipFamilies[%d]: make them match", addr, spec.IPFamilies[i], i)
		}
		if slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() }) {
			r.failf(path, "%s is a second address of the same family: name one address a family", addr)
		}
		addrs = append(addrs, addr)
	}
}

func familyOf(addr netip.Addr) corev1.IPFamily {
	if addr.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

func validatePod(pod *corev1.Pod, r report) {
	r.metadata(&pod.ObjectMeta, validation.IsDNS1123Subdomain)
	for _, f := range []struct{ path, value string }{
		{"spec.hostname", pod.Spec.Hostname}, {"spec.subdomain", pod.Spec.Subdomain},
	} {
		if f.value != "" {
			r.format(f.path, "a host name", f.value, validation.IsDNS1123Label(f.value))
		}
	}
	if n := pod.Spec.NodeName; n != "" {
		r.format("spec.nodeName", "the name of a node", n, validation.IsDNS1123Subdomain(n))
	}
	containers := func(path string, list []corev1.Container) {
		for i := range list {
			names := map[string]int{}
			for j := range list[i].Ports {
				port := &list[i].Ports[j]
				at := fmt.Sprintf("%s[%d].ports[%d]", path, i, j)
				r.portNumber(at+".containerPort", port.ContainerPort)
				if port.Protocol != "" {
					r.protocol(at+".protocol", port.Protocol)
				}
				if port.Name == "" {
					continue
				}
				r.format(at+".name", "a port name", port.Name, validation.IsValidPortName(port.Name))
				if first, ok := names[port.Name]; ok {
					r.failf(at+".name", "%q is also the name of ports[%d] of this container: give each port a name of its own", port.Name, first)
				} else {
					names[port.Name] = j
				}
			}
		}
	}
	containers("spec.containers", pod.Spec.Containers)
	containers("spec.initContainers", pod.Spec.InitContainers)
	if p := pod.Status.Phase; p != "" {
		oneOf(r, "status.phase", p, corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed, corev1.PodUnknown)
	}
	for i, c := range pod.Status.Conditions {
		oneOf(r, fmt.Sprintf("status.conditions[%d].status", i), c.Status, corev1.ConditionTrue, corev1.ConditionFalse, corev1.ConditionUnknown)
	}
	validatePodIPs(pod, r)
}

func validatePodIPs(pod *corev1.Pod, r report) {
	if ip := pod.Status.PodIP; ip != "" {
		r.address("status.podIP", ip)
		if len(pod.Status.PodIPs) > 0 && pod.Status.PodIPs[0].IP != ip {
			r.failf("status.podIPs[0].ip", "%q is not status.podIP, which is %q: make them equal", pod.Status.PodIPs[0].IP, ip)
		}
	}
	var addrs []netip.Addr
	for i, ip := range pod.Status.PodIPs {
		path := fmt.Sprintf("status.podIPs[%d].ip", i)
		addr, ok := r.address(path, ip.IP)
		if !ok {
			continue
		}
		if slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() }) {
			r.failf(path, "%s is a second address of the same family: name one address a family", addr)
		}
		addrs = append(addrs, addr)
	}
}

func defaultEndpointSlice(slice *discoveryv1.EndpointSlice) {
	defaultNamespace(&slice.ObjectMeta)
	for i := range slice.Ports {
		port := &slice.Ports[i]
		if port.Name == nil {
			port.Name = new("")
		}
		if port.Protocol == nil {
			port.Protocol = new(corev1.ProtocolTCP)
		}
	}
}

func validateEndpointSlice(slice *discoveryv1.EndpointSlice, r report) {
	r.metadata(&slice.ObjectMeta, validation.IsDNS1123Subdomain)
	if strings.HasSuffix(slice.Name, madeSuffix) {
		r.failf("metadata.name", "names that end in %s are for the slices made from Pods: use another name", madeSuffix)
	}
	oneOf(r, "addressType", slice.AddressType, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN)
	for i := range slice.Endpoints {
		validateEndpoint(slice, i, r)
	}
	names := map[string]int{}
	for i := range slice.Ports {
		port := &slice.Ports[i]
		path := fmt.Sprintf("ports[%d]", i)
		if *port.Name != "" {
			r.format(path+".name", "a port name", *port.Name, validation.IsDNS1123Label(*port.Name))
		}
		if first, ok := names[*port.Name]; ok {
			r.failf(path+".name", "%q is also the name of ports[%d]: give each port a name of its own", *port.Name, first)
		} else {
			names[*port.Name] = i
		}
		r.protocol(path+".protocol", *port.Protocol)
		if port.Port == nil {
			r.failf(path+".port", "missing: use 1 to 65535")
		} else {
			r.portNumber(path+".port", *port.Port)
		}
	}
}

func validateEndpoint(slice *discoveryv1.EndpointSlice, i int, r report) {
	ep := &slice.Endpoints[i]
	path := fmt.Sprintf("endpoints[%d]", i)
	if len(ep.Addresses) == 0 {
		r.failf(path+".addresses", "missing: name the endpoint's address")
	}
	for j, text := range ep.Addresses {
		at := fmt.Sprintf("%s.addresses[%d]", path, j)
		if slice.AddressType == discoveryv1.AddressTypeFQDN {
			r.format(at, "a host name", text, validation.IsDNS1123Subdomain(strings.TrimSuffix(text, ".")))
			continue
		}
		addr, ok := r.address(at, text)
		if ok && string(familyOf(addr)) != string(slice.AddressType) && slice.AddressType != "" {
			r.failf(at, "%s is not of the slice's addressType %s: move it to a slice of its own family", addr, slice.AddressType)
		}
	}
	if ep.NodeName != nil {
		r.format(path+".nodeName", "the name of a node", *ep.NodeName, validation.IsDNS1123Subdomain(*ep.NodeName))
	}
	if ep.Hostname != nil {
		r.format(path+".hostname", "a host name", *ep.Hostname, validation.IsDNS1123Label(*ep.Hostname))
	}
}
