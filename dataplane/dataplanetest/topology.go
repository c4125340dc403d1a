package dataplanetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// endpointPort is the port on which the pods of a topology serve all protocols. Services use
// other ports, so that the tests notice an untranslated port.
const endpointPort = 8080

// retransmission is the initial retransmission timeout of TCP (RFC 6298) and SCTP (RFC 9260).
const retransmission = time.Second

func families() []dataplane.Family { return []dataplane.Family{dataplane.IPv4, dataplane.IPv6} }

func protocols() []dataplane.Protocol {
	return []dataplane.Protocol{dataplane.TCP, dataplane.UDP, dataplane.SCTP}
}

func networkName(p dataplane.Protocol) string { return strings.ToLower(p.String()) }

// addrOf returns the address of a host in a family.
func addrOf(h *nettest.Host, family dataplane.Family) netip.Addr {
	if family == dataplane.IPv4 {
		return h.IPv4
	}
	return h.IPv6
}

// vip returns the nth address of the Service network with a port. No host has the address
// unless a test adds it.
func vip(family dataplane.Family, n byte, port uint16) netip.AddrPort {
	addr := netip.AddrFrom4([4]byte{10, 96, 0, n})
	if family == dataplane.IPv6 {
		addr = netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x10, 5: 0x96, 15: n})
	}
	return netip.AddrPortFrom(addr, port)
}

// topology is a test network with a Dataplane on its node. It records the programmed Services
// and checks after each call that the kernel holds them.
type topology struct {
	t          *testing.T
	open       Opener
	net        *nettest.Network
	client     *nettest.Host   // a pod that is not an endpoint
	pods       []*nettest.Host // serve all protocols on endpointPort
	dp         dataplane.Dataplane
	node       dataplane.Node
	programmed map[dataplane.Key]*dataplane.Service
	explained  *explained // nil if the suite has no Explainer
}

// newBareTopology returns a topology without pods, for tests that send no packets.
func newBareTopology(t *testing.T, s suite) *topology {
	t.Helper()
	topo := &topology{t: t, open: s.open, programmed: map[dataplane.Key]*dataplane.Service{}}
	options := nettest.Options{UniquePorts: s.limitations.NeedUniquePorts}
	if s.explain != nil {
		topo.explained = newExplained(t, s)
		options.OnConnect = topo.explained.onConnect
	}
	topo.net = nettest.NewT(t, options)
	topo.explained.setNode(topo.net.Node)
	topo.node.PodCIDRs = topo.net.PodCIDRs
	topo.dp = s.open(t, topo.net.Node.Fd())
	t.Cleanup(func() {
		if err := topo.dp.Close(); err != nil {
			t.Errorf("close the Dataplane: %v", err)
		}
	})
	return topo
}

// newTopology returns a topology with a client pod, a number of other pods, and no Services.
func newTopology(t *testing.T, s suite, pods int) *topology {
	t.Helper()
	topo := newBareTopology(t, s)
	topo.client = topo.net.PodT(t, "client")
	for i := range pods {
		pod := topo.net.PodT(t, fmt.Sprintf("pod-%d", i))
		for _, p := range protocols() {
			pod.ServeT(t, networkName(p), endpointPort)
		}
		topo.pods = append(topo.pods, pod)
	}
	return topo
}

// endpoints returns the endpoint addresses of the pods with these indexes.
func (topo *topology) endpoints(family dataplane.Family, pods ...int) []netip.AddrPort {
	addrs := make([]netip.AddrPort, 0, len(pods))
	for _, i := range pods {
		addrs = append(addrs, netip.AddrPortFrom(addrOf(topo.pods[i], family), endpointPort))
	}
	return addrs
}

// service returns a ClusterIP Service. Its family is that of the first frontend.
func (topo *topology) service(
	name string, protocol dataplane.Protocol, frontends []netip.AddrPort, endpoints []netip.AddrPort,
) *dataplane.Service {
	topo.t.Helper()
	return topo.serviceWithKey(dataplane.Key{Namespace: "default", Name: name, Port: networkName(protocol)}, protocol, frontends, endpoints)
}

// serviceWithKey returns a Service with a given key. Its family is that of the first
// frontend.
func (topo *topology) serviceWithKey(
	key dataplane.Key, protocol dataplane.Protocol, frontends []netip.AddrPort, endpoints []netip.AddrPort,
) *dataplane.Service {
	topo.t.Helper()
	return topo.newService(key, protocol, frontends, topo.specOf(endpoints))
}

// specOf returns a ServiceSpec with local endpoints at these addresses and default values
// otherwise.
func (topo *topology) specOf(endpoints []netip.AddrPort) dataplane.ServiceSpec {
	return dataplane.ServiceSpec{Endpoints: localEndpoints(endpoints)}
}

// localEndpoints returns an endpoint on this node for each address.
func localEndpoints(addrs []netip.AddrPort) []dataplane.Endpoint {
	es := make([]dataplane.Endpoint, 0, len(addrs))
	for _, addr := range addrs {
		es = append(es, dataplane.Endpoint{Addr: addr, Local: true})
	}
	return es
}

// serviceOfKind returns a Service of a kind with one frontend.
func (topo *topology) serviceOfKind(
	kind dataplane.Kind, name string, protocol dataplane.Protocol, frontend netip.AddrPort, spec dataplane.ServiceSpec,
) *dataplane.Service {
	topo.t.Helper()
	key := dataplane.Key{Namespace: "default", Name: name, Port: networkName(protocol), Kind: kind}
	return topo.newService(key, protocol, []netip.AddrPort{frontend}, spec)
}

// newService returns a Service with the family of the first frontend.
func (topo *topology) newService(
	key dataplane.Key, protocol dataplane.Protocol, frontends []netip.AddrPort, spec dataplane.ServiceSpec,
) *dataplane.Service {
	topo.t.Helper()
	key.Family = dataplane.FamilyOf(frontends[0].Addr())
	fs := make([]dataplane.Frontend, 0, len(frontends))
	for _, addr := range frontends {
		fs = append(fs, dataplane.Frontend{Protocol: protocol, Addr: addr})
	}
	s, err := dataplane.NewService(key, fs, spec)
	if err != nil {
		topo.t.Fatal(err)
	}
	return s
}

// replace makes the kernel hold exactly these Services.
func (topo *topology) replace(services ...*dataplane.Service) {
	topo.t.Helper()
	topo.explained.startChange()
	defer topo.explained.endChange()
	if err := topo.dp.Replace(topo.t.Context(), topo.node, slices.Values(services), nil); err != nil {
		topo.t.Fatalf("Replace: %v", err)
	}
	clear(topo.programmed)
	for _, s := range services {
		topo.programmed[s.Key] = s
	}
	topo.checkState("Replace")
}

// createOrUpdate creates or changes Services in one Apply.
func (topo *topology) createOrUpdate(services ...*dataplane.Service) {
	topo.t.Helper()
	changes := make([]dataplane.Change, 0, len(services))
	for _, s := range services {
		changes = append(changes, dataplane.Change{Old: topo.programmed[s.Key], New: s})
	}
	topo.applyChanges(changes)
}

// remove deletes Services in one Apply.
func (topo *topology) remove(services ...*dataplane.Service) {
	topo.t.Helper()
	changes := make([]dataplane.Change, 0, len(services))
	for _, s := range services {
		changes = append(changes, dataplane.Change{Old: topo.programmed[s.Key]})
	}
	topo.applyChanges(changes)
}

func (topo *topology) applyChanges(changes []dataplane.Change) {
	topo.t.Helper()
	topo.applyUnchecked(changes)
	topo.checkState("Apply")
}

// applyUnchecked calls Apply without reading the state back, for the highest possible rate of
// changes.
func (topo *topology) applyUnchecked(changes []dataplane.Change) {
	topo.t.Helper()
	topo.explained.startChange()
	defer topo.explained.endChange()
	if err := topo.dp.Apply(topo.t.Context(), changes); err != nil {
		topo.t.Fatalf("Apply: %v", err)
	}
	for _, c := range changes {
		if c.New == nil {
			delete(topo.programmed, c.Old.Key)
		} else {
			topo.programmed[c.New.Key] = c.New
		}
	}
}

func (topo *topology) checkState(after string) {
	topo.t.Helper()
	got, err := topo.dp.Read(topo.t.Context())
	if err != nil {
		topo.t.Fatalf("Read after %s: %v", after, err)
	}
	want := dataplane.StateOf(maps.Values(topo.programmed))
	if !want.Equal(got) {
		topo.t.Fatalf("after %s the kernel does not hold the programmed state:\n%s", after, want.Diff(got))
	}
}

// warmRestart closes the Dataplane, as the program does when it stops, opens another one and
// calls Replace with the same Services.
func (topo *topology) warmRestart() {
	topo.t.Helper()
	if err := topo.dp.Close(); err != nil {
		topo.t.Fatalf("close the Dataplane: %v", err)
	}
	topo.dp = topo.open(topo.t, topo.net.Node.Fd())
	topo.checkState("a warm restart")
	topo.replace(slices.Collect(maps.Values(topo.programmed))...)
}

// connect opens a connection and sends one request. Its timeout is longer than a healthy
// machine needs, and short enough that the suite ends in time with a backend that drops
// everything.
func connect(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort) (nettest.Answer, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	return from.Connect(ctx, networkName(protocol), addr)
}

// maxJitter bounds the random pause that keeps concurrent clients from connecting in
// lockstep.
const maxJitter = 20 * time.Millisecond

// enoughConnections returns how many connections to k endpoints, chosen at random, reach
// every endpoint with a probability of at least 1 - 10^-9.
func enoughConnections(k int) int {
	return int(math.Ceil(float64(k) * (math.Log(float64(k)) + math.Log(1e9))))
}

// expectEndpoints checks that connections to addr reach all endpoints and nothing else.
// Without endpoints it checks that a connection is refused. It returns the answers.
func expectEndpoints(
	t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort, endpoints []netip.AddrPort,
) []nettest.Answer {
	t.Helper()
	if len(endpoints) == 0 {
		expectRefused(t, from, protocol, addr)
		return nil
	}
	missing := map[netip.AddrPort]bool{}
	for _, e := range endpoints {
		missing[e] = true
	}
	var answers []nettest.Answer
	for n := enoughConnections(len(endpoints)); len(answers) < n || len(missing) > 0 && len(answers) < 3*n; {
		if len(answers) >= n {
			// A backend may assign endpoints round-robin; clients in lockstep could then
			// miss one each time.
			time.Sleep(rand.N(maxJitter)) //nolint:gosec // no secret
		}
		answer, err := connect(t, from, protocol, addr)
		if err != nil {
			t.Errorf("connection %d: %v", len(answers), err)
			return answers
		}
		if !slices.Contains(endpoints, answer.Endpoint) {
			t.Errorf("connection from %s to %s reached %s, want one of %v",
				from.Name, addr, answer.Endpoint, endpoints)
			return answers
		}
		answers = append(answers, answer)
		delete(missing, answer.Endpoint)
	}
	if len(missing) > 0 {
		t.Errorf("%d connections from %s to %s, none reached %v",
			len(answers), from.Name, addr, slices.SortedFunc(maps.Keys(missing), netip.AddrPort.Compare))
	}
	return answers
}

// expectRefused checks that a connection to addr is refused at once, before the client
// retransmits its first packet.
func expectRefused(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), retransmission)
	defer cancel()
	if answer, err := from.Connect(ctx, networkName(protocol), addr); !errors.Is(err, nettest.ErrRefused) {
		t.Errorf("connection from %s to %s/%s: answer %+v, error %v, want it refused", from.Name, addr, protocol, answer, err)
	}
}

// expectDropped checks that a connection to addr gets neither an answer nor a refusal.
func expectDropped(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), retransmission/2)
	defer cancel()
	if answer, err := from.Connect(ctx, networkName(protocol), addr); !errors.Is(err, nettest.ErrTimeout) {
		t.Errorf("connection from %s to %s/%s: answer %+v, error %v, want it dropped", from.Name, addr, protocol, answer, err)
	}
}

// expectVerdict checks that connections to addr, which has no endpoint for them, get the
// verdict.
func expectVerdict(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort, verdict dataplane.Verdict) {
	t.Helper()
	if verdict == dataplane.Drop {
		expectDropped(t, from, protocol, addr)
	} else {
		expectRefused(t, from, protocol, addr)
	}
}

// expectSource checks that a connection to addr is answered and that the endpoint sees this
// source address.
func expectSource(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort, source netip.Addr) {
	t.Helper()
	answer, err := connect(t, from, protocol, addr)
	if err != nil {
		t.Error(err)
		return
	}
	if answer.Source.Addr() != source {
		t.Errorf("%s from %s to %s: endpoint sees source %s, want %s", protocol, from.Name, addr, answer.Source.Addr(), source)
	}
}
