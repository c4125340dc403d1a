package kube

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// LabelServiceProxyName marks a Service that another proxy serves. The constant
// of the same name is not in k8s.io/api.
const LabelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// location is where this node is, as far as endpoints are chosen by it.
type location struct {
	// node is the node's name. If it is empty, no endpoint is known to be here.
	node string
	// zone is the node's label topology.kubernetes.io/zone.
	zone string
	// ownAddrs are the node's own addresses, see networks.ownAddrs.
	ownAddrs map[netip.Addr]struct{}
}

// desiredState is what a Service asks for, given its slices, before collisions are
// settled.
type desiredState struct {
	services []desiredService
	// problems of the objects, sorted and without doubles.
	problems []Problem
	// unmatchedPorts are the ports that no slice knows although there are slices with
	// endpoints.
	unmatchedPorts []unmatchedPort
	// zoneDependent says that another zone of this node may give another demand.
	zoneDependent bool
	// healthCheck is the health-check node port, or has port 0.
	healthCheck HealthCheck
	// clusterIPs are the cluster IPs, served or not.
	clusterIPs []netip.Addr
}

// desiredService is one Service port in one family with its frontends of one kind.
type desiredService struct {
	key dataplane.Key
	// port is the index in spec.ports.
	port int
	// frontends are sorted and unique.
	frontends []dataplane.Frontend
	treatment dataplane.ServiceSpec
	// serving is Service.Serving.
	serving []netip.AddrPort
}

// convert returns what the Service asks for, given all slices that belong to it
// and the schedulers that there are.
func convert(svc *corev1.Service, endpointSlices []*endpointSlice, here location, schedulers []string) desiredState {
	if !shouldServe(svc) {
		return desiredState{}
	}
	c := conversion{
		service:    svc,
		name:       types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name},
		location:   here,
		schedulers: schedulers,
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
	d.unmatchedPorts = c.unmatchedPorts
	slices.SortFunc(c.problems, Problem.Compare)
	d.problems = slices.Compact(c.problems)
	return d
}

// shouldServe reports whether the Service is one for this proxy to serve.
func shouldServe(svc *corev1.Service) bool {
	if svc == nil || svc.Spec.Type == corev1.ServiceTypeExternalName {
		return false
	}
	if svc.Spec.ClusterIP == corev1.ClusterIPNone || (len(svc.Spec.ClusterIPs) > 0 && svc.Spec.ClusterIPs[0] == corev1.ClusterIPNone) {
		return false
	}
	_, other := svc.Labels[LabelServiceProxyName]
	return !other
}

// conversion is one call of convert.
type conversion struct {
	service    *corev1.Service
	name       types.NamespacedName
	location   location
	schedulers []string
	problems   []Problem

	unmatchedPorts []unmatchedPort
}

func (c *conversion) addProblem(field, format string, args ...any) {
	c.problems = append(c.problems, c.newProblem(field, format, args...))
}

func (c *conversion) newProblem(field, format string, args ...any) Problem {
	return Problem{Service: c.name, UID: c.service.UID, Field: field, Message: fmt.Sprintf(format, args...)}
}

// elementPath writes the path of an element: index("spec.ports", 0, ".port").
func elementPath(list string, i int, rest string) string {
	return fmt.Sprintf("%s[%d]%s", list, i, rest)
}
