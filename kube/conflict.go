package kube

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// conflicts collects the frontends that other Services own. There can be thousands, if two
// Services with many ports list the same external IPs.
type conflicts struct {
	// all contains one conflict per field and owner, in order of discovery.
	all  []conflict
	seen map[conflictKey]int
}

// conflict is a claimed frontend that has another owner, and the number of further frontends with
// the same field and owner.
type conflict struct {
	desired  *desiredService
	frontend dataplane.Frontend
	owner    claim
	others   int
}

// conflictKey identifies the field of a Service and the owner of its frontends.
type conflictKey struct {
	kind dataplane.Kind
	// addr is an external or load balancer IP. port is the index in spec.ports of a node port, or
	// -1.
	addr             netip.Addr
	port             int
	owner            *service
	ownerIsClusterIP bool // the owner claims it as a cluster IP
}

func (c *conflicts) add(ds *desiredService, f dataplane.Frontend, owner claim) {
	key := conflictKey{kind: ds.key.Kind, port: -1, owner: owner.service, ownerIsClusterIP: owner.kind == dataplane.ClusterIP}
	switch {
	case ds.key.Kind == dataplane.NodePort, ds.key.Kind == dataplane.ClusterIP && owner.service.name == keyName(ds.key):
		key.port = ds.port
	case ds.key.Kind != dataplane.ClusterIP:
		key.addr = f.Addr.Addr()
	}
	if i, ok := c.seen[key]; ok {
		if ds.key.Kind != dataplane.NodePort { // a node port is the same in both families
			c.all[i].others++
		}
		return
	}
	if c.seen == nil {
		c.seen = map[conflictKey]int{}
	}
	c.seen[key] = len(c.all)
	c.all = append(c.all, conflict{desired: ds, frontend: f, owner: owner})
}

func keyName(key dataplane.Key) types.NamespacedName {
	return types.NamespacedName{Namespace: key.Namespace, Name: key.Name}
}

// problems returns the problems of s.
func (c *conflicts) problems(s *service) []Problem {
	problems := make([]Problem, 0, len(c.all))
	fields := newAddressFields(s.object.expand(new(corev1.Service)))
	for _, conflict := range c.all {
		p := conflict.problem(s, fields)
		if conflict.others > 0 {
			p.Message += fmt.Sprintf(" (%d more address and port pairs conflict in the same way)", conflict.others)
		}
		problems = append(problems, p)
	}
	return problems
}

// problem returns the problem that s does not own the frontend.
func (c *conflict) problem(s *service, fields addressFields) Problem {
	ds, f, owner := c.desired, c.frontend, c.owner
	p := Problem{Service: s.name, UID: s.object.uid, Field: fields.path(ds, f)}
	if owner.service == s {
		p.Message = ownConflictMessage(s, ds, f, owner)
		if owner.kind == dataplane.ClusterIP && ds.key.Kind == dataplane.ClusterIP {
			p.Field = elementPath("spec.ports", ds.port, ".port")
		}
		return p
	}
	subject, field := f.String(), "address or port"
	switch ds.key.Kind {
	case dataplane.ClusterIP:
		field = "cluster IP or port"
	case dataplane.NodePort:
		// The text is the same for both families.
		subject, field = fmt.Sprintf("node port %d/%s", f.Addr.Port(), f.Protocol), "node port"
	case dataplane.ExternalIP, dataplane.LoadBalancer:
		if owner.kind == dataplane.ClusterIP {
			p.Message = fmt.Sprintf(
				"%s is the cluster IP of Service %s, which takes precedence: use another address or port",
				subject, owner.service.name)
			return p
		}
	}
	p.Message = fmt.Sprintf("%s belongs to Service %s: use another %s for one of them", subject, owner.service.name, field)
	return p
}

// ownConflictMessage describes a conflict with another port or address of the same Service.
func ownConflictMessage(s *service, ds *desiredService, f dataplane.Frontend, owner claim) string {
	if owner.port == ds.port {
		return fmt.Sprintf("%s is the Service's own cluster IP: remove it", f)
	}
	name := s.object.portName(owner.port)
	if ds.key.Kind == dataplane.NodePort {
		return fmt.Sprintf("node port %d/%s is already used by port %q of this Service: use another node port", f.Addr.Port(), f.Protocol, name)
	}
	return fmt.Sprintf("%s is already used by port %q of this Service: use another port", f, name)
}

// addressFields maps addresses to their indices in spec.externalIPs and
// status.loadBalancer.ingress.
type addressFields struct{ external, loadBalancer map[netip.Addr]int }

func newAddressFields(svc *corev1.Service) addressFields {
	f := addressFields{external: map[netip.Addr]int{}, loadBalancer: map[netip.Addr]int{}}
	note := func(fields map[netip.Addr]int, text string, i int) {
		if addr, err := parseAddr(text); err == nil {
			if _, ok := fields[addr]; !ok {
				fields[addr] = i
			}
		}
	}
	for i, text := range svc.Spec.ExternalIPs {
		note(f.external, text, i)
	}
	for i := range svc.Status.LoadBalancer.Ingress {
		note(f.loadBalancer, svc.Status.LoadBalancer.Ingress[i].IP, i)
	}
	return f
}

// path returns the path of the field from which ds claims f.
func (a addressFields) path(ds *desiredService, f dataplane.Frontend) string {
	switch ds.key.Kind {
	case dataplane.NodePort:
		return elementPath("spec.ports", ds.port, ".nodePort")
	case dataplane.ExternalIP:
		return elementPath("spec.externalIPs", a.external[f.Addr.Addr()], "")
	case dataplane.LoadBalancer:
		return elementPath("status.loadBalancer.ingress", a.loadBalancer[f.Addr.Addr()], ".ip")
	case dataplane.ClusterIP:
	}
	return "spec.clusterIP"
}
