package dataplanetest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// generator returns random Services built from few names, addresses and ports, so that they
// often conflict.
type generator struct {
	topology *topology
	random   *rand.Rand
}

func (g generator) key() dataplane.Key {
	return dataplane.Key{
		Namespace: fmt.Sprintf("ns-%d", g.random.IntN(2)),
		Name:      fmt.Sprintf("svc-%d", g.random.IntN(10)),
		Port:      []string{"", "web"}[g.random.IntN(2)],
		Family:    families()[g.random.IntN(2)],
		Kind:      dataplane.Kind(g.random.IntN(4)), //nolint:gosec // fits
	}
}

func (g generator) frontend(key dataplane.Key) dataplane.Frontend {
	f := dataplane.Frontend{
		Protocol: protocols()[g.random.IntN(3)],
		Addr:     vip(key.Family, byte(g.random.IntN(16)), uint16(80+g.random.IntN(3))), //nolint:gosec // fits
	}
	if key.Kind == dataplane.NodePort {
		f.Addr = nodePortFrontend(key.Family, uint16(30_000+g.random.IntN(20))) //nolint:gosec // fits
	}
	return f
}

// spec returns a random ServiceSpec. Over many calls it uses every field.
func (g generator) spec(family dataplane.Family) dataplane.ServiceSpec {
	endpoints := func() []dataplane.Endpoint {
		var all []dataplane.Endpoint
		for range []int{0, 1, 2, 3, 10, 40}[g.random.IntN(6)] {
			all = append(all, g.endpoint(family))
		}
		return all
	}
	spec := dataplane.ServiceSpec{
		Endpoints:          endpoints(),
		Masquerade:         dataplane.Masquerade(g.random.IntN(3)), //nolint:gosec // fits
		NoEndpointsVerdict: dataplane.Verdict(g.random.IntN(2)),    //nolint:gosec // fits
	}
	if g.random.IntN(3) == 0 {
		spec.ExternalTrafficPolicyLocal, spec.LocalEndpoints = true, endpoints()
	}
	if g.random.IntN(3) == 0 {
		spec.Affinity = []time.Duration{time.Second, 3 * time.Hour, 18 * time.Hour, dataplane.MaxAffinity}[g.random.IntN(4)]
	}
	if g.random.IntN(100) == 0 { // rarely, because a backend may need many elements for it
		spec.Scheduler = dataplane.SourceHash
	}
	if g.random.IntN(4) == 0 {
		for range 1 + g.random.IntN(4) {
			addr := g.endpoint(family).Addr.Addr()
			prefix, err := addr.Prefix([]int{0, 8, 17, 24, 32, 24}[g.random.IntN(6)])
			if err != nil {
				g.topology.t.Fatal(err)
			}
			spec.SourceRanges = append(spec.SourceRanges, prefix)
		}
	}
	return spec
}

// node returns a random Node. It may be unrelated to the topology.
func (g generator) node() dataplane.Node {
	var n dataplane.Node
	networks := func() []netip.Prefix {
		var all []netip.Prefix
		for _, family := range families() {
			for range g.random.IntN(3) {
				if p, err := g.endpoint(family).Addr.Addr().Prefix(8 * (1 + g.random.IntN(4))); err == nil {
					all = append(all, p)
				}
			}
		}
		return all
	}
	switch g.random.IntN(4) {
	case 0:
		n.PodCIDRs = networks()
	case 1:
		n.PodInterface = "cbr0"
	case 2:
		n.PodInterfacePrefix = "veth"
	}
	n.LocalPodCIDRs, n.ServiceCIDRs, n.MasqueradeAll = networks(), networks(), g.random.IntN(3) == 0
	n.PingServiceIPs, n.LocalhostNodePorts, n.ProtectLoopback = g.random.IntN(2) == 0, g.random.IntN(2) == 0, g.random.IntN(2) == 0
	for _, family := range families() {
		for range g.random.IntN(3) {
			n.NodePortAddrs = append(n.NodePortAddrs, g.endpoint(family).Addr.Addr())
		}
		for range g.random.IntN(2) {
			network, _ := g.endpoint(family).Addr.Addr().Prefix(28)
			n.NodePortNetworks = append(n.NodePortNetworks, network)
		}
		for range g.random.IntN(2) {
			n.PrimaryAddrs = append(n.PrimaryAddrs, g.endpoint(family).Addr.Addr())
		}
	}
	return n
}

// endpoint returns a random endpoint. Whether an address is local is the same in all
// Services.
func (g generator) endpoint(family dataplane.Family) dataplane.Endpoint {
	n := byte(g.random.IntN(60)) //nolint:gosec // fits
	addr := netip.AddrFrom4([4]byte{10, 244, 0, n})
	if family == dataplane.IPv6 {
		addr = netip.AddrFrom16([16]byte{0: 0xfd, 2: 0x02, 15: n})
	}
	return dataplane.Endpoint{
		Addr:  netip.AddrPortFrom(addr, uint16(8080+g.random.IntN(2))), //nolint:gosec // fits
		Local: n < 20,
	}
}

// service returns a random Service with this key and frontends outside taken, and adds them
// to taken. It returns nil if all frontends that it tries are taken.
func (g generator) service(key dataplane.Key, taken map[dataplane.Frontend]bool) *dataplane.Service {
	g.topology.t.Helper()
	var frontends []dataplane.Frontend
	for range 1 + g.random.IntN(3) {
		if f := g.frontend(key); !taken[f] {
			frontends = append(frontends, f)
			taken[f] = true
		}
	}
	if len(frontends) == 0 {
		return nil
	}
	s, err := dataplane.NewService(key, frontends, g.spec(key.Family))
	if err != nil {
		g.topology.t.Fatal(err)
	}
	return s
}

// state returns a random set of Services.
func (g generator) state() []*dataplane.Service {
	g.topology.t.Helper()
	services := map[dataplane.Key]*dataplane.Service{}
	taken := map[dataplane.Frontend]bool{}
	for range g.random.IntN(30) {
		key := g.key()
		if services[key] == nil {
			if s := g.service(key, taken); s != nil {
				services[key] = s
			}
		}
	}
	return slices.Collect(maps.Values(services))
}

// changes returns random changes of the programmed Services. Services are created, changed
// and deleted, and take over frontends of other changing Services.
func (g generator) changes() []dataplane.Change {
	g.topology.t.Helper()
	keys := map[dataplane.Key]bool{}
	for range 1 + g.random.IntN(6) {
		keys[g.key()] = true
	}
	taken := map[dataplane.Frontend]bool{}
	for key, s := range g.topology.programmed {
		if !keys[key] {
			for _, f := range s.Frontends {
				taken[f] = true
			}
		}
	}
	var changes []dataplane.Change
	// Sorted, so that the result depends on the seed only.
	for _, key := range slices.SortedFunc(maps.Keys(keys), dataplane.Key.Compare) {
		c := dataplane.Change{Old: g.topology.programmed[key]}
		if c.Old == nil || g.random.IntN(4) > 0 {
			c.New = g.service(key, taken)
		}
		if c.Old != nil || c.New != nil {
			changes = append(changes, c)
		}
	}
	g.random.Shuffle(len(changes), func(i, j int) { changes[i], changes[j] = changes[j], changes[i] })
	return changes
}

// testReadState programs random states. The topology reads back and checks the state after
// each call.
func (s suite) testReadState(t *testing.T) {
	t.Parallel()
	topo := newBareTopology(t, s)
	seed := rand.Uint64() //nolint:gosec // no secret
	t.Logf("seed %d", seed)
	g := generator{topology: topo, random: rand.New(rand.NewPCG(seed, 0))} //nolint:gosec // no secret
	for range 10 {
		topo.node = g.node()
		topo.replace(g.state()...)
		for range 20 {
			topo.applyChanges(g.changes())
		}
		topo.node = g.node()
		topo.warmRestart()
		for range 5 {
			topo.applyChanges(g.changes())
		}
	}
	topo.replace()
}

// noDriftWait is how long the tests wait to see that no drift is reported. driftTimeout is
// how long they wait for expected drift; it allows for backends that poll.
const (
	noDriftWait  = 300 * time.Millisecond
	driftTimeout = 30 * time.Second
)

// openSecond opens a second Dataplane in the node's namespace.
func (topo *topology) openSecond() dataplane.Dataplane {
	topo.t.Helper()
	second := topo.open(topo.t, topo.net.Node.Fd())
	topo.t.Cleanup(func() {
		if err := second.Close(); err != nil {
			topo.t.Errorf("close second Dataplane: %v", err)
		}
	})
	return second
}

// expectDrift checks whether drift is reported on the channel.
func expectDrift(t *testing.T, drift <-chan struct{}, want bool, after string) {
	t.Helper()
	limit := noDriftWait
	if want {
		limit = driftTimeout
	}
	select {
	case <-drift:
		if !want {
			t.Errorf("drift reported after %s, want none", after)
		}
	case <-time.After(limit):
		if want {
			t.Errorf("no drift reported within %v after %s", limit, after)
		}
	}
}

// testEqualReplace checks that a Replace with the current state writes nothing. Writes by a
// second Dataplane are drift to the first, so the first reports no drift only if nothing was
// written.
func (s suite) testEqualReplace(t *testing.T) {
	t.Parallel()
	topo := newBareTopology(t, s)
	seed := rand.Uint64() //nolint:gosec // no secret
	t.Logf("seed %d", seed)
	g := generator{topology: topo, random: rand.New(rand.NewPCG(seed, 0))} //nolint:gosec // no secret
	topo.node = g.node()
	topo.replace(g.state()...)
	for range 10 { // removals leave a slot order that Replace alone would not create
		topo.applyChanges(g.changes())
	}
	expectDrift(t, topo.dp.Drift(), false, "its own changes")
	second := topo.openSecond()
	for range 2 {
		if err := second.Replace(t.Context(), topo.node, maps.Values(topo.programmed), nil); err != nil {
			t.Fatalf("Replace by the second Dataplane: %v", err)
		}
		topo.checkState("an equal Replace")
	}
	expectDrift(t, topo.dp.Drift(), false, "an equal Replace by the second Dataplane")
}

func (s suite) testDrift(t *testing.T) {
	t.Parallel()
	topo := newBareTopology(t, s)
	addrs := func(n byte) []netip.AddrPort { return []netip.AddrPort{vip(dataplane.IPv4, n, 80)} }
	topo.replace(topo.service("web", dataplane.TCP, addrs(1), addrs(2)))
	second := topo.openSecond()
	other := topo.service("other", dataplane.TCP, addrs(3), addrs(4))
	if err := second.Replace(t.Context(), topo.node, slices.Values([]*dataplane.Service{other}), nil); err != nil {
		t.Fatalf("Replace by the second Dataplane: %v", err)
	}
	expectDrift(t, topo.dp.Drift(), true, "a Replace by the second Dataplane")
	topo.replace(slices.Collect(maps.Values(topo.programmed))...) // checks that the drift is repaired
}
