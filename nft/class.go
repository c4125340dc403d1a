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

// class names how the connections to a frontend are treated. The kernel sees it
// as a packet priority (a tc class ID, major:minor): the minor is the number of
// endpoints, the major holds the bits below.
//
// An affinity class names a session affinity instead: its minor, with the
// lowest bit of its major, is the timeout in seconds.
type class uint32

// The bits of a class.
const (
	alwaysMasquerade class = 1 << (16 + iota) // dataplane.MasqueradeAlways
	nodeMasquerade                            // dataplane.MasqueradeNode
	dropping                                  // dataplane.Drop
	external                                  // dataplane.Treatment.ExternalLocal
	ranged                                    // there are source ranges
	sticky                                    // there is session affinity
	nodePort                                  // the frontend has the unspecified address
	local                                     // of the list of local endpoints
	through                                   // the frontend's own address is a virtual server
	shared                                    // what depends on endpoints is found by a list ID
	listShard                                 // the lowest of three bits: the shard of the list ID

	affinity class = 1 << 31 // an affinity class; of the bits it can have nodePort

	shardMask   class = (listShards - 1) * listShard
	sizeMask    class = 1<<16 - 1
	timeoutMask class = 1<<17 - 1
)

// classOf returns the class of the frontends of a Service, and, if it is
// ExternalLocal, the one for clients that get the local endpoints.
func classOf(s *dataplane.Service) (c, forExternal class) {
	switch s.Masquerade {
	case dataplane.MasqueradeAlways:
		c |= alwaysMasquerade
	case dataplane.MasqueradeNode:
		c |= nodeMasquerade
	case dataplane.MasqueradeForeign:
	}
	for _, bit := range []struct {
		class
		set bool
	}{
		{dropping, s.NoEndpoints == dataplane.Drop},
		{external, s.ExternalLocal},
		{ranged, len(s.SourceRanges) > 0},
		{sticky, s.Affinity != 0},
		{nodePort, s.Key.Kind == dataplane.NodePort},
	} {
		if bit.set {
			c |= bit.class
		}
	}
	if s.ExternalLocal {
		forExternal = c | local | class(len(s.LocalEndpoints)) //nolint:gosec // MaxEndpoints fits
	}
	return c | class(len(s.Endpoints)), forExternal //nolint:gosec // MaxEndpoints fits
}

// affinityOf returns the affinity class of the frontends of a Service, or 0.
func affinityOf(s *dataplane.Service) class {
	if s.Affinity == 0 {
		return 0
	}
	c := affinity | class(s.Affinity/time.Second) //nolint:gosec // MaxAffinity fits
	if s.Key.Kind == dataplane.NodePort {
		c |= nodePort
	}
	return c
}

// virtual returns the class of connections that go to a virtual server if there
// are any endpoints.
func (c class) virtual() class { return c&^sizeMask | min(c&sizeMask, 1) }

// shared returns the class of frontends that share a list of endpoints. The size
// of the list is in list-sizes, so that it changes there alone.
func (c class) shared() class { return c.virtual() | shared }

// shard returns the shard of the list ID that a class in list-sizes is for.
func (c class) shard() int { return int(c & shardMask / listShard) }

func (c class) has(bit class) bool { return c&bit != 0 }

// size is the number of endpoints.
func (c class) size() int { return int(c & sizeMask) }

// timeout is that of an affinity class.
func (c class) timeout() time.Duration { return time.Duration(c&timeoutMask) * time.Second }

func (c class) masquerade() dataplane.Masquerade {
	switch {
	case c.has(alwaysMasquerade):
		return dataplane.MasqueradeAlways
	case c.has(nodeMasquerade):
		return dataplane.MasqueradeNode
	default:
		return dataplane.MasqueradeForeign
	}
}

func (c class) noEndpoints() dataplane.Verdict {
	if c.has(dropping) {
		return dataplane.Drop
	}
	return dataplane.Reject
}

func (c class) list() list {
	if c.has(local) {
		return localList
	}
	return clusterList
}

func (c class) addressing() addressing {
	if c.has(nodePort) {
		return byNodePort
	}
	return byAddress
}

// String returns the number of endpoints, or the timeout, and the names of the
// bits, as they are in the names of chains.
func (c class) String() string {
	var b strings.Builder
	names := []struct {
		class

		name string
	}{
		{alwaysMasquerade, "always"},
		{nodeMasquerade, "node"},
		{dropping, "drop"},
		{external, "external"},
		{ranged, "ranged"},
		{sticky, "sticky"},
		{nodePort, nodePortSuffix},
		{local, "local"},
		{through, "through"},
		{shared, "shared"},
	}
	if c.has(affinity) {
		fmt.Fprintf(&b, "%ds", c&timeoutMask)
		c &= nodePort
	} else {
		fmt.Fprintf(&b, "%d", c.size())
	}
	for _, bit := range names {
		if c.has(bit.class) {
			b.WriteByte('-')
			b.WriteString(bit.name)
		}
	}
	return b.String()
}

// branch is an element of one of the verdict maps: what is done with a class.
type branch struct {
	in verdictMap
	class
}

func (b branch) compare(o branch) int {
	return cmp.Or(cmp.Compare(b.in, o.in), cmp.Compare(b.class, o.class))
}

// verdictMap is one of the maps from classes to chains.
type verdictMap int

const (
	classes         verdictMap = iota // what happens to a connection
	localClasses                      // the same for clients that get local endpoints; the kernel allows no loop
	draws                             // how a slot is drawn for a client without affinity
	affinities                        // the affinity of a timeout
	localAffinities                   // the same for clients that get local endpoints
	masquerades                       // which clients are masqueraded
	listDraws                         // how an endpoint of a list with an ID is drawn
	verdictMaps
)

func (m verdictMap) String() string {
	return [...]string{"classes", "local-classes", "draws", "affinities", "local-affinities", "masquerades", "list-draws"}[m]
}

// chainName is where `nft list` shows the rules.
func (b branch) chainName() string {
	switch b.in {
	case classes, localClasses:
		return "class-" + b.String()
	case draws:
		return "draw-" + b.String()
	case listDraws:
		return fmt.Sprintf("list-%s-%x", b.String(), b.shard())
	case affinities:
		return "affinity-" + b.String()
	case localAffinities:
		return "affinity-" + b.String() + "-local"
	default:
		return masqueradeChain(b.masquerade(), b.has(shared))
	}
}

// own reports whether the branch's chain is its alone, and comes and goes with it.
func (b branch) own() bool { return b.in != masquerades }

// verdict is what the branch's element says.
func (b branch) verdict() *expr.Verdict {
	kind := expr.VerdictGoto
	if b.in == draws {
		kind = expr.VerdictJump
	}
	return &expr.Verdict{Kind: kind, Chain: b.chainName()}
}

// branchChain returns the chain of a branch that has one of its own. It refers
// to no map with elements of Services, see table.translate.
//
//	chain draw-2-node-drop-external-ranged-sticky {
//		meta priority set numgen random mod 2 offset 4196204544
//	}
func (t *table) branchChain(b branch) chain {
	var rules []rule
	switch b.in {
	case classes, localClasses:
		rules = t.classRules(b.class)
	case draws:
		rules = []rule{{exprs: []expr.Any{randomSlot(b.size(), b.list(), reg(0)), setPriority(reg(0))}}}
	case affinities:
		rules = t.affinityRules(b.class, clusterList)
	case localAffinities:
		rules = t.affinityRules(b.class, localList)
	case listDraws:
		rules = t.listRules(b.class)
	case masquerades, verdictMaps: // has none of its own
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
func (t *table) classRules(c class) []rule {
	by, l := c.addressing(), c.list()
	var rules []rule
	switch {
	case l == localList || !c.has(ranged):
	case c.has(shared):
		rules = append(rules, rule{exprs: []expr.Any{jumpTo("source-ranges-shared")}})
	default:
		rules = append(rules, rule{exprs: []expr.Any{jumpTo(by.chainName("source-ranges"))}})
	}
	if l == clusterList && c.has(external) {
		rules = append(rules, rule{exprs: []expr.Any{jumpTo(by.chainName("external"))}})
	}
	switch {
	case c.size() == 0 && l == localList && c.has(dropping):
		return append(rules, rule{exprs: []expr.Any{count(droppedNoLocalEndpoint), drop()}})
	case c.size() == 0 && c.has(dropping):
		return append(rules, rule{exprs: []expr.Any{count(droppedNoEndpoints), drop()}})
	case c.size() == 0:
		return append(rules, rule{exprs: []expr.Any{count(rejectedNoEndpoints), gotoChain("reject")}})
	case c.has(through):
		return append(rules, rule{exprs: append(resetPriority(), t.stayHere()...)})
	case c.has(shared):
		return append(rules, rule{exprs: []expr.Any{gotoChain(l.chainName("shared"))}})
	case c.has(sticky):
		return append(rules, rule{exprs: []expr.Any{gotoChain(by.chainName(l.chainName("sticky")))}})
	}
	return append(rules,
		rule{exprs: []expr.Any{
			randomSlot(c.size(), l, reg(0)), setPriority(reg(0)), jumpTo(by.chainName("translate")),
		}},
		rule{
			comment: "the slot went while the packet was on its way",
			exprs:   []expr.Any{firstSlot(l, reg(0)), setPriority(reg(0)), jumpTo(by.chainName("translate"))},
		},
		rule{comment: "and so did the last one: the client will try again", exprs: []expr.Any{drop()}},
	)
}
