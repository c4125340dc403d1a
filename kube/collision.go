package kube

import (
	"fmt"
	"slices"

	"fairlead/dataplane"
)

// collision says that s, as far as it is w, goes without the frontend f, which
// is owner's.
func collision(s *service, w *wanted, f dataplane.Frontend, owner claim) Problem {
	p := Problem{Service: s.name, UID: s.object.UID, Field: claimField(s, w, f)}
	if owner.service == s {
		p.Message = ownCollision(s, w, f, owner)
		if owner.kind == dataplane.ClusterIP && w.key.Kind == dataplane.ClusterIP {
			p.Field = index("spec.ports", w.port, ".port")
		}
		return p
	}
	what, other := f.String(), "address or port"
	switch w.key.Kind {
	case dataplane.ClusterIP:
		other = "cluster IP or port"
	case dataplane.NodePort:
		// The same for both families.
		what, other = fmt.Sprintf("node port %d/%s", f.Addr.Port(), f.Protocol), "node port"
	case dataplane.ExternalIP, dataplane.LoadBalancer:
		if owner.kind == dataplane.ClusterIP {
			p.Message = fmt.Sprintf(
				"%s is the cluster IP of Service %s, which goes before all other addresses, so connections go there: use another address or port",
				what, owner.service.name)
			return p
		}
	}
	p.Message = fmt.Sprintf("%s belongs to Service %s, so connections go there: give one of them another %s", what, owner.service.name, other)
	return p
}

// ownCollision says which other port, or address, of the Service has f.
func ownCollision(s *service, w *wanted, f dataplane.Frontend, owner claim) string {
	if owner.port == w.port {
		return fmt.Sprintf("%s is the Service's own cluster IP: remove it here", f)
	}
	name := s.object.Spec.Ports[owner.port].Name
	if w.key.Kind == dataplane.NodePort {
		return fmt.Sprintf("node port %d/%s is already that of port %q of this Service: use another node port", f.Addr.Port(), f.Protocol, name)
	}
	return fmt.Sprintf("%s is already port %q of this Service: use another port", f, name)
}

// claimField returns the field that the claim of w for f comes from.
func claimField(s *service, w *wanted, f dataplane.Frontend) string {
	is := func(text string) bool {
		addr, err := parseAddr(text)
		return err == nil && addr == f.Addr.Addr()
	}
	switch w.key.Kind {
	case dataplane.NodePort:
		return index("spec.ports", w.port, ".nodePort")
	case dataplane.ExternalIP:
		return index("spec.externalIPs", slices.IndexFunc(s.object.Spec.ExternalIPs, is), "")
	case dataplane.LoadBalancer:
		ingress := s.object.Status.LoadBalancer.Ingress
		for i := range ingress {
			if is(ingress[i].IP) {
				return index("status.loadBalancer.ingress", i, ".ip")
			}
		}
	case dataplane.ClusterIP:
	}
	return "spec.clusterIP"
}
