package nft

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/google/go-cmp/cmp"
)

// operatorEdits returns edits of the table that an operator may make while debugging. None of
// them may break a connection or keep a new connection from its Service.
func operatorEdits() map[string]string {
	return map[string]string{
		"a rule with an anonymous set":            "insert rule ip fairlead filter-forward tcp dport { 80, 8080 } counter",
		"a rule with an anonymous interval set":   "insert rule ip fairlead nat-prerouting ip daddr { 10.0.0.0/8, 192.168.0.0/16 } counter",
		"a rule with an anonymous map":            "insert rule ip fairlead filter-forward meta mark set tcp dport map { 80 : 1, 8080 : 2 }",
		"a rule with an anonymous verdict map":    "insert rule ip fairlead filter-forward tcp dport vmap { 80 : continue, 443 : accept }",
		"a rule that jumps to a new chain":        "add chain ip fairlead debug; add rule ip fairlead debug counter; insert rule ip fairlead nat-prerouting jump debug",
		"a new chain with an anonymous set":       "add chain ip fairlead debug; add rule ip fairlead debug tcp dport { 80, 8080 } counter; insert rule ip fairlead filter-forward jump debug",
		"a new chain that jumps to our chain":     "add chain ip fairlead debug; add rule ip fairlead debug tcp dport 9 goto class-2",
		"chains that jump to one another":         "add chain ip fairlead a; add chain ip fairlead b; add chain ip fairlead c; add rule ip fairlead a jump b; add rule ip fairlead b jump c; add rule ip fairlead a jump c",
		"a verdict map to a new chain":            "add chain ip fairlead debug; add map ip fairlead debugs { type inet_service : verdict; }; add element ip fairlead debugs { 80 : jump debug }; insert rule ip fairlead filter-forward tcp dport vmap @debugs",
		"a verdict map to our chain":              "add map ip fairlead debugs { type inet_service : verdict; }; add element ip fairlead debugs { 9 : goto class-2 }; insert rule ip fairlead nat-prerouting tcp dport vmap @debugs",
		"an anonymous verdict map to a new chain": "add chain ip fairlead debug; add rule ip fairlead debug counter; insert rule ip fairlead filter-forward tcp dport vmap { 80 : jump debug, 8080 : jump debug }",
		"an anonymous chain":                      "insert rule ip fairlead filter-forward tcp dport 8080 jump { counter; }",
		"a named set":                             "add set ip fairlead seen { type ipv4_addr; flags dynamic; size 1000; }; insert rule ip fairlead nat-prerouting add @seen { ip saddr }",
		"a meter":                                 "insert rule ip fairlead filter-forward tcp dport 8080 meter seen { ip saddr counter }",
		"a set with timeouts":                     "add set ip fairlead seen { type ipv4_addr; flags dynamic,timeout; timeout 1m; }; insert rule ip fairlead nat-prerouting update @seen { ip saddr timeout 10s }",
		"a named counter":                         "add counter ip fairlead debug; insert rule ip fairlead filter-forward counter name debug",
		"a map of counters":                       "add counter ip fairlead debug; add map ip fairlead debugs { type inet_service : counter; }; add element ip fairlead debugs { 8080 : \"debug\" }; insert rule ip fairlead filter-forward counter name tcp dport map @debugs",
		"a quota with the name of a counter":      "add quota ip fairlead debug { over 1 mbytes }; insert rule ip fairlead filter-forward quota name debug",
		"a rule that uses our sets":               "insert rule ip fairlead filter-forward ip daddr @cluster-ips counter; add rule ip fairlead class-2 ip daddr @pod-cidrs counter",
		"a new base chain":                        "add chain ip fairlead debug { type filter hook prerouting priority -400; }; add rule ip fairlead debug meta nftrace set 1",
		"a new nat chain":                         "add chain ip fairlead debug { type nat hook prerouting priority -150; }; add rule ip fairlead debug counter",
		"a rule with a log":                       "insert rule ip fairlead nat-prerouting limit rate 1/second counter comment \"debug\"",
		"an element in a verdict map":             "add chain ip fairlead debug; add element ip fairlead classes { 7:7 : goto debug }",
		"a comment":                               "add table ip fairlead { comment \"ours\"; }; add chain ip fairlead debug { comment \"debug\"; }",
		"a catch-all":                             "add element ip fairlead hairpin { * }",
	}
}

// rebuildLog collects log messages about tables that cannot be repaired in place.
type rebuildLog struct{ text bytes.Buffer }

func (r *rebuildLog) logger() *slog.Logger { return slog.New(slog.NewTextHandler(&r.text, nil)) }

func (r *rebuildLog) check(t *testing.T, what string, want bool) {
	t.Helper()
	if got := strings.Contains(r.text.String(), "rebuilding table"); got != want || strings.Contains(r.text.String(), "re-creating table") {
		t.Errorf("%s: rebuilt %t, want %t; the log:\n%s", what, got, want, r.text.String())
	}
	r.text.Reset()
}

// testbed is a node with one Service, a client with open connections to the Service, and a
// load that opens new connections continuously.
type testbed struct {
	*Dataplane
	t        *testing.T
	node     dataplane.Node
	netns    *nettest.Namespace
	services []*dataplane.Service
	log      rebuildLog
	client   *nettest.Host
	frontend netip.AddrPort
	conns    []*nettest.Conn

	stopLoad       context.CancelFunc
	load           sync.WaitGroup
	opened, failed atomic.Int64
	lastFailure    atomic.Value
}

// newTestbed programs the tables, opens connections, and starts the load.
func newTestbed(t *testing.T) *testbed {
	t.Helper()
	network := nettest.NewT(t, nettest.Options{})
	b := &testbed{t: t, netns: network.Node.Namespace, client: network.PodT(t, "client")}
	var list []dataplane.Endpoint
	for _, name := range []string{"a", "b"} {
		pod := network.PodT(t, name)
		pod.ServeT(t, nettest.TCP, 8080)
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(pod.Addrs()[0], 8080)})
	}
	f := dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort("10.96.0.1:80")}
	b.frontend = f.Addr
	b.services = slices.Concat(sampleServices(t)[1:], []*dataplane.Service{service(t, "served", []dataplane.Frontend{f}, list)})
	b.services = slices.DeleteFunc(b.services, func(s *dataplane.Service) bool {
		return s.Key.Name != "served" && slices.Contains(s.Frontends, f)
	})
	b.node = nodeWithAllSettings()
	b.node.PodCIDRs = network.PodCIDRs
	b.Dataplane = openWithOptions(t, b.netns, Options{Logger: b.log.logger()})
	mustReplace(t, b.Dataplane, b.node, b.services...)
	for range 20 {
		conn, err := b.client.Open(t.Context(), nettest.TCP, b.frontend)
		if err != nil {
			t.Fatal(err)
		}
		b.conns = append(b.conns, conn)
		t.Cleanup(func() { _ = conn.Close() })
	}
	b.askAll("before")
	ctx, cancel := context.WithCancel(t.Context())
	b.stopLoad = cancel
	for range 2 {
		b.load.Go(func() {
			for ctx.Err() == nil {
				_, err := b.client.Connect(ctx, nettest.TCP, b.frontend)
				switch {
				case ctx.Err() != nil:
				case err != nil:
					b.failed.Add(1)
					b.lastFailure.Store(err.Error())
				default:
					b.opened.Add(1)
				}
			}
		})
	}
	return b
}

// askAll checks that each open connection gets an answer.
func (b *testbed) askAll(when string) {
	b.t.Helper()
	for _, conn := range b.conns {
		if _, err := conn.Ask(b.t.Context()); err != nil {
			b.t.Fatalf("%s: open connection failed: %v", when, err)
		}
	}
}

// check waits for new connections and checks that none failed since its last call. It also
// calls askAll.
func (b *testbed) check(when string) {
	b.t.Helper()
	b.askAll(when)
	for at := b.opened.Load(); b.opened.Load() < at+2 && b.failed.Load() == 0; {
		time.Sleep(time.Millisecond)
	}
	if n := b.failed.Swap(0); n > 0 {
		b.t.Errorf("%s: %d new connections failed: %v", when, n, b.lastFailure.Load())
	}
}

// endLoad stops opening connections and logs their number.
func (b *testbed) endLoad() {
	b.stopLoad()
	b.load.Wait()
	b.t.Logf("%d connections", b.opened.Load())
}

// TestOperatorEdits edits the table under load as an operator would.
func TestOperatorEdits(t *testing.T) {
	t.Parallel()
	binary := nftBinaries(t)["1.1.3"]
	b := newTestbed(t)
	before := sortedLines(runNFT(t, b.netns, binary, "list ruleset"))
	edits := operatorEdits()
	for name, script := range edits {
		runNFT(t, b.netns, binary, strings.ReplaceAll(script, "; ", "\n"))
		mustReplace(t, b.Dataplane, b.node, b.services...)
		b.check(name)
		b.log.check(t, name, false)
		after := sortedLines(runNFT(t, b.netns, binary, "list ruleset"))
		// Named objects without references stay.
		after = slices.DeleteFunc(after, func(s string) bool { return strings.Contains(s, "debug") })
		if diff := cmp.Diff(stripCounts(before), stripCounts(after)); diff != "" {
			t.Errorf("%s: after the repair (-before +after):\n%s", name, diff)
		}
		runNFT(t, b.netns, binary, "destroy counter ip fairlead debug\ndestroy quota ip fairlead debug")
	}
	b.endLoad()
}

// TestRulesOfPreviousVersion replaces rules under load by the rules that versions before
// docs/design/0020-first-packet.md had. Replace must repair them in place. Then the chains
// ahead of other proxies go and come back.
func TestRulesOfPreviousVersion(t *testing.T) {
	t.Parallel()
	binary := nftBinaries(t)["1.1.3"]
	b := newTestbed(t)
	before := sortedLines(runNFT(t, b.netns, binary, "list ruleset"))
	script := []string{"flush chain ip fairlead translate"}
	for _, group := range []string{"0", "4", "8", "c"} {
		script = append(script, "flush chain ip fairlead translate-"+group, "delete chain ip fairlead translate-"+group)
	}
	for shard := range numShards {
		script = append(script, fmt.Sprintf(
			"add rule ip fairlead translate ip daddr & 0.0.0.15 == 0.0.0.%d dnat ip to ip daddr . meta l4proto . th dport . meta priority map @endpoints-%x", shard, shard))
	}
	for _, hook := range []string{"prerouting", "output"} {
		script = append(script, "insert rule ip fairlead filter-"+hook+"-post-dnat meta priority & fff8:0 == fa18:0 meta priority set none")
	}
	// The rule for loopback addresses was in prerouting, which all packets pass.
	script = append(script, "flush chain ip fairlead filter-input",
		"add rule ip fairlead filter-input ct state invalid tcp flags & (fin | syn | rst | ack) == ack tcp sport @endpoint-ports goto invalid",
		`add rule ip fairlead filter-prerouting-post-dnat ip daddr 127.0.0.0/8 iifname != "lo" goto loopback-from-network`)
	for chain, unestablished := range map[string]string{"filter-forward": newOrInvalidName, "filter-output": newOrInvalidOutputName} {
		script = append(script, "flush chain ip fairlead "+chain,
			"flush chain ip fairlead "+unestablished, "delete chain ip fairlead "+unestablished,
			"add rule ip fairlead "+chain+` ct state new ip daddr @cluster-ips counter name "rejected-undeclared-port" drop`,
			"add rule ip fairlead "+chain+` ct state new ip daddr @service-cidrs counter name "dropped-no-service" drop`,
			"add rule ip fairlead "+chain+" ct state invalid tcp flags & (fin | syn | rst | ack) == ack tcp sport @endpoint-ports goto invalid")
	}
	runNFT(t, b.netns, binary, strings.Join(script, "\n"))
	b.check("the previous version's rules")
	mustReplace(t, b.Dataplane, b.node, b.services...)
	b.check("after the upgrade")
	b.log.check(t, "upgrade", false)
	after := sortedLines(runNFT(t, b.netns, binary, "list ruleset"))
	if diff := cmp.Diff(stripCounts(before), stripCounts(after)); diff != "" {
		t.Errorf("after the upgrade (-want +got):\n%s", diff)
	}
	for _, ahead := range []bool{false, true} {
		b.node.AheadOfOthers = ahead
		mustReplace(t, b.Dataplane, b.node, b.services...)
		b.check(fmt.Sprintf("AheadOfOthers is %t", ahead))
		b.log.check(t, "AheadOfOthers", false)
		if got := strings.Contains(runNFT(t, b.netns, binary, "list chains"), natPreroutingName+aheadSuffix); got != ahead {
			t.Errorf("AheadOfOthers is %t, but the chain exists: %t", ahead, got)
		}
	}
	b.endLoad()
}

// stripCounts removes lines that change with packets, and lines of named objects that the
// edits left behind.
func stripCounts(lines []string) []string {
	return slices.DeleteFunc(slices.Clone(lines), func(s string) bool {
		s = strings.TrimSpace(s)
		return strings.HasPrefix(s, "packets ") || strings.HasPrefix(s, "quota ") || strings.HasPrefix(s, "over ") ||
			strings.HasPrefix(s, "1 mbytes") || s == "}" || s == ""
	})
}

// TestVersionSkew makes another version of Fairlead define a set or a chain differently,
// under load. This version must correct the definition.
func TestVersionSkew(t *testing.T) {
	t.Parallel()
	b := newTestbed(t)
	other := openInNamespace(t, b.netns)
	for _, version := range []struct {
		name    string
		differ  func(*table)
		schema  int
		rebuilt bool
	}{
		{"endpoint-ports is not dynamic", func(t *table) { t.endpointPorts.Dynamic = false }, schema, false},
		{"cluster-ips has another size", func(t *table) { t.addrSets[clusterIPAddrs].Size = 100_000 }, schema, true},
		{"services has another size", func(t *table) { t.services.Size = 100_000 }, schema, true},
		{"new schema", func(*table) {}, schema + 1, true},
	} {
		other.newTables = func(name string) [2]*table {
			tables := Options{}.newTables(name)
			for _, t := range tables {
				version.differ(t)
			}
			return tables
		}
		other.tables = other.newTables(TableName)
		other.schema = version.schema
		for range 2 {
			mustReplace(t, other, b.node, b.services...)
			b.check(version.name + ", upgrade")
			mustReplace(t, b.Dataplane, b.node, b.services...)
			b.check(version.name + ", downgrade")
			b.log.check(t, version.name, version.rebuilt)
		}
		wantState(t, b.Dataplane, b.services...)
	}
	if listing := runNFT(t, b.netns, nftBinaries(t)["1.1.3"], "list tables"); strings.Contains(listing, nextSuffix) {
		t.Errorf("leftover tables:\n%s", listing)
	}
	b.endLoad()
}

// TestRepairFailures makes the kernel reject the repairs of a table, and then also the first
// rebuilds. The table must keep serving and must not be removed.
func TestRepairFailures(t *testing.T) {
	t.Parallel()
	b := newTestbed(t)
	for _, failures := range []int{repairAttempts - 1, repairAttempts, repairAttempts + 2} {
		runNFT(t, b.netns, nftBinaries(t)["1.1.3"], "insert rule ip fairlead filter-forward counter")
		n := 0
		b.flush = func() error {
			if n++; n <= failures {
				b.conn.(*bulkConn).discard()
				return errAckLost
			}
			return b.conn.Flush()
		}
		mustReplace(t, b.Dataplane, b.node, b.services...)
		name := fmt.Sprintf("%d failures", failures)
		b.check(name)
		b.log.check(t, name, failures >= repairAttempts)
		wantState(t, b.Dataplane, b.services...)
	}
	b.endLoad()
}

// TestRebuildInterrupted interrupts a rebuild after different numbers of commits. The partly
// rebuilt tables must serve, and the next Replace must complete the rebuild.
func TestRebuildInterrupted(t *testing.T) {
	t.Parallel()
	b := newTestbed(t)
	for commits, done := 1, false; !done; commits += commits + 2 {
		b.schema++
		n := 0
		b.flush = func() error {
			if n++; n > commits {
				b.conn.(*bulkConn).discard()
				return errAckLost
			}
			return b.conn.Flush()
		}
		ctx, cancel := context.WithCancel(t.Context())
		err := b.Replace(ctx, b.node, slices.Values(b.services), nil)
		cancel()
		done = err == nil && n <= commits
		b.check(fmt.Sprintf("interrupted after %d commits", commits))
		b.flush = b.conn.Flush
		mustReplace(t, b.Dataplane, b.node, b.services...)
		b.check("completed")
		wantState(t, b.Dataplane, b.services...)
	}
	b.endLoad()
}
