package kube

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"fairlead.io/fairlead/dataplane"
)

// AnnotationIPVSScheduler is the Service annotation that selects an IPVS scheduler by its kernel
// name.
const AnnotationIPVSScheduler = "fairlead.io/ipvs-scheduler"

// AnnotationBalancing is the Service annotation that selects how connections are distributed over
// the endpoints, independently of the backend. Its values are the constants below.
const AnnotationBalancing = "fairlead.io/balancing"

// Values of [AnnotationBalancing].
const (
	// BalanceRandom selects a random endpoint for each connection.
	BalanceRandom = "random"
	// BalanceRoundRobin selects the endpoints in turn.
	BalanceRoundRobin = "round-robin"
	// BalanceSourceHash selects the endpoint by the client's address. Few clients move to
	// another endpoint when endpoints change.
	BalanceSourceHash = "source-hash"
	// BalanceLeastConnections selects the endpoint with the fewest connections.
	BalanceLeastConnections = "least-connections"
)

// balancings returns the values of AnnotationBalancing, sorted.
func balancings() []string {
	return []string{BalanceLeastConnections, BalanceRandom, BalanceRoundRobin, BalanceSourceHash}
}

// Balancing describes which values of [AnnotationBalancing] a backend supports.
type Balancing struct {
	// Schedulers contains the [dataplane.ServiceSpec].Scheduler for each supported value.
	Schedulers map[string]string
	// Default names what selects the endpoints of a Service whose value is not supported, for
	// messages to the user.
	Default string
}

// policy contains the settings of a Service that apply to every port.
type policy struct {
	// internalLocal and externalLocal are set for the traffic policy Local.
	internalLocal, externalLocal bool
	// affinity is the session affinity timeout, or zero for no affinity.
	affinity time.Duration
	// scheduler is empty for the backend's default.
	scheduler string
}

// policy reads the type, traffic policies, session affinity and scheduler of the Service.
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
			c.addProblem("spec.internalTrafficPolicy", "%q is not a traffic policy, so Cluster is used: set it to Cluster or Local", *i)
		}
	}
	switch spec.ExternalTrafficPolicy {
	case corev1.ServiceExternalTrafficPolicyLocal:
		// The field has no effect on a Service without external addresses. It may be left over
		// from another type.
		p.externalLocal = hasNodePorts(spec.Type) || len(spec.ExternalIPs) > 0
	case corev1.ServiceExternalTrafficPolicyCluster, "":
	default:
		c.addProblem("spec.externalTrafficPolicy", "%q is not a traffic policy, so Cluster is used: set it to Cluster or Local",
			spec.ExternalTrafficPolicy)
	}
	return p
}

// affinity returns the session affinity timeout, or zero for no affinity.
func (c *conversion) affinity() time.Duration {
	spec := &c.service.Spec
	switch spec.SessionAffinity {
	case corev1.ServiceAffinityClientIP:
	case corev1.ServiceAffinityNone, "":
		return 0
	default:
		c.addProblem("spec.sessionAffinity", "%q is not a session affinity, so None is used: set it to ClientIP or None", spec.SessionAffinity)
		return 0
	}
	seconds := corev1.DefaultClientIPServiceAffinitySeconds
	if config := spec.SessionAffinityConfig; config != nil && config.ClientIP != nil && config.ClientIP.TimeoutSeconds != nil {
		longest := int32(dataplane.MaxAffinity / time.Second)
		if s := *config.ClientIP.TimeoutSeconds; s >= 1 && s <= longest {
			seconds = s
		} else {
			c.addProblem("spec.sessionAffinityConfig.clientIP.timeoutSeconds",
				"%d is not a valid timeout, so %d is used: set it to a value from 1 to %d", s, seconds, longest)
		}
	}
	return time.Duration(seconds) * time.Second
}

// scheduler returns the scheduler that the Service's annotations select. With IPVS,
// AnnotationIPVSScheduler takes precedence over AnnotationBalancing, because it is more specific.
func (c *conversion) scheduler() string {
	name, balancing := c.service.Annotations[AnnotationIPVSScheduler], c.service.Annotations[AnnotationBalancing]
	const field = "metadata.annotations[" + AnnotationIPVSScheduler + "]"
	switch {
	case balancing != "" && (name == "" || len(c.schedulers) == 0):
		return c.balancingScheduler(balancing)
	case name == "":
	case len(c.schedulers) == 0:
		c.addProblem(field, "%q has no effect, because this node does not use the ipvs mode: remove the annotation, or run Fairlead with --mode=ipvs", name)
	case !slices.Contains(c.schedulers, name):
		c.addProblem(field, "%q is not a supported scheduler, so --ipvs-scheduler is used: set it to one of %s", name, strings.Join(c.schedulers, ", "))
	default:
		return name
	}
	return ""
}

// balancingScheduler returns the scheduler for a value of AnnotationBalancing.
func (c *conversion) balancingScheduler(value string) string {
	scheduler, ok := c.balancing.Schedulers[value]
	if ok {
		return scheduler
	}
	problem := "is not a kind of balancing"
	if slices.Contains(balancings(), value) {
		problem = "is not possible in the mode of this node"
	}
	fix := "remove the annotation"
	if len(c.balancing.Schedulers) > 0 {
		fix = "set it to one of " + strings.Join(slices.Sorted(maps.Keys(c.balancing.Schedulers)), ", ")
	}
	c.addProblem("metadata.annotations["+AnnotationBalancing+"]", "%q %s, so %s is used: %s",
		value, problem, cmp.Or(c.balancing.Default, "the default"), fix)
	return ""
}

// trafficPolicy returns the field with the traffic policy for frontends of one kind, and whether
// the policy is Local.
func (p policy) trafficPolicy(kind dataplane.Kind) (field string, local bool) {
	if kind == dataplane.ClusterIP {
		return "spec.internalTrafficPolicy", p.internalLocal
	}
	return "spec.externalTrafficPolicy", p.externalLocal
}

// spec returns the ServiceSpec for frontends of one kind.
func (p policy) spec(kind dataplane.Kind, chosen choice) dataplane.ServiceSpec {
	t := dataplane.ServiceSpec{Endpoints: chosen.cluster, Affinity: p.affinity, Scheduler: p.scheduler}
	policyEndpoints := chosen.cluster
	_, local := p.trafficPolicy(kind)
	switch {
	case kind == dataplane.ClusterIP:
		t.Masquerade = dataplane.MasqueradeOffCluster
		if local {
			t.Endpoints = chosen.local
			policyEndpoints = chosen.local
		}
	case local:
		// The purpose of the policy is to preserve the client's address.
		t.Masquerade = dataplane.MasqueradeFromNode
		t.ExternalTrafficPolicyLocal = true
		t.LocalEndpoints = chosen.local
		policyEndpoints = chosen.local
	default:
		t.Masquerade = dataplane.MasqueradeAlways
	}
	// There are endpoints on other nodes. A load balancer that has not noticed yet that this node
	// has none should try again instead of giving up.
	if len(policyEndpoints) == 0 && chosen.usableAnywhere {
		t.NoEndpointsVerdict = dataplane.Drop
	}
	return t
}
