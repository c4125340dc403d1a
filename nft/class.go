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

// serviceClass encodes how the tables handle the connections to a frontend. It is a packet
// priority (a tc class ID, major:minor). The minor number is the number of endpoints, or of
// slots if these are selected by hash. The major number contains the bits below.
//
// A timeout class represents a session affinity timeout instead. Its minor number and the
// lowest bit of its major number contain the timeout in seconds.
type serviceClass uint32

// The bits of a service class.
const (
	classMasqueradeAlways   serviceClass = 1 << (16 + iota) // dataplane.MasqueradeAlways
	classMasqueradeFromNode                                 // dataplane.MasqueradeFromNode
	classDropNoEndpoints                                    // dataplane.Drop
	classTrafficPolicyLocal                                 // dataplane.ServiceSpec.ExternalTrafficPolicyLocal
	classSourceRanges                                       // the frontend has source ranges
	classSessionAffinity                                    // the frontend has session affinity
	classNodePort                                           // the frontend has the unspecified address
	classLocalEndpoints                                     // for connections to the local list
	classPassThrough                                        // connections keep the frontend's own address
	classSharedList                                         // the frontend refers to a shared list
	classListShard                                          // the lowest of three bits: the shard of the list ID

	classTimeout serviceClass = 1 << 31 // a timeout class; classNodePort is its only other bit

	// The lowest of five bits: the selection of a frontend's class, and of a class in
	// list-sizes.
	classSelection     = classListShard
	classListSelection = classMasqueradeAlways

	classShardMask   serviceClass = (numListShards - 1) * classListShard
	classSizeMask    serviceClass = 1<<16 - 1
	classTimeoutMask serviceClass = 1<<17 - 1
)

// classOf returns the class of the frontends of a Service. If the Service has
// ExternalTrafficPolicyLocal, forExternal is the class for clients that get the local list.
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

// timeoutClassOf returns the timeout class of the frontends of a Service, or 0 without
// session affinity.
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

// forVirtualServer returns the class of connections to a virtual server: the size is 1 if
// there are endpoints.
func (c serviceClass) forVirtualServer() serviceClass {
	return c&^classSizeMask | min(c&classSizeMask, 1)
}

// forSharedList returns the class of frontends that share a list. The map list-sizes
// contains the size of the list, so a size change does not change the class.
func (c serviceClass) forSharedList() serviceClass { return c.forVirtualServer() | classSharedList }

// withSelection returns the class of a frontend whose slots are selected in this way. c has no
// selection.
func (c serviceClass) withSelection(s selection) serviceClass {
	if s == selectByHash && c.size() > 0 {
		c = c&^classSizeMask | hashSlots
	}
	return c | serviceClass(s)*classSelection
}

// selection returns the selection of a frontend's class.
func (c serviceClass) selection() selection { return selection(c / classSelection % maxSelections) } //nolint:gosec // five bits

// listSelection returns the selection of a class in list-sizes.
func (c serviceClass) listSelection() selection {
	return selection(c / classListSelection % maxSelections) //nolint:gosec // five bits
}

// shard returns the list ID's shard from a class in list-sizes.
func (c serviceClass) shard() int { return int(c & classShardMask / classListShard) }

func (c serviceClass) has(bit serviceClass) bool { return c&bit != 0 }

// size returns the number of endpoints, or hashSlots.
func (c serviceClass) size() int { return int(c & classSizeMask) }

// timeout returns the timeout of a timeout class.
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

// String returns the number of endpoints, or the timeout, and the names of the bits, as in
// chain names.
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
	b.WriteString(c.selection().suffix())
	return b.String()
}

// verdictElement is an element of a verdict map: it sends the packets of a class to a
// chain.
type verdictElement struct {
	vmap verdictMap
	serviceClass
}

func (v verdictElement) compare(o verdictElement) int {
	return cmp.Or(cmp.Compare(v.vmap, o.vmap), cmp.Compare(v.serviceClass, o.serviceClass))
}

// verdictMap is one of the maps from classes to chains.
type verdictMap int

const (
	vmapClasses         verdictMap = iota // to the class chain
	vmapLocalClasses                      // the same for clients that get the local list; the kernel allows no loop
	vmapDraws                             // to the chain that selects a slot for a client that no affinity map contains
	vmapAffinities                        // from a timeout class to its chain
	vmapLocalAffinities                   // the same for clients that get the local list
	vmapMasquerades                       // to the chain that decides which clients to masquerade
	vmapListDraws                         // to the chain that selects an endpoint of a shared list
	numVerdictMaps
)

func (m verdictMap) String() string {
	return [...]string{"classes", "local-classes", "draws", "affinities", "local-affinities", "masquerades", "list-draws"}[m]
}

// chainName returns the name of the chain that the element refers to.
func (v verdictElement) chainName() string {
	switch v.vmap {
	case vmapClasses, vmapLocalClasses:
		return "class-" + v.String()
	case vmapDraws:
		return "draw-" + v.String()
	case vmapListDraws:
		size := v.serviceClass & (classSharedList | classLocalEndpoints | classSizeMask)
		return fmt.Sprintf("list-%s%s-%x", size, v.selection().suffix(), v.shard())
	case vmapAffinities:
		return "affinity-" + v.String()
	case vmapLocalAffinities:
		return "affinity-" + v.String() + "-local"
	default:
		return masqueradeChainName(v.masquerade(), v.has(classSharedList))
	}
}

// selection returns the selection of the element's class.
func (v verdictElement) selection() selection {
	if v.vmap == vmapListDraws {
		return v.listSelection()
	}
	return v.serviceClass.selection()
}

// hasOwnChain reports whether only this element refers to its chain. Such a chain is
// created and deleted with the element.
func (v verdictElement) hasOwnChain() bool { return v.vmap != vmapMasquerades }

// verdict returns the value of the element.
func (v verdictElement) verdict() *expr.Verdict {
	kind := expr.VerdictGoto
	if v.vmap == vmapDraws {
		kind = expr.VerdictJump
	}
	return &expr.Verdict{Kind: kind, Chain: v.chainName()}
}

// verdictElementChain returns the chain of an element that has its own chain. The chain
// refers to no map whose elements belong to Services; see table.translateChains.
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
		rules = []rule{{exprs: append(t.selectSlot(b.selection(), b.size(), b.endpointList(), 0), setPriority(reg(0)))}}
	case vmapAffinities:
		rules = t.affinityRules(b.serviceClass, clusterEndpoints)
	case vmapLocalAffinities:
		rules = t.affinityRules(b.serviceClass, localEndpoints)
	case vmapListDraws:
		rules = t.listClassRules(b.serviceClass)
	case vmapMasquerades, numVerdictMaps: // shared chains
	}
	return chain{Chain: &nftables.Chain{Name: b.chainName(), Table: t.nf}, rules: rules}
}

// classRules returns the rules of a class chain.
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
		rule{exprs: append(t.selectSlot(c.selection(), c.size(), l, 0), setPriority(reg(0)), jumpChain(by.chainName("translate")))},
		rule{
			comment: "the slot went while the packet was on its way",
			exprs:   []expr.Any{firstSlot(l, reg(0)), setPriority(reg(0)), jumpChain(by.chainName("translate"))},
		},
		rule{comment: "and so did the last one: the client will try again", exprs: []expr.Any{drop()}},
	)
}
