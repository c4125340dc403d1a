package kube

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"fairlead.io/fairlead/dataplane"
)

// HealthCheck is what a health-check node port answers.
type HealthCheck struct {
	// Port is spec.healthCheckNodePort.
	Port uint16
	// LocalEndpoints is the number of ready pods on this node. Those of a
	// dual-stack Service are counted in the family that has more.
	LocalEndpoints int
}

// healthCheck returns what the Service's health-check node port answers, or a
// HealthCheck with port 0 where it has none.
func (c *conversion) healthCheck(ports []portFamily, policy policy) HealthCheck {
	spec := &c.service.Spec
	if spec.Type != corev1.ServiceTypeLoadBalancer || !policy.externalLocal || spec.HealthCheckNodePort == 0 {
		return HealthCheck{}
	}
	if spec.HealthCheckNodePort < 0 || spec.HealthCheckNodePort > 65535 {
		c.addProblem("spec.healthCheckNodePort", "%d is not a port: use 1 to 65535", spec.HealthCheckNodePort)
		return HealthCheck{}
	}
	if len(ports) == 0 {
		return HealthCheck{}
	}
	return HealthCheck{
		Port:           uint16(spec.HealthCheckNodePort), //nolint:gosec // the range was checked above
		LocalEndpoints: max(countReadyLocal(ports, dataplane.IPv4), countReadyLocal(ports, dataplane.IPv6)),
	}
}

// countReadyLocal returns how many addresses of this node's pods are ready, for any
// port.
func countReadyLocal(ports []portFamily, family dataplane.Family) int {
	addrs := map[netip.Addr]struct{}{}
	for i := range ports {
		if p := &ports[i]; p.family == family && !p.chosen.localTerminating {
			for _, e := range p.chosen.local {
				addrs[e.Addr.Addr()] = struct{}{}
			}
		}
	}
	return len(addrs)
}
