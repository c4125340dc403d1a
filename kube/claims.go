package kube

import (
	"cmp"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// claim is a Service port's claim to a frontend.
type claim struct {
	service *service
	// port is the port's index in spec.ports.
	port int
	kind dataplane.Kind
}

// compare orders claims by precedence, the owner first.
//
// A cluster IP takes precedence over all other kinds, because the cluster allocates it, while
// any user with write access to a Service can list an address in its externalIPs
// (CVE-2020-8554).
func (c claim) compare(o claim) int {
	if r := falseFirst(c.kind != dataplane.ClusterIP, o.kind != dataplane.ClusterIP); r != 0 {
		return r
	}
	return cmp.Or(
		cmp.Compare(c.service.createdUnix, o.service.createdUnix),
		compareNames(c.service.name, o.service.name),
		cmp.Compare(c.port, o.port),
		cmp.Compare(c.kind, o.kind),
	)
}

func falseFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

// claims contains all claims by frontend.
type claims struct {
	owners map[dataplane.Frontend]claim
	// waiting contains all claims except the owner's, in order of precedence. Almost all frontends
	// have none.
	waiting map[dataplane.Frontend][]claim
	// ownersBefore contains the owner at the time of the last drainChanged of each frontend
	// whose claims have changed since then. It is the zero claim for a frontend without an
	// owner.
	ownersBefore map[dataplane.Frontend]claim
}

func newClaims() claims {
	return claims{owners: map[dataplane.Frontend]claim{}, waiting: map[dataplane.Frontend][]claim{}}
}

func (c *claims) add(f dataplane.Frontend, added claim) {
	c.recordOwner(f)
	owner, owned := c.owners[f]
	switch {
	case !owned:
		c.owners[f] = added
		return
	case added.compare(owner) < 0:
		c.owners[f] = added
		added = owner
	}
	waiting := c.waiting[f]
	i, _ := slices.BinarySearchFunc(waiting, added, claim.compare)
	c.waiting[f] = slices.Insert(waiting, i, added)
}

func (c *claims) remove(f dataplane.Frontend, old claim) {
	c.recordOwner(f)
	waiting := c.waiting[f]
	if c.owners[f] != old {
		if i, ok := slices.BinarySearchFunc(waiting, old, claim.compare); ok {
			c.setWaiting(f, slices.Delete(waiting, i, i+1))
		}
		return
	}
	if len(waiting) == 0 {
		delete(c.owners, f)
		return
	}
	c.owners[f] = waiting[0]
	c.setWaiting(f, slices.Delete(waiting, 0, 1))
}

func (c *claims) setWaiting(f dataplane.Frontend, waiting []claim) {
	if len(waiting) == 0 {
		delete(c.waiting, f)
		return
	}
	c.waiting[f] = waiting
}

func (c *claims) recordOwner(f dataplane.Frontend) {
	if c.ownersBefore == nil {
		c.ownersBefore = map[dataplane.Frontend]claim{}
	}
	if _, ok := c.ownersBefore[f]; !ok {
		c.ownersBefore[f] = c.owners[f]
	}
}

// drainChanged yields every Service that claims a frontend whose owner has changed since the last
// call.
func (c *claims) drainChanged(yield func(*service)) {
	for f, before := range c.ownersBefore {
		owner, ok := c.owners[f]
		if !ok || owner == before {
			continue
		}
		yield(owner.service)
		for _, w := range c.waiting[f] {
			yield(w.service)
		}
	}
	c.ownersBefore = nil
}
