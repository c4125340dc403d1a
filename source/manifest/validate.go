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

// Kubernetes' limits.
const (
	maxAffinitySeconds = 86400
	maxHints           = 8 // zones or nodes per endpoint
)

// reportFunc reports an error: the path of the field, and a message with the fix.
type reportFunc func(path, message string)

func (r reportFunc) failf(path, format string, args ...any) { r(path, fmt.Sprintf(format, args...)) }

// reportFormat reports the messages of one of Kubernetes' validation functions.
func (r reportFunc) reportFormat(path, what, value string, messages []string) {
	for _, message := range messages {
		r.failf(path, "%q is not %s: %s", value, what, stripRegexp(message))
	}
}

// stripRegexp removes the regular expression from a message of Kubernetes; the examples in
// the message are clearer.
func stripRegexp(message string) string {
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

func (r reportFunc) checkProtocol(path string, p corev1.Protocol) {
	if !isProtocol(p) {
		r.failf(path, "%q is not a protocol: use TCP, UDP or SCTP", p)
	}
}

func (r reportFunc) checkPort(path string, n int32) {
	if n < 1 || n > 65535 {
		r.failf(path, "%d is not a port: use 1 to 65535", n)
	}
}

// checkOneOf reports a value that is not allowed.
func checkOneOf[T ~string](r reportFunc, path string, value T, allowed ...T) {
	if !slices.Contains(allowed, value) {
		words := make([]string, len(allowed))
		for i, a := range allowed {
			words[i] = string(a)
		}
		last := len(words) - 1
		r.failf(path, "%q is not allowed: use %s or %s", value, strings.Join(words[:last], ", "), words[last])
	}
}

// checkAddress reports text that is not an address of a pod or Service.
func (r reportFunc) checkAddress(path, text string) (netip.Addr, bool) {
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

func (r reportFunc) checkMetadata(meta *metav1.ObjectMeta, nameFormat func(string) []string) {
	switch {
	case meta.Name == "" && meta.GenerateName != "":
		r.failf("metadata.generateName", "names are not generated for files: write metadata.name")
	case meta.Name == "":
		r.failf("metadata.name", "missing: write a name")
	default:
		r.reportFormat("metadata.name", "a name", meta.Name, nameFormat(meta.Name))
	}
	r.reportFormat("metadata.namespace", "a namespace", meta.Namespace, validation.IsDNS1123Label(meta.Namespace))
	r.checkLabels("metadata.labels", meta.Labels)
}

// checkLabels reports invalid label keys and values. A selector consists of labels too.
func (r reportFunc) checkLabels(path string, labels map[string]string) {
	for _, key := range sortedKeys(labels) {
		at := path + "[" + key + "]"
		for _, err := range metav1validation.ValidateLabels(map[string]string{key: labels[key]}, field.NewPath(path)) {
			what, value := "a label value", labels[key]
			if err.BadValue == any(key) {
				what, value = "a label key", key
			}
			r.failf(at, "%q is not %s: %s", value, what, stripRegexp(err.Detail))
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

// defaultService sets the API server's defaults, except for addresses, families and node
// ports, which depend on other Services.
func defaultService(svc *corev1.Service) {
	defaultNamespace(&svc.ObjectMeta)
	spec := &svc.Spec
	if spec.Type == "" {
		spec.Type = corev1.ServiceTypeClusterIP
	}
	if spec.SessionAffinity == "" {
		spec.SessionAffinity = corev1.ServiceAffinityNone
	}
	if c := spec.SessionAffinityConfig; spec.SessionAffinity == corev1.ServiceAffinityClientIP &&
		(c == nil || c.ClientIP == nil || c.ClientIP.TimeoutSeconds == nil) {
		spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{
			ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(corev1.DefaultClientIPServiceAffinitySeconds)},
		}
	}
	if spec.ClusterIP != "" && len(spec.ClusterIPs) == 0 {
		spec.ClusterIPs = []string{spec.ClusterIP}
	}
	for i := range spec.Ports {
		port := &spec.Ports[i]
		if port.Protocol == "" {
			port.Protocol = corev1.ProtocolTCP
		}
		if port.TargetPort == (intstr.IntOrString{}) || port.TargetPort == intstr.FromString("") {
			port.TargetPort = intstr.FromInt32(port.Port)
		}
	}
	if spec.Type != corev1.ServiceTypeExternalName && spec.InternalTrafficPolicy == nil {
		spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyCluster)
	}
	if spec.ExternalTrafficPolicy == "" && isExternal(svc) {
		spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	}
	if spec.Type != corev1.ServiceTypeLoadBalancer {
		return
	}
	if spec.AllocateLoadBalancerNodePorts == nil {
		spec.AllocateLoadBalancerNodePorts = new(true)
	}
	for i := range svc.Status.LoadBalancer.Ingress {
		if ingress := &svc.Status.LoadBalancer.Ingress[i]; ingress.IP != "" && ingress.IPMode == nil {
			ingress.IPMode = new(corev1.LoadBalancerIPModeVIP)
		}
	}
}

// isExternal reports whether clients outside the cluster can reach the Service.
func isExternal(svc *corev1.Service) bool {
	return hasNodePorts(svc) || (svc.Spec.Type == corev1.ServiceTypeClusterIP && len(svc.Spec.ExternalIPs) > 0)
}

func isHeadless(svc *corev1.Service) bool { return svc.Spec.ClusterIP == corev1.ClusterIPNone }

func validateService(svc *corev1.Service, r reportFunc) {
	spec := &svc.Spec
	// Kubernetes 1.36 and later allow names that begin with a digit.
	r.checkMetadata(&svc.ObjectMeta, validation.IsDNS1123Label)
	checkOneOf(r, "spec.type", spec.Type,
		corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName)
	checkOneOf(r, "spec.sessionAffinity", spec.SessionAffinity, corev1.ServiceAffinityNone, corev1.ServiceAffinityClientIP)
	if p := spec.InternalTrafficPolicy; p != nil {
		checkOneOf(r, "spec.internalTrafficPolicy", *p, corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal)
	}
	if p := spec.ExternalTrafficPolicy; p != "" && !isExternal(svc) {
		r.failf("spec.externalTrafficPolicy", "a Service of type %s without externalIPs has no external clients: "+
			"remove the field, or write type: NodePort or LoadBalancer", spec.Type)
	} else if p != "" {
		checkOneOf(r, "spec.externalTrafficPolicy", p, corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)
	}
	if c := spec.SessionAffinityConfig; spec.SessionAffinity == corev1.ServiceAffinityClientIP && c != nil {
		if seconds := *c.ClientIP.TimeoutSeconds; seconds < 1 || seconds > maxAffinitySeconds {
			r.failf("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "%d is not allowed: use 1 to %d", seconds, maxAffinitySeconds)
		}
	}
	if p := spec.TrafficDistribution; p != nil {
		checkOneOf(r, "spec.trafficDistribution", *p, corev1.ServiceTrafficDistributionPreferClose,
			corev1.ServiceTrafficDistributionPreferSameZone, corev1.ServiceTrafficDistributionPreferSameNode)
	}
	r.checkLabels("spec.selector", spec.Selector)
	for i, ip := range spec.ExternalIPs {
		r.checkAddress(fmt.Sprintf("spec.externalIPs[%d]", i), ip)
	}
	validateServicePorts(svc, r)
	validateNodePorts(svc, r)
	validateLoadBalancer(svc, r)
	if spec.Type == corev1.ServiceTypeExternalName {
		if len(spec.IPFamilies) > 0 {
			r.failf("spec.ipFamilies", "a Service of type ExternalName has no address: remove the field")
		}
		if spec.IPFamilyPolicy != nil {
			r.failf("spec.ipFamilyPolicy", "a Service of type ExternalName has no address: remove the field")
		}
		if spec.ClusterIP != "" {
			r.failf("spec.clusterIP", "a Service of type ExternalName has no address: remove the field")
		}
		name := strings.TrimSuffix(spec.ExternalName, ".")
		if name == "" {
			r.failf("spec.externalName", "missing: write the host name of the external service")
		} else {
			r.reportFormat("spec.externalName", "a host name", name, validation.IsDNS1123Subdomain(name))
		}
		return
	}
	validateFamilies(svc, r)
}

func validateServicePorts(svc *corev1.Service, r reportFunc) {
	spec := &svc.Spec
	if len(spec.Ports) == 0 && !isHeadless(svc) && spec.Type != corev1.ServiceTypeExternalName {
		r.failf("spec.ports", "missing: write at least one port")
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
			r.failf(path+".name", "missing: a Service with several ports needs a name for each")
		} else if port.Name != "" {
			r.reportFormat(path+".name", "a port name", port.Name, validation.IsDNS1123Label(port.Name))
			if first, ok := names[port.Name]; ok {
				r.failf(path+".name", "%q is also the name of spec.ports[%d]: use a different name for each port", port.Name, first)
			} else {
				names[port.Name] = i
			}
		}
		r.checkProtocol(path+".protocol", port.Protocol)
		r.checkPort(path+".port", port.Port)
		n := number{port.Protocol, port.Port}
		if first, ok := numbers[n]; ok && isProtocol(port.Protocol) && port.Port > 0 {
			r.failf(path+".port", "%d/%s is also spec.ports[%d]: remove one, or change its port or protocol", port.Port, port.Protocol, first)
		} else {
			numbers[n] = i
		}
		if port.TargetPort.Type == intstr.String {
			r.reportFormat(path+".targetPort", "the name of a container port", port.TargetPort.StrVal, validation.IsValidPortName(port.TargetPort.StrVal))
		} else if port.TargetPort.IntVal != port.Port {
			r.checkPort(path+".targetPort", port.TargetPort.IntVal)
		}
		if port.AppProtocol != nil {
			r.reportFormat(path+".appProtocol", "a protocol name", *port.AppProtocol, validation.IsQualifiedName(*port.AppProtocol))
		}
	}
}

// validateNodePorts checks the node ports in the file. Unlike the API server, it accepts
// ports outside the allocation range, because the administrator of the node writes the
// files.
func validateNodePorts(svc *corev1.Service, r reportFunc) {
	spec := &svc.Spec
	taken := map[nodePort]string{}
	for i := range spec.Ports {
		port := &spec.Ports[i]
		path := fmt.Sprintf("spec.ports[%d].nodePort", i)
		n := nodePort{port.Protocol, port.NodePort}
		switch first, ok := taken[n]; {
		case n.number == 0:
		case n.number < 0 || n.number > 65535:
			r.failf(path, "%d is not a port: use 1 to 65535, or remove the field to allocate one", n.number)
		case spec.Type == corev1.ServiceTypeClusterIP:
			r.failf(path, "a Service of type ClusterIP has no node ports: remove the field, or write type: NodePort")
		case ok:
			r.failf(path, "%s is also %s: change one of them, or remove the field to allocate one", n, first)
		default:
			taken[n] = path
		}
	}
	const path = "spec.healthCheckNodePort"
	switch n := (nodePort{corev1.ProtocolTCP, spec.HealthCheckNodePort}); {
	case n.number == 0:
	case n.number < 0 || n.number > 65535:
		r.failf(path, "%d is not a port: use 1 to 65535, or remove the field to allocate one", n.number)
	case !needsHealthCheck(svc):
		r.failf(path, "only for Services of type LoadBalancer with externalTrafficPolicy: Local: remove the field, or set both")
	case taken[n] != "":
		r.failf(path, "%s is also %s: change one of them, or remove the field to allocate one", n, taken[n])
	}
}

// validateLoadBalancer checks the fields that only load balancers have.
func validateLoadBalancer(svc *corev1.Service, r reportFunc) {
	spec := &svc.Spec
	for i, text := range spec.LoadBalancerSourceRanges {
		path := fmt.Sprintf("spec.loadBalancerSourceRanges[%d]", i)
		// The API server accepts surrounding spaces.
		prefix, err := netip.ParsePrefix(strings.TrimSpace(text))
		switch {
		case err != nil:
			r.failf(path, "%q is not a network: write it as 192.0.2.0/24 or 2001:db8::/32", text)
		case prefix.Addr().Is4In6():
			r.failf(path, "%q is an IPv4 network in IPv6 form: write it as IPv4", text)
		}
	}
	ingress := svc.Status.LoadBalancer.Ingress
	for i := range ingress {
		path := fmt.Sprintf("status.loadBalancer.ingress[%d]", i)
		if ingress[i].IP != "" {
			r.checkLoadBalancerIP(path+".ip", ingress[i].IP)
		}
		if mode := ingress[i].IPMode; mode != nil && ingress[i].IP == "" {
			r.failf(path+".ipMode", "not allowed without ip: write ip, or remove the field")
		} else if mode != nil {
			checkOneOf(r, path+".ipMode", *mode, corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy)
		}
		if name := ingress[i].Hostname; name != "" {
			r.reportFormat(path+".hostname", "a host name", name, validation.IsDNS1123Subdomain(name))
			if _, err := netip.ParseAddr(name); err == nil {
				r.failf(path+".hostname", "%s is an address: write it as ip", name)
			}
		}
	}
	if class := spec.LoadBalancerClass; class != nil {
		r.reportFormat("spec.loadBalancerClass", "the name of a class", *class, validation.IsQualifiedName(*class))
	}
	if spec.Type == corev1.ServiceTypeLoadBalancer {
		return
	}
	for _, f := range []struct {
		path  string
		given bool
	}{
		{"spec.loadBalancerSourceRanges", len(spec.LoadBalancerSourceRanges) > 0},
		{"spec.allocateLoadBalancerNodePorts", spec.AllocateLoadBalancerNodePorts != nil},
		{"spec.loadBalancerClass", spec.LoadBalancerClass != nil},
		{"status.loadBalancer.ingress", len(ingress) > 0},
	} {
		if f.given {
			r.failf(f.path, "only for Services of type LoadBalancer: remove the field, or write type: LoadBalancer")
		}
	}
}

// checkLoadBalancerIP reports text that cannot be the address of a load balancer. Unlike
// pod addresses, these may be link-local.
func (r reportFunc) checkLoadBalancerIP(path, text string) {
	if addr, err := netip.ParseAddr(text); err == nil && addr.Zone() == "" && addr.IsLinkLocalUnicast() {
		return
	}
	r.checkAddress(path, text)
}

// validateFamilies checks that the address fields of a Service agree with each other. It
// does not check them against --service-cidr.
func validateFamilies(svc *corev1.Service, r reportFunc) {
	spec := &svc.Spec
	if p := spec.IPFamilyPolicy; p != nil {
		checkOneOf(r, "spec.ipFamilyPolicy", *p,
			corev1.IPFamilyPolicySingleStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack)
	}
	for i, family := range spec.IPFamilies {
		path := fmt.Sprintf("spec.ipFamilies[%d]", i)
		checkOneOf(r, path, family, corev1.IPv4Protocol, corev1.IPv6Protocol)
		if slices.Contains(spec.IPFamilies[:i], family) {
			r.failf(path, "duplicate family %s: name each family once", family)
		}
	}
	selectorless := spec.IPFamilyPolicy == nil && len(spec.Selector) == 0 // a headless one may name both families
	single := spec.IPFamilyPolicy == nil || *spec.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack
	headless := isHeadless(svc)
	if single && (len(spec.ClusterIPs) > 1 || (len(spec.IPFamilies) > 1 && (!headless || !selectorless))) {
		r.failf("spec.ipFamilyPolicy", "a Service with two families needs PreferDualStack or RequireDualStack: write one of them")
	}
	if len(spec.ClusterIPs) > 2 {
		r.failf("spec.clusterIPs", "%d addresses: a Service has at most one per family", len(spec.ClusterIPs))
	}
	if len(spec.ClusterIPs) > 0 && spec.ClusterIPs[0] != spec.ClusterIP {
		r.failf("spec.clusterIPs[0]", "%q differs from spec.clusterIP, which is %q: make them equal", spec.ClusterIPs[0], spec.ClusterIP)
	}
	if headless {
		if spec.Type != corev1.ServiceTypeClusterIP {
			r.failf("spec.clusterIP", "None is only for Services of type ClusterIP: remove the field, or change the type")
		}
		return
	}
	var addrs []netip.Addr
	for i, text := range spec.ClusterIPs {
		path := "spec.clusterIP"
		if i > 0 {
			path = fmt.Sprintf("spec.clusterIPs[%d]", i)
		}
		addr, ok := r.checkAddress(path, text)
		if !ok {
			continue
		}
		if i < len(spec.IPFamilies) && spec.IPFamilies[i] != familyOf(addr) {
			r.failf(path, "%s does not match family %s in spec.ipFamilies[%d]: make them match", addr, spec.IPFamilies[i], i)
		}
		if slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() }) {
			r.failf(path, "%s is a second address of the same family: write one address per family", addr)
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

func validatePod(pod *corev1.Pod, r reportFunc) {
	r.checkMetadata(&pod.ObjectMeta, validation.IsDNS1123Subdomain)
	for _, f := range []struct{ path, value string }{
		{"spec.hostname", pod.Spec.Hostname}, {"spec.subdomain", pod.Spec.Subdomain},
	} {
		if f.value != "" {
			r.reportFormat(f.path, "a host name", f.value, validation.IsDNS1123Label(f.value))
		}
	}
	if n := pod.Spec.NodeName; n != "" {
		r.reportFormat("spec.nodeName", "the name of a node", n, validation.IsDNS1123Subdomain(n))
	}
	containers := func(path string, list []corev1.Container) {
		for i := range list {
			names := map[string]int{}
			for j := range list[i].Ports {
				port := &list[i].Ports[j]
				at := fmt.Sprintf("%s[%d].ports[%d]", path, i, j)
				r.checkPort(at+".containerPort", port.ContainerPort)
				if port.Protocol != "" {
					r.checkProtocol(at+".protocol", port.Protocol)
				}
				if port.Name == "" {
					continue
				}
				r.reportFormat(at+".name", "a port name", port.Name, validation.IsValidPortName(port.Name))
				if first, ok := names[port.Name]; ok {
					r.failf(at+".name", "%q is also the name of ports[%d] of this container: use a different name for each port", port.Name, first)
				} else {
					names[port.Name] = j
				}
			}
		}
	}
	containers("spec.containers", pod.Spec.Containers)
	containers("spec.initContainers", pod.Spec.InitContainers)
	if p := pod.Status.Phase; p != "" {
		checkOneOf(r, "status.phase", p, corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed, corev1.PodUnknown)
	}
	for i, c := range pod.Status.Conditions {
		checkOneOf(r, fmt.Sprintf("status.conditions[%d].status", i), c.Status, corev1.ConditionTrue, corev1.ConditionFalse, corev1.ConditionUnknown)
	}
	validatePodIPs(pod, r)
}

func validatePodIPs(pod *corev1.Pod, r reportFunc) {
	if ip := pod.Status.PodIP; ip != "" {
		r.checkAddress("status.podIP", ip)
		if len(pod.Status.PodIPs) > 0 && pod.Status.PodIPs[0].IP != ip {
			r.failf("status.podIPs[0].ip", "%q differs from status.podIP, which is %q: make them equal", pod.Status.PodIPs[0].IP, ip)
		}
	}
	var addrs []netip.Addr
	for i, ip := range pod.Status.PodIPs {
		path := fmt.Sprintf("status.podIPs[%d].ip", i)
		addr, ok := r.checkAddress(path, ip.IP)
		if !ok {
			continue
		}
		if slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() }) {
			r.failf(path, "%s is a second address of the same family: write one address per family", addr)
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

func validateEndpointSlice(slice *discoveryv1.EndpointSlice, r reportFunc) {
	r.checkMetadata(&slice.ObjectMeta, validation.IsDNS1123Subdomain)
	if strings.HasSuffix(slice.Name, generatedSuffix) {
		r.failf("metadata.name", "names that end in %s are reserved for EndpointSlices built from Pods: use another name", generatedSuffix)
	}
	checkOneOf(r, "addressType", slice.AddressType, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN)
	for i := range slice.Endpoints {
		validateEndpoint(slice, i, r)
	}
	names := map[string]int{}
	for i := range slice.Ports {
		port := &slice.Ports[i]
		path := fmt.Sprintf("ports[%d]", i)
		if *port.Name != "" {
			r.reportFormat(path+".name", "a port name", *port.Name, validation.IsDNS1123Label(*port.Name))
		}
		if first, ok := names[*port.Name]; ok {
			r.failf(path+".name", "%q is also the name of ports[%d]: use a different name for each port", *port.Name, first)
		} else {
			names[*port.Name] = i
		}
		r.checkProtocol(path+".protocol", *port.Protocol)
		if port.Port == nil {
			r.failf(path+".port", "missing: use 1 to 65535")
		} else {
			r.checkPort(path+".port", *port.Port)
		}
	}
}

func validateEndpoint(slice *discoveryv1.EndpointSlice, i int, r reportFunc) {
	ep := &slice.Endpoints[i]
	path := fmt.Sprintf("endpoints[%d]", i)
	if len(ep.Addresses) == 0 {
		r.failf(path+".addresses", "missing: write the endpoint's address")
	}
	for j, text := range ep.Addresses {
		at := fmt.Sprintf("%s.addresses[%d]", path, j)
		if slice.AddressType == discoveryv1.AddressTypeFQDN {
			r.reportFormat(at, "a host name", text, validation.IsDNS1123Subdomain(strings.TrimSuffix(text, ".")))
			continue
		}
		addr, ok := r.checkAddress(at, text)
		if ok && string(familyOf(addr)) != string(slice.AddressType) && slice.AddressType != "" {
			r.failf(at, "%s does not match the slice's addressType %s: move it to a slice of its family", addr, slice.AddressType)
		}
	}
	if ep.NodeName != nil {
		r.reportFormat(path+".nodeName", "the name of a node", *ep.NodeName, validation.IsDNS1123Subdomain(*ep.NodeName))
	}
	if ep.Hostname != nil {
		r.reportFormat(path+".hostname", "a host name", *ep.Hostname, validation.IsDNS1123Label(*ep.Hostname))
	}
	if ep.Hints != nil {
		var zones, nodes []string
		for _, zone := range ep.Hints.ForZones {
			zones = append(zones, zone.Name)
		}
		for _, node := range ep.Hints.ForNodes {
			nodes = append(nodes, node.Name)
		}
		r.checkHints(path+".hints.forZones", "a zone", zones, validation.IsValidLabelValue)
		r.checkHints(path+".hints.forNodes", "the name of a node", nodes, validation.IsDNS1123Subdomain)
	}
}

// checkHints checks the zones or nodes of an endpoint's hints.
func (r reportFunc) checkHints(path, what string, names []string, format func(string) []string) {
	if len(names) > maxHints {
		r.failf(path, "%d names: use at most %d", len(names), maxHints)
	}
	for i, name := range names {
		at := fmt.Sprintf("%s[%d].name", path, i)
		r.reportFormat(at, what, name, format(name))
		if slices.Contains(names[:i], name) {
			r.failf(at, "duplicate %q: name each once", name)
		}
	}
}
