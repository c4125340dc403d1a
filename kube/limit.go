package kube

import (
	"fairlead.io/fairlead/dataplane"
)

// maxElements is the maximum number of frontends, endpoints and source ranges that are programmed
// for one Service, counted separately for every port, family and kind of frontend. It is far
// above what Services use, for example 1,000 endpoints behind 80 ports, or 100 ports on 200
// external IPs with 100 endpoints six times over. Without a limit, one object of 27 kB could
// request millions of elements and starve all other Services of the node.
const maxElements = 1 << 18

// limit decides which frontends of a Service with more than maxElements are programmed: the frontends of
// its first ports, and cluster IPs and node ports before the others.
type limit struct {
	policy policy
	ranges sourceRanges
	// external and loadBalancer are the numbers of addresses by family.
	external, loadBalancer [dataplane.IPv6 + 1]int
	// excluded contains the ports and kinds that exceed the limit. It is nil if none does.
	excluded map[portKind]bool
}

type portKind struct {
	port int
	kind dataplane.Kind
}

func (c *conversion) limit(ports []portFamily, addrs addresses, policy policy, ranges sourceRanges) *limit {
	l := &limit{policy: policy, ranges: ranges}
	for _, addr := range addrs.externalIPs.list {
		l.external[dataplane.FamilyOf(addr)]++
	}
	for _, addr := range addrs.loadBalancerIPs.list {
		l.loadBalancer[dataplane.FamilyOf(addr)]++
	}
	total, beyond := 0, 0
	for i := range ports {
		if ports[i].beyondLimit {
			beyond++
		}
		for _, kind := range kinds() {
			total += l.countElements(c, &ports[i], kind)
		}
	}
	if total <= maxElements && beyond == 0 {
		return l
	}
	l.excluded = map[portKind]bool{}
	left, frontends := maxElements, 0
	for _, first := range []bool{true, false} {
		for i := range ports {
			for _, kind := range kinds() {
				if (kind == dataplane.ClusterIP || kind == dataplane.NodePort) != first {
					continue
				}
				if n := l.countElements(c, &ports[i], kind); n <= left && !ports[i].beyondLimit {
					left -= n
					continue
				}
				l.excluded[portKind{i, kind}] = true
				frontends += l.countFrontends(c, &ports[i], kind)
			}
		}
	}
	c.addProblem("spec.ports", "%d ports, %d external addresses and their endpoints exceed the limit of %d rules per Service, "+
		"so %d address and port pairs are not served: split it into several Services",
		len(c.service.Spec.Ports), len(addrs.externalIPs.list)+len(addrs.loadBalancerIPs.list), maxElements, frontends)
	return l
}

// allows reports whether the i-th port's frontends of a kind are programmed.
func (l *limit) allows(i int, kind dataplane.Kind) bool { return !l.excluded[portKind{i, kind}] }

// countFrontends returns the number of frontends of a kind that a port requests.
func (l *limit) countFrontends(c *conversion, p *portFamily, kind dataplane.Kind) int {
	switch {
	case kind == dataplane.ClusterIP:
		return 1
	case kind == dataplane.NodePort && p.port.NodePort > 0 && hasNodePorts(c.service.Spec.Type):
		return 1
	case kind == dataplane.ExternalIP:
		return l.external[p.family]
	case kind == dataplane.LoadBalancer:
		return l.loadBalancer[p.family]
	default:
		return 0
	}
}

// countElements returns the number of elements for the frontends of one kind of a port. With
// session affinity each frontend has its own elements for every endpoint. With a source hash, a list
// has at least [dataplane.SourceHashSlots] elements.
func (l *limit) countElements(c *conversion, p *portFamily, kind dataplane.Kind) int {
	frontends := l.countFrontends(c, p, kind)
	if frontends == 0 {
		return 0
	}
	t := l.policy.spec(kind, p.chosen)
	endpoints := 0
	for _, list := range [][]dataplane.Endpoint{t.Endpoints, t.LocalEndpoints} {
		n := len(list)
		if n > 0 && t.Scheduler == dataplane.SourceHash {
			n = max(n, dataplane.SourceHashSlots)
		}
		endpoints += n
	}
	if t.Affinity != 0 {
		endpoints *= 2 * frontends
	}
	if kind == dataplane.LoadBalancer {
		endpoints += len(l.ranges.forFamily(p.family))
	}
	return frontends + endpoints
}
