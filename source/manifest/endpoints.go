package manifest

import (
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// generatedSuffix ends the names of EndpointSlices built from Pods. A Service name contains
// no dot, so these names do not conflict with names derived from other Services.
const generatedSuffix = ".manifest"

// managedBy is the value of the label endpointslice.kubernetes.io/managed-by.
const managedBy = "manifest.fairlead"

// selects reports whether the selector matches the labels. An empty selector matches
// nothing.
func selects(selector, labels map[string]string) bool {
	for key, value := range selector {
		if got, ok := labels[key]; !ok || got != value {
			return false
		}
	}
	return len(selector) > 0
}

// buildEndpointSlices returns the EndpointSlices of a Service for the pods that its
// selector matches, as Kubernetes' EndpointSlice controller builds them. Pods that resolve
// a named port to different numbers are in different slices.
func buildEndpointSlices(svc *corev1.Service, pods []*corev1.Pod, nodeName string) []*discoveryv1.EndpointSlice {
	slices.SortFunc(pods, func(a, b *corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	var built []*discoveryv1.EndpointSlice
	byName := map[string]*discoveryv1.EndpointSlice{}
	for _, pod := range pods {
		if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
			continue
		}
		var ports []discoveryv1.EndpointPort
		for _, family := range svc.Spec.IPFamilies {
			ip := podIP(pod, family)
			if ip == "" {
				continue
			}
			if ports == nil {
				ports = endpointPorts(svc, pod)
			}
			name := sliceName(svc.Name, family, ports)
			slice, ok := byName[name]
			if !ok {
				slice = newSlice(svc, name, family, ports)
				byName[name] = slice
				built = append(built, slice)
			}
			slice.Endpoints = append(slice.Endpoints, newEndpoint(svc, pod, ip, nodeName))
		}
	}
	return built
}

// sliceName returns a stable name that depends only on the Service, the family and the
// ports.
func sliceName(service string, family corev1.IPFamily, ports []discoveryv1.EndpointPort) string {
	h := fnv.New32a()
	for _, p := range ports {
		_, _ = fmt.Fprintf(h, "%s/%s/%d;", *p.Name, *p.Protocol, *p.Port)
	}
	return fmt.Sprintf("%s-%s-%08x%s", service, strings.ToLower(string(family)), h.Sum32(), generatedSuffix)
}

func newSlice(svc *corev1.Service, name string, family corev1.IPFamily, ports []discoveryv1.EndpointPort) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: string(kindEndpointSlice)},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: svc.Namespace, Name: name,
			Labels: map[string]string{
				discoveryv1.LabelServiceName: svc.Name,
				discoveryv1.LabelManagedBy:   managedBy,
			},
		},
		AddressType: discoveryv1.AddressType(family),
		Ports:       ports,
	}
	if isHeadless(svc) {
		slice.Labels[corev1.IsHeadlessService] = ""
	}
	return slice
}

// endpointPorts returns the Service's ports that the pod serves. A named target port that
// no container of the pod defines is left out.
func endpointPorts(svc *corev1.Service, pod *corev1.Pod) []discoveryv1.EndpointPort {
	ports := []discoveryv1.EndpointPort{}
	for i := range svc.Spec.Ports {
		p := &svc.Spec.Ports[i]
		number, ok := targetPort(p, pod)
		if !ok {
			continue
		}
		ports = append(ports, discoveryv1.EndpointPort{
			Name: new(p.Name), Protocol: new(p.Protocol), Port: &number, AppProtocol: p.AppProtocol,
		})
	}
	return ports
}

// targetPort resolves a Service port on one pod.
func targetPort(p *corev1.ServicePort, pod *corev1.Pod) (int32, bool) {
	if p.TargetPort.Type == intstr.Int {
		return p.TargetPort.IntVal, true
	}
	find := func(containers []corev1.Container) (int32, bool) {
		for i := range containers {
			for _, cp := range containers[i].Ports {
				protocol := cp.Protocol
				if protocol == "" {
					protocol = corev1.ProtocolTCP
				}
				if cp.Name == p.TargetPort.StrVal && protocol == p.Protocol {
					return cp.ContainerPort, true
				}
			}
		}
		return 0, false
	}
	if number, ok := find(pod.Spec.Containers); ok {
		return number, true
	}
	// Sidecars are init containers that are always restarted.
	return find(slices.DeleteFunc(slices.Clone(pod.Spec.InitContainers), func(c corev1.Container) bool {
		return c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways
	}))
}

// podIP returns the pod's address of a family, or "".
func podIP(pod *corev1.Pod, family corev1.IPFamily) string {
	ips := pod.Status.PodIPs
	if len(ips) == 0 && pod.Status.PodIP != "" {
		ips = []corev1.PodIP{{IP: pod.Status.PodIP}}
	}
	for _, ip := range ips {
		if addr, err := netip.ParseAddr(ip.IP); err == nil && familyOf(addr) == family {
			return addr.String()
		}
	}
	return ""
}

// isPodReady reports whether the pod accepts connections: as the condition Ready says or,
// without this condition, as in hand-written files, if its phase is unset or Running.
func isPodReady(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return pod.Status.Phase == "" || pod.Status.Phase == corev1.PodRunning
}

func newEndpoint(svc *corev1.Service, pod *corev1.Pod, ip, nodeName string) discoveryv1.Endpoint {
	serving := isPodReady(pod)
	terminating := pod.DeletionTimestamp != nil
	ep := discoveryv1.Endpoint{
		Addresses: []string{ip},
		Conditions: discoveryv1.EndpointConditions{
			Ready:       new(svc.Spec.PublishNotReadyAddresses || (serving && !terminating)),
			Serving:     new(serving),
			Terminating: new(terminating),
		},
		TargetRef: &corev1.ObjectReference{Kind: string(kindPod), Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
	}
	if pod.Spec.NodeName != "" {
		ep.NodeName = new(pod.Spec.NodeName)
	} else if nodeName != "" {
		ep.NodeName = new(nodeName)
	}
	if p := svc.Spec.TrafficDistribution; p != nil && *p == corev1.ServiceTrafficDistributionPreferSameNode &&
		ep.NodeName != nil && *ep.Conditions.Ready {
		ep.Hints = &discoveryv1.EndpointHints{ForNodes: []discoveryv1.ForNode{{Name: *ep.NodeName}}}
	}
	if pod.Spec.Hostname != "" && pod.Spec.Subdomain == svc.Name {
		ep.Hostname = new(pod.Spec.Hostname)
	}
	return ep
}
