package kube

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"fairlead.io/fairlead/dataplane"
)

// HealthCheck is a health-check node port and the number that it reports.
type HealthCheck struct {
	// Port is spec.healthCheckNodePort.
	Port uint16
	// LocalEndpoints is the number of ready pods on this node. For a dual-stack Service it is the
	// larger number of both families.
	LocalEndpoints int
}

// healthCheck returns the Service's health-check node port. Its Port is 0 without one.
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

// countReadyLocal returns the number of distinct addresses of ready local endpoints, over all
// ports.
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
