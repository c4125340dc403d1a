package nft

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// packetCost is the work of the rules for the first packet of a connection.
type packetCost struct{ chains, expressions, lookups int }

// countingRuleset counts the chains that a packet enters, and its lookups in sets.
type countingRuleset struct {
	packetRules
	cost packetCost
}

func (r *countingRuleset) rules(chain string) ([]rule, error) {
	r.cost.chains++
	return r.packetRules.rules(chain)
}

func (r *countingRuleset) find(set string, key []byte) (element, bool, error) {
	r.cost.lookups++
	return r.packetRules.find(set, key)
}

// noLocalAddrs is a Host without addresses and virtual servers.
type noLocalAddrs struct{}

func (noLocalAddrs) IsLocal(netip.Addr) (bool, error) { return false, nil }

func (noLocalAddrs) Destinations(dataplane.Protocol, netip.AddrPort, netip.Addr) (Balance, bool, error) {
	return Balance{}, false, nil
}

// usualNode returns a node with the settings that most nodes have.
func usualNode() dataplane.Node {
	node := nodeWithAllSettings()
	node.AheadOfOthers, node.PingServiceIPs, node.ProtectLoopback = false, false, false
	node.NodePortNetworks, node.LocalPodCIDRs = nil, nil
	return node
}

// TestFirstPacketCost limits what the rules evaluate for the first packet of a connection. Every
// connection of the node pays the first two rows. A larger number needs a measurement; see
// docs/design/0020-first-packet.md.
func TestFirstPacketCost(t *testing.T) {
	t.Parallel()
	const lastShard = 15 // the endpoints map that a packet reaches last
	services := []*dataplane.Service{service(t, "s", []dataplane.Frontend{frontend(lastShard)}, endpoints(1, 2, 3))}
	pod := netip.MustParseAddrPort("10.1.0.9:50000")
	for name, test := range map[string]struct {
		from, to netip.AddrPort
		in       string
		want     packetCost
		verdict  WalkVerdict
	}{
		"forwarded, not to a Service": {
			pod, netip.MustParseAddrPort("203.0.113.9:443"), "eth0",
			packetCost{chains: 4, expressions: 20, lookups: 3},
			Unchanged,
		},
		"of the node, not to a Service": {
			netip.MustParseAddrPort("192.0.2.1:50000"), netip.MustParseAddrPort("203.0.113.9:443"), "",
			packetCost{chains: 4, expressions: 22, lookups: 3},
			Unchanged,
		},
		"from a pod to a Service": {
			pod, frontend(lastShard).Addr, "eth0",
			packetCost{chains: 9, expressions: 75, lookups: 7},
			Translated,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			table := Options{}.newTables(TableName)[0]
			r := &countingRuleset{packetRules: renderRuleset(table, usualNode(), services)}
			base, err := r.baseChains()
			if err != nil {
				t.Fatal(err)
			}
			b := &branch{
				table: table, ruleset: r, host: noLocalAddrs{}, base: base, walk: &Walk{}, overlay: map[string]map[string]*element{},
				packet: Packet{Protocol: dataplane.TCP, Source: test.from, Destination: test.to, InInterface: test.in},
			}
			if err := b.run(); err != nil {
				t.Fatal(err)
			}
			if b.outcome.Verdict != test.verdict {
				t.Fatalf("the connection is %s, want %s", b.outcome.Verdict, test.verdict)
			}
			r.cost.expressions = b.evaluated
			if r.cost != test.want {
				t.Errorf("the packet passes %+v, want %+v", r.cost, test.want)
			}
		})
	}
}

// TestEstablishedPacketCost checks that a filter chain of a usual node evaluates three expressions
// for a packet of an established connection. NAT chains do not see these packets.
func TestEstablishedPacketCost(t *testing.T) {
	t.Parallel()
	for _, table := range (Options{}).newTables(TableName) {
		hooks := map[nftables.ChainHook]int{}
		for _, c := range table.chains(usualNode(), nil) {
			if c.Hooknum == nil || c.Type != nftables.ChainTypeFilter {
				continue
			}
			hooks[*c.Hooknum]++
			if len(c.rules) != 1 {
				t.Errorf("chain %s has %d rules, want 1", c.Name, len(c.rules))
				continue
			}
			state, isState := c.rules[0].exprs[0].(*expr.Ct)
			_, isCmp := c.rules[0].exprs[2].(*expr.Cmp)
			if !isState || state.Key != expr.CtKeySTATE || !isCmp {
				t.Errorf("the rule of chain %s does not begin with a comparison of ct state", c.Name)
			}
		}
		for _, hook := range []*nftables.ChainHook{nftables.ChainHookInput, nftables.ChainHookForward, nftables.ChainHookOutput} {
			if hooks[*hook] != 1 {
				t.Errorf("%d filter chains at hook %d, want 1", hooks[*hook], *hook)
			}
			delete(hooks, *hook)
		}
		if len(hooks) > 0 {
			t.Errorf("other hooks have filter chains: %v", hooks)
		}
	}
}
