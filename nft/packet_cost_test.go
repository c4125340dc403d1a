package nft

import (
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/go-cmp/cmp"
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
	node.AheadOfOthers, node.PingServiceIPs = false, false
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

// TestEstablishedPacketCost checks how many expressions the filter chains of a usual node evaluate for a
// packet of an established connection, which no rule's first comparison matches. NAT chains do not see
// these packets. A forwarded packet passes one chain only.
func TestEstablishedPacketCost(t *testing.T) {
	t.Parallel()
	const state, loopback = 3, 2 // expressions up to the comparison
	for _, table := range (Options{}).newTables(TableName) {
		want := map[nftables.ChainHook][]int{
			*nftables.ChainHookForward: {state}, *nftables.ChainHookOutput: {state}, *nftables.ChainHookInput: {state, loopback},
		}
		if table.family == dataplane.IPv6 {
			want[*nftables.ChainHookInput] = []int{state}
		}
		got := map[nftables.ChainHook][]int{}
		for _, c := range table.chains(usualNode(), nil) {
			if c.Hooknum == nil || c.Type != nftables.ChainTypeFilter {
				continue
			}
			if got[*c.Hooknum] != nil {
				t.Errorf("hook %d has more than one filter chain, one of them %s", *c.Hooknum, c.Name)
			}
			for _, r := range c.rules {
				n := slices.IndexFunc(r.exprs, func(e expr.Any) bool { _, ok := e.(*expr.Cmp); return ok }) + 1
				got[*c.Hooknum] = append(got[*c.Hooknum], n)
				if ct, ok := r.exprs[0].(*expr.Ct); n == state && (!ok || ct.Key != expr.CtKeySTATE) {
					t.Errorf("a rule of chain %s does not begin with a comparison of ct state", c.Name)
				}
				if load, ok := r.exprs[0].(*expr.Payload); n == loopback && (!ok || load.Len != 1) {
					t.Errorf("a rule of chain %s does not begin with a comparison of a byte", c.Name)
				}
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("expressions of the rules at each hook (-want +got):\n%s", diff)
		}
	}
}
