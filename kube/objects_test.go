package kube

import (
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"fairlead/dataplane"
)

// newService returns a Service default/name with one port http, 80/TCP, on the
// cluster IPs given, changed by the functions.
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

// age makes the Service as old as said, on a clock that stands still.
func age(d time.Duration) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		svc.CreationTimestamp = metav1.NewTime(time.Unix(1_800_000_000, 0).Add(-d))
	}
}

// newSlice returns an EndpointSlice default/name of the Service with port http,
// 8080/TCP. Its family is that of the first endpoint.
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

// eps reads endpoints: an address, then any of
//
//	@name          on the node called name
//	!ready         and !serving: the condition is false
//	+ready         and +serving, +terminating: the condition is true
func eps(texts ...string) []discoveryv1.Endpoint {
	var endpoints []discoveryv1.Endpoint
	for _, text := range texts {
		words := strings.Fields(text)
		ep := discoveryv1.Endpoint{Addresses: []string{words[0]}}
		for _, word := range words[1:] {
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
					panic(fmt.Sprintf("endpoint %q: what is %q?", text, word))
				}
				node := word[1:]
				ep.NodeName = &node
			}
		}
		endpoints = append(endpoints, ep)
	}
	return endpoints
}

func named(name string) types.NamespacedName {
	return types.NamespacedName{Namespace: "default", Name: name}
}

// text writes a Service as
//
//	10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080(local)
func text(svc *dataplane.Service) string {
	if svc == nil {
		return "gone"
	}
	var words []string
	for _, f := range svc.Frontends {
		words = append(words, f.String())
	}
	words = append(words, "->")
	for _, e := range svc.Endpoints {
		word := e.Addr.String()
		if e.Local {
			word += "(local)"
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

func texts(changes map[dataplane.Key]*dataplane.Service) map[string]string {
	out := map[string]string{}
	for key, svc := range changes {
		if svc != nil && svc.Key != key {
			panic(fmt.Sprintf("key %s has a Service with key %s", key, svc.Key))
		}
		out[key.String()] = text(svc)
	}
	return out
}
