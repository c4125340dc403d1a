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
	// own are the node's own addresses, see networks.ownAddrs.
	own map[netip.Addr]struct{}
}

// demand is what a Service asks for, given its slices, before collisions are
// settled.
type demand struct {
	wants []wanted
	// problems of the objects, sorted and without doubles.
	problems []Problem
	// unmatched are the ports that no slice knows although there are slices with
	// endpoints.
	unmatched []unmatched
	// zoned says that another zone of this node may give another demand.
	zoned bool
	// check is the health-check node port, or has port 0.
	check HealthCheck
	// clusterIPs are the cluster IPs, served or not.
	clusterIPs []netip.Addr
}

// wanted is one Service port in one family with its frontends of one kind.
type wanted struct {
	key dataplane.Key
	// port is the index in spec.ports.
	port int
	// frontends are sorted and unique.
	frontends []dataplane.Frontend
	treatment dataplane.Treatment
	// serving is Service.Serving.
	serving []netip.AddrPort
}

// convert returns what the Service asks for, given all slices that belong to it
// and the schedulers that there are.
func convert(svc *corev1.Service, endpointSlices []*endpointSlice, here location, schedulers []string) demand {
	if !served(svc) {
		return demand{}
	}
	c := conversion{
		service:    svc,
		name:       types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name},
		here:       here,
		schedulers: schedulers,
	}
	policy := c.policy()
	addrs := c.addresses()
	ports := c.ports(addrs)
	c.endpoints(ports, endpointSlices, policy)
	d := demand{
		wants: c.wants(ports, addrs, policy),
		zoned: slices.ContainsFunc(ports, func(p portFamily) bool { return p.chosen.zoned }),
		check: c.healthCheck(ports, policy),

		clusterIPs: addrs.cluster,
	}
	d.unmatched = c.unmatched
	slices.SortFunc(c.problems, Problem.Compare)
	d.problems = slices.Compact(c.problems)
	return d
}

// served reports whether the Service is one for this proxy to serve.
func served(svc *corev1.Service) bool {
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
	here       location
	schedulers []string
	problems   []Problem

	unmatched []unmatched
}

func (c *conversion) problem(field, format string, args ...any) {
	c.problems = append(c.problems, c.newProblem(field, format, args...))
}

func (c *conversion) newProblem(field, format string, args ...any) Problem {
	return Problem{Service: c.name, UID: c.service.UID, Field: field, Message: fmt.Sprintf(format, args...)}
}

// index writes the path of an element: index("spec.ports", 0, ".port").
func index(list string, i int, rest string) string { return fmt.Sprintf("%s[%d]%s", list, i, rest) }
