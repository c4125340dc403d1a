package kube

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// LabelServiceProxyName marks a Service that another proxy serves. k8s.io/api does not export a
// constant for it.
const LabelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// location contains the properties of this node that the selection of endpoints depends on.
type location struct {
	// node is the node's name. If it is empty, no endpoint is known to be on this node.
	node string
	// zone is the node's label topology.kubernetes.io/zone.
	zone string
	// ownAddrs are the node's addresses, see networks.ownAddrs.
	ownAddrs map[netip.Addr]struct{}
}

// desiredState is the state that a Service and its slices request, before conflicts are resolved.
type desiredState struct {
	services []desiredService
	// problems contains the problems of the objects, sorted and deduplicated.
	problems []Problem
	// unmatchedPorts lists the ports that are missing in all slices, if there are slices with
	// endpoints.
	unmatchedPorts []unmatchedPort
	// zoneDependent is set if the desired state may change with the zone of this node.
	zoneDependent bool
	// healthCheck is the health-check node port; its Port is 0 without one.
	healthCheck HealthCheck
	// clusterIPs contains all cluster IPs, including unusable ones.
	clusterIPs []netip.Addr
}

// desiredService is one Service port in one family with its frontends of one kind.
type desiredService struct {
	key dataplane.Key
	// port is the port's index in spec.ports.
	port int
	// frontends is sorted and deduplicated.
	frontends []dataplane.Frontend
	spec      dataplane.ServiceSpec
	// serving becomes Service.Serving.
	serving []netip.AddrPort
}

// convert returns the desired state of the Service, given its slices.
func convert(svc *corev1.Service, endpointSlices []*endpointSlice, loc location, opts Options) desiredState {
	return convertAndRecord(svc, endpointSlices, loc, opts, nil)
}

// convertAndRecord is convert. If r is not nil, it also records how it has found the result.
func convertAndRecord(svc *corev1.Service, endpointSlices []*endpointSlice, loc location, opts Options, r *recorder) desiredState {
	if !shouldServe(svc, opts.ServiceProxyName) {
		return desiredState{}
	}
	c := conversion{
		service:    svc,
		name:       types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name},
		location:   loc,
		schedulers: opts.Schedulers,
		balancing:  opts.Balancing,
		recorder:   r,
	}
	policy := c.policy()
	addrs := c.addresses()
	ports := c.ports(addrs)
	c.endpoints(ports, endpointSlices, policy)
	d := desiredState{
		services:      c.desiredServices(ports, addrs, policy),
		zoneDependent: slices.ContainsFunc(ports, func(p portFamily) bool { return p.chosen.zoneDependent }),
		healthCheck:   c.healthCheck(ports, policy),

		clusterIPs: addrs.clusterIPs,
	}
	c.recorder.record(policy, ports, endpointSlices)
	d.unmatchedPorts = c.unmatchedPorts
	slices.SortFunc(c.problems, Problem.Compare)
	d.problems = slices.Compact(c.problems)
	return d
}

// shouldServe reports whether the proxy with the given name serves the Service. The default proxy
// has no name.
func shouldServe(svc *corev1.Service, proxyName string) bool {
	return whyNotServed(svc, proxyName) == Served
}

// whyNotServed returns why the proxy with the given name does not serve the Service, or Served.
func whyNotServed(svc *corev1.Service, proxyName string) NotServed {
	switch {
	case svc == nil:
		return NoSuchService
	case svc.Spec.Type == corev1.ServiceTypeExternalName:
		return IsExternalName
	case svc.Spec.ClusterIP == corev1.ClusterIPNone, len(svc.Spec.ClusterIPs) > 0 && svc.Spec.ClusterIPs[0] == corev1.ClusterIPNone:
		return IsHeadless
	}
	if name, named := svc.Labels[LabelServiceProxyName]; named != (proxyName != "") || name != proxyName {
		return OfAnotherProxy
	}
	return Served
}

// conversion is the state of one call of convert.
type conversion struct {
	service    *corev1.Service
	name       types.NamespacedName
	location   location
	schedulers []string
	balancing  Balancing
	problems   []Problem

	unmatchedPorts []unmatchedPort
	// recorder is nil unless the caller asks for an explanation.
	recorder *recorder
}

func (c *conversion) addProblem(field, format string, args ...any) {
	c.problems = append(c.problems, c.newProblem(field, format, args...))
}

func (c *conversion) newProblem(field, format string, args ...any) Problem {
	return Problem{Service: c.name, UID: c.service.UID, Field: field, Message: fmt.Sprintf(format, args...)}
}

// elementPath returns the path of a list element: elementPath("spec.ports", 0, ".port") is
// "spec.ports[0].port".
func elementPath(list string, i int, rest string) string {
	return fmt.Sprintf("%s[%d]%s", list, i, rest)
}
