package kube

import (
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"fairlead.io/fairlead/dataplane"
)

// AnnotationIPVSScheduler is the annotation of a Service whose value is the
// kernel's name of the IPVS scheduler that picks the endpoints of its
// connections.
const AnnotationIPVSScheduler = "fairlead.io/ipvs-scheduler"

// policy is what a Service says about connections to all its ports.
type policy struct {
	// internalLocal and externalLocal are the traffic policies Local.
	internalLocal, externalLocal bool
	// affinity is zero where there is none.
	affinity time.Duration
	// scheduler is empty where the backend is to pick endpoints in its own way.
	scheduler string
}

// policy reads the Service's type, traffic policies, session affinity and
// scheduler.
func (c *conversion) policy() policy {
	spec := &c.service.Spec
	switch spec.Type {
	case corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName, "":
	default:
		c.addProblem("spec.type", "%q is not a type of Service: use ClusterIP, NodePort or LoadBalancer", spec.Type)
	}
	p := policy{affinity: c.affinity(), scheduler: c.scheduler()}
	if i := spec.InternalTrafficPolicy; i != nil {
		switch *i {
		case corev1.ServiceInternalTrafficPolicyLocal:
			p.internalLocal = true
		case corev1.ServiceInternalTrafficPolicyCluster, "":
		default:
			c.addProblem("spec.internalTrafficPolicy", "%q is not a policy, so that of Cluster holds: use Cluster or Local", *i)
		}
	}
	switch spec.ExternalTrafficPolicy {
	case corev1.ServiceExternalTrafficPolicyLocal:
		// The field says nothing where nobody outside can connect, as left over
		// from another type.
		p.externalLocal = hasNodePorts(spec.Type) || len(spec.ExternalIPs) > 0
	case corev1.ServiceExternalTrafficPolicyCluster, "":
	default:
		c.addProblem("spec.externalTrafficPolicy", "%q is not a policy, so that of Cluster holds: use Cluster or Local",
			spec.ExternalTrafficPolicy)
	}
	return p
}

// affinity returns the time after which a client is forgotten.
func (c *conversion) affinity() time.Duration {
	spec := &c.service.Spec
	switch spec.SessionAffinity {
	case corev1.ServiceAffinityClientIP:
	case corev1.ServiceAffinityNone, "":
		return 0
	default:
		c.addProblem("spec.sessionAffinity", "%q is not an affinity, so there is none: use ClientIP or None", spec.SessionAffinity)
		return 0
	}
	seconds := corev1.DefaultClientIPServiceAffinitySeconds
	if config := spec.SessionAffinityConfig; config != nil && config.ClientIP != nil && config.ClientIP.TimeoutSeconds != nil {
		longest := int32(dataplane.MaxAffinity / time.Second)
		if s := *config.ClientIP.TimeoutSeconds; s >= 1 && s <= longest {
			seconds = s
		} else {
			c.addProblem("spec.sessionAffinityConfig.clientIP.timeoutSeconds",
				"%d is not a timeout, so that of %d holds: use 1 to %d", s, seconds, longest)
		}
	}
	return time.Duration(seconds) * time.Second
}

// scheduler returns the name of the scheduler that the Service's annotation asks
// for.
func (c *conversion) scheduler() string {
	name := c.service.Annotations[AnnotationIPVSScheduler]
	const field = "metadata.annotations[" + AnnotationIPVSScheduler + "]"
	switch {
	case name == "":
	case len(c.schedulers) == 0:
		c.addProblem(field, "%q has no effect, as this node is not in the ipvs mode: remove the annotation, or run Fairlead with --mode=ipvs", name)
	case !slices.Contains(c.schedulers, name):
		c.addProblem(field, "%q is not a scheduler, so that of --ipvs-scheduler holds: use one of %s", name, strings.Join(c.schedulers, ", "))
	default:
		return name
	}
	return ""
}

// treatment says what happens to the connections to frontends of one kind.
func (p policy) treatment(kind dataplane.Kind, chosen choice) dataplane.ServiceSpec {
	t := dataplane.ServiceSpec{Endpoints: chosen.cluster, Affinity: p.affinity, Scheduler: p.scheduler}
	decisive := chosen.cluster
	switch {
	case kind == dataplane.ClusterIP:
		t.Masquerade = dataplane.MasqueradeOffCluster
		if p.internalLocal {
			t.Endpoints = chosen.local
			decisive = chosen.local
		}
	case p.externalLocal:
		// The client's address is what the policy is there to preserve.
		t.Masquerade = dataplane.MasqueradeFromNode
		t.ExternalTrafficPolicyLocal = true
		t.LocalEndpoints = chosen.local
		decisive = chosen.local
	default:
		t.Masquerade = dataplane.MasqueradeAlways
	}
	// Endpoints elsewhere: a load balancer that has not heard yet that there is
	// none here had better try again than give up.
	if len(decisive) == 0 && chosen.usableAnywhere {
		t.NoEndpointsVerdict = dataplane.Drop
	}
	return t
}
