package nft

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// serviceClass names how the connections to a frontend are treated. The kernel sees it
// as a packet priority (a tc class ID, major:minor): the minor is the number of
// endpoints, the major holds the bits below.
//
// An affinity class names a session affinity instead: its minor, with the
// lowest bit of its major, is the timeout in seconds.
type serviceClass uint32

// The bits of a class.
const (
	classMasqueradeAlways   serviceClass = 1 << (16 + iota) // dataplane.MasqueradeAlways
	classMasqueradeFromNode                                 // dataplane.MasqueradeFromNode
	classDropNoEndpoints                                    // dataplane.Drop
	classTrafficPolicyLocal                                 // dataplane.ServiceSpec.ExternalTrafficPolicyLocal
	classSourceRanges                                       // there are source ranges
	classSessionAffinity                                    // there is session affinity
	classNodePort                                           // the frontend has the unspecified address
	classLocalEndpoints                                     // of the list of local endpoints
	classPassThrough                                        // the frontend's own address is a virtual server
	classSharedList                                         // what depends on endpoints is found by a list ID
	classListShard                                          // the lowest of three bits: the shard of the list ID

	classTimeout serviceClass = 1 << 31 // an affinity class; of the bits it can have classNodePort

	classShardMask   serviceClass = (numListShards - 1) * classListShard
	classSizeMask    serviceClass = 1<<16 - 1
	classTimeoutMask serviceClass = 1<<17 - 1
)

// classOf returns the class of the frontends of a Service, and, if it is
// ExternalLocal, the one for clients that get the local endpoints.
func classOf(s *dataplane.Service) (c, forExternal serviceClass) {
	switch s.Masquerade {
	case dataplane.MasqueradeAlways:
		c |= classMasqueradeAlways
	case dataplane.MasqueradeFromNode:
		c |= classMasqueradeFromNode
	case dataplane.MasqueradeOffCluster:
	}
	for _, bit := range []struct {
		serviceClass
		set bool
	}{
		{classDropNoEndpoints, s.NoEndpointsVerdict == dataplane.Drop},
		{classTrafficPolicyLocal, s.ExternalTrafficPolicyLocal},
		{classSourceRanges, len(s.SourceRanges) > 0},
		{classSessionAffinity, s.Affinity != 0},
		{classNodePort, s.Key.Kind == dataplane.NodePort},
	} {
		if bit.set {
			c |= bit.serviceClass
		}
	}
	if s.ExternalTrafficPolicyLocal {
		forExternal = c | classLocalEndpoints | serviceClass(len(s.LocalEndpoints)) //nolint:gosec // MaxEndpoints fits
	}
	return c | serviceClass(len(s.Endpoints)), forExternal //nolint:gosec // MaxEndpoints fits
}

// timeoutClassOf returns the affinity class of the frontends of a Service, or 0.
func timeoutClassOf(s *dataplane.Service) serviceClass {
	if s.Affinity == 0 {
		return 0
	}
	c := classTimeout | serviceClass(s.Affinity/time.Second) //nolint:gosec // MaxAffinity fits
	if s.Key.Kind == dataplane.NodePort {
		c |= classNodePort
	}
	return c
}

// forVirtualServer returns the class of connections that go to a virtual server if there
// are any endpoints.
func (c serviceClass) forVirtualServer() serviceClass {
	return c&^classSizeMask | min(c&classSizeMask, 1)
}

// forSharedList returns the class of frontends that share a list of endpoints. The size
// of the list is in list-sizes, so that it changes there alone.
func (c serviceClass) forSharedList() serviceClass { return c.forVirtualServer() | classSharedList }

// shard returns the shard of the list ID that a class in list-sizes is for.
func (c serviceClass) shard() int { return int(c & classShardMask / classListShard) }

func (c serviceClass) has(bit serviceClass) bool { return c&bit != 0 }

// size is the number of endpoints.
func (c serviceClass) size() int { return int(c & classSizeMask) }

// timeout is that of an affinity class.
func (c serviceClass) timeout() time.Duration { return time.Duration(c&classTimeoutMask) * time.Second }

func (c serviceClass) masquerade() dataplane.Masquerade {
	switch {
	case c.has(classMasqueradeAlways):
		return dataplane.MasqueradeAlways
	case c.has(classMasqueradeFromNode):
		return dataplane.MasqueradeFromNode
	default:
		return dataplane.MasqueradeOffCluster
	}
}

func (c serviceClass) noEndpointsVerdict() dataplane.Verdict {
	if c.has(classDropNoEndpoints) {
		return dataplane.Drop
	}
	return dataplane.Reject
}

func (c serviceClass) endpointList() endpointList {
	if c.has(classLocalEndpoints) {
		return localEndpoints
	}
	return clusterEndpoints
}

func (c serviceClass) addressing() addressing {
	if c.has(classNodePort) {
		return byNodePort
	}
	return byAddress
}

// String returns the number of endpoints, or the timeout, and the names of the
// bits, as they are in the names of chains.
func (c serviceClass) String() string {
	var b strings.Builder
	names := []struct {
		serviceClass

		name string
	}{
		{classMasqueradeAlways, "always"},
		{classMasqueradeFromNode, "node"},
		{classDropNoEndpoints, "drop"},
		{classTrafficPolicyLocal, "external"},
		{classSourceRanges, "ranged"},
		{classSessionAffinity, "sticky"},
		{classNodePort, nodePortSuffix},
		{classLocalEndpoints, "local"},
		{classPassThrough, "through"},
		{classSharedList, "shared"},
	}
	if c.has(classTimeout) {
		fmt.Fprintf(&b, "%ds", c&classTimeoutMask)
		c &= classNodePort
	} else {
		fmt.Fprintf(&b, "%d", c.size())
	}
	for _, bit := range names {
		if c.has(bit.serviceClass) {
			b.WriteByte('-')
			b.WriteString(bit.name)
		}
	}
	return b.String()
}

// verdictElement is an element of one of the verdict maps: what is done with a class.
type verdictElement struct {
	vmap verdictMap
	serviceClass
}

func (b verdictElement) compare(o verdictElement) int {
	return cmp.Or(cmp.Compare(b.vmap, o.vmap), cmp.Compare(b.serviceClass, o.serviceClass))
}

// verdictMap is one of the maps from classes to chains.
type verdictMap int

const (
	vmapClasses         verdictMap = iota // what happens to a connection
	vmapLocalClasses                      // the same for clients that get local endpoints; the kernel allows no loop
	vmapDraws                             // how a slot is drawn for a client without affinity
	vmapAffinities                        // the affinity of a timeout
	vmapLocalAffinities                   // the same for clients that get local endpoints
	vmapMasquerades                       // which clients are masqueraded
	vmapListDraws                         // how an endpoint of a list with an ID is drawn
	numVerdictMaps
)

func (m verdictMap) String() string {
	return [...]string{"classes", "local-classes", "draws", "affinities", "local-affinities", "masquerades", "list-draws"}[m]
}

// chainName is where `nft list` shows the rules.
func (b verdictElement) chainName() string {
	switch b.vmap {
	case vmapClasses, vmapLocalClasses:
		return "class-" + b.String()
	case vmapDraws:
		return "draw-" + b.String()
	case vmapListDraws:
		return fmt.Sprintf("list-%s-%x", b.String(), b.shard())
	case vmapAffinities:
		return "affinity-" + b.String()
	case vmapLocalAffinities:
		return "affinity-" + b.String() + "-local"
	default:
		return masqueradeChainName(b.masquerade(), b.has(classSharedList))
	}
}

// hasOwnChain reports whether the branch's chain is its alone, and comes and goes with it.
func (b verdictElement) hasOwnChain() bool { return b.vmap != vmapMasquerades }

// verdict is what the branch's element says.
func (b verdictElement) verdict() *expr.Verdict {
	kind := expr.VerdictGoto
	if b.vmap == vmapDraws {
		kind = expr.VerdictJump
	}
	return &expr.Verdict{Kind: kind, Chain: b.chainName()}
}

// verdictElementChain returns the chain of a branch that has one of its own. It refers
// to no map with elements of Services, see table.translateChain.
//
//	chain draw-2-node-drop-external-ranged-sticky {
//		meta priority set numgen random mod 2 offset 4196204544
//	}
func (t *table) verdictElementChain(b verdictElement) chain {
	var rules []rule
	switch b.vmap {
	case vmapClasses, vmapLocalClasses:
		rules = t.classRules(b.serviceClass)
	case vmapDraws:
		rules = []rule{{exprs: []expr.Any{randomSlot(b.size(), b.endpointList(), reg(0)), setPriority(reg(0))}}}
	case vmapAffinities:
		rules = t.affinityRules(b.serviceClass, clusterEndpoints)
	case vmapLocalAffinities:
		rules = t.affinityRules(b.serviceClass, localEndpoints)
	case vmapListDraws:
		rules = t.listClassRules(b.serviceClass)
	case vmapMasquerades, numVerdictMaps: // has none of its own
	}
	return chain{Chain: &nftables.Chain{Name: b.chainName(), Table: t.nf}, rules: rules}
}

// classRules returns the rules of a class.
//
//	chain class-0 {
//		counter name "rejected-no-endpoints" goto reject
//	}
//	chain class-1 {
//		meta priority set numgen random mod 1 offset 4196204544 jump translate
//		meta priority set numgen random mod 1 offset 4196204544 jump translate comment "the slot went while the packet was on its way"
//		drop comment "and so did the last one: the client will try again"
//	}
//	chain class-2-node-drop-external-ranged-sticky {
//		jump source-ranges
//		jump external
//		goto sticky
//	}
//	chain class-1-node-drop-external-ranged-shared {
//		jump source-ranges-shared
//		jump external
//		goto shared
//	}
//	chain class-1-through {
//		meta priority set none dnat to ip daddr
//	}
func (t *table) classRules(c serviceClass) []rule {
	by, l := c.addressing(), c.endpointList()
	var rules []rule
	switch {
	case l == localEndpoints || !c.has(classSourceRanges):
	case c.has(classSharedList):
		rules = append(rules, rule{exprs: []expr.Any{jumpChain("source-ranges-shared")}})
	default:
		rules = append(rules, rule{exprs: []expr.Any{jumpChain(by.chainName("source-ranges"))}})
	}
	if l == clusterEndpoints && c.has(classTrafficPolicyLocal) {
		rules = append(rules, rule{exprs: []expr.Any{jumpChain(by.chainName("external"))}})
	}
	switch {
	case c.size() == 0 && l == localEndpoints && c.has(classDropNoEndpoints):
		return append(rules, rule{exprs: []expr.Any{counterRef(droppedNoLocalEndpoints), drop()}})
	case c.size() == 0 && c.has(classDropNoEndpoints):
		return append(rules, rule{exprs: []expr.Any{counterRef(droppedNoEndpoints), drop()}})
	case c.size() == 0:
		return append(rules, rule{exprs: []expr.Any{counterRef(rejectedNoEndpoints), gotoChain("reject")}})
	case c.has(classPassThrough):
		return append(rules, rule{exprs: append(resetPriority(), t.dnatToOriginal()...)})
	case c.has(classSharedList):
		return append(rules, rule{exprs: []expr.Any{gotoChain(l.chainName("shared"))}})
	case c.has(classSessionAffinity):
		return append(rules, rule{exprs: []expr.Any{gotoChain(by.chainName(l.chainName("sticky")))}})
	}
	return append(rules,
		rule{exprs: []expr.Any{
			randomSlot(c.size(), l, reg(0)), setPriority(reg(0)), jumpChain(by.chainName("translate")),
		}},
		rule{
			comment: "the slot went while the packet was on its way",
			exprs:   []expr.Any{firstSlot(l, reg(0)), setPriority(reg(0)), jumpChain(by.chainName("translate"))},
		},
		rule{comment: "and so did the last one: the client will try again", exprs: []expr.Any{drop()}},
	)
}
