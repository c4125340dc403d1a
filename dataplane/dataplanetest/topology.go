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

// endpointPort is where the pods of a world serve all protocols; Services have other
// ports, so that a connection that keeps its port is noticed.
const endpointPort = 8080

// retransmission is when clients send their first packet again: RFC 6298, RFC 9260.
const retransmission = time.Second

func families() []dataplane.Family { return []dataplane.Family{dataplane.IPv4, dataplane.IPv6} }

func protocols() []dataplane.Protocol {
	return []dataplane.Protocol{dataplane.TCP, dataplane.UDP, dataplane.SCTP}
}

func networkName(p dataplane.Protocol) string { return strings.ToLower(p.String()) }

// addrOf returns the address of the host that is of the family.
func addrOf(h *nettest.Host, family dataplane.Family) netip.Addr {
	if family == dataplane.IPv4 {
		return h.IPv4
	}
	return h.IPv6
}

// vip returns the nth address of the Service network, which is no host's.
func vip(family dataplane.Family, n byte, port uint16) netip.AddrPort {
	addr := netip.AddrFrom4([4]byte{10, 96, 0, n})
	if family == dataplane.IPv6 {
		addr = netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x10, 5: 0x96, 15: n})
	}
	return netip.AddrPortFrom(addr, port)
}

// topology is a network with a Dataplane on its node. It remembers what was
// programmed, and checks after each call that the kernel holds it.
type topology struct {
	t          *testing.T
	open       Opener
	net        *nettest.Network
	client     *nettest.Host   // a pod that is no endpoint
	pods       []*nettest.Host // serve all protocols on port
	dp         dataplane.Dataplane
	node       dataplane.Node
	programmed map[dataplane.Key]*dataplane.Service
}

// newBareTopology makes a world without pods, for tests that send no packets.
func newBareTopology(t *testing.T, s suite) *topology {
	t.Helper()
	w := &topology{
		t: t, open: s.open, net: nettest.NewT(t, nettest.Options{UniquePorts: s.limitations.NeedUniquePorts}),
		programmed: map[dataplane.Key]*dataplane.Service{},
	}
	w.node.PodCIDRs = w.net.PodCIDRs
	w.dp = s.open(t, w.net.Node.Fd())
	t.Cleanup(func() {
		if err := w.dp.Close(); err != nil {
			t.Errorf("close the Dataplane: %v", err)
		}
	})
	return w
}

// newTopology makes a world with a client, a number of pods, and no Services.
func newTopology(t *testing.T, s suite, pods int) *topology {
	t.Helper()
	w := newBareTopology(t, s)
	w.client = w.net.PodT(t, "client")
	for i := range pods {
		pod := w.net.PodT(t, fmt.Sprintf("pod-%d", i))
		for _, p := range protocols() {
			pod.ServeT(t, networkName(p), endpointPort)
		}
		w.pods = append(w.pods, pod)
	}
	return w
}

// endpoints returns the endpoints of a family that the pods are, by number.
func (w *topology) endpoints(family dataplane.Family, pods ...int) []netip.AddrPort {
	addrs := make([]netip.AddrPort, 0, len(pods))
	for _, i := range pods {
		addrs = append(addrs, netip.AddrPortFrom(addrOf(w.pods[i], family), endpointPort))
	}
	return addrs
}

// service returns a Service of the family that its frontends have.
func (w *topology) service(
	name string, protocol dataplane.Protocol, frontends []netip.AddrPort, endpoints []netip.AddrPort,
) *dataplane.Service {
	w.t.Helper()
	return w.serviceWithKey(dataplane.Key{Namespace: "default", Name: name, Port: networkName(protocol)}, protocol, frontends, endpoints)
}

func (w *topology) serviceWithKey(
	key dataplane.Key, protocol dataplane.Protocol, frontends []netip.AddrPort, endpoints []netip.AddrPort,
) *dataplane.Service {
	w.t.Helper()
	return w.newService(key, protocol, frontends, w.specOf(endpoints))
}

// specOf returns the Treatment that is nothing but these endpoints.
func (w *topology) specOf(endpoints []netip.AddrPort) dataplane.ServiceSpec {
	return dataplane.ServiceSpec{Endpoints: localEndpoints(endpoints)}
}

func localEndpoints(addrs []netip.AddrPort) []dataplane.Endpoint {
	es := make([]dataplane.Endpoint, 0, len(addrs))
	for _, addr := range addrs {
		es = append(es, dataplane.Endpoint{Addr: addr, Local: true})
	}
	return es
}

// serviceOfKind returns a Service of one frontend.
func (w *topology) serviceOfKind(
	kind dataplane.Kind, name string, protocol dataplane.Protocol, frontend netip.AddrPort, treatment dataplane.ServiceSpec,
) *dataplane.Service {
	w.t.Helper()
	key := dataplane.Key{Namespace: "default", Name: name, Port: networkName(protocol), Kind: kind}
	return w.newService(key, protocol, []netip.AddrPort{frontend}, treatment)
}

// newService returns a Service of the family that its frontends have.
func (w *topology) newService(
	key dataplane.Key, protocol dataplane.Protocol, frontends []netip.AddrPort, treatment dataplane.ServiceSpec,
) *dataplane.Service {
	w.t.Helper()
	key.Family = dataplane.FamilyOf(frontends[0].Addr())
	fs := make([]dataplane.Frontend, 0, len(frontends))
	for _, addr := range frontends {
		fs = append(fs, dataplane.Frontend{Protocol: protocol, Addr: addr})
	}
	s, err := dataplane.NewService(key, fs, treatment)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// replace makes the kernel hold these Services and no others.
func (w *topology) replace(services ...*dataplane.Service) {
	w.t.Helper()
	if err := w.dp.Replace(w.t.Context(), w.node, slices.Values(services), nil); err != nil {
		w.t.Fatalf("replace: %v", err)
	}
	clear(w.programmed)
	for _, s := range services {
		w.programmed[s.Key] = s
	}
	w.checkState("replace")
}

// createOrUpdate creates or changes Services, in one Apply.
func (w *topology) createOrUpdate(services ...*dataplane.Service) {
	w.t.Helper()
	changes := make([]dataplane.Change, 0, len(services))
	for _, s := range services {
		changes = append(changes, dataplane.Change{Old: w.programmed[s.Key], New: s})
	}
	w.applyChanges(changes)
}

// remove deletes Services, in one Apply.
func (w *topology) remove(services ...*dataplane.Service) {
	w.t.Helper()
	changes := make([]dataplane.Change, 0, len(services))
	for _, s := range services {
		changes = append(changes, dataplane.Change{Old: w.programmed[s.Key]})
	}
	w.applyChanges(changes)
}

func (w *topology) applyChanges(changes []dataplane.Change) {
	w.t.Helper()
	w.applyUnchecked(changes)
	w.checkState("apply")
}

// applyUnchecked is apply without the check, for as many changes a second as there
// can be.
func (w *topology) applyUnchecked(changes []dataplane.Change) {
	w.t.Helper()
	if err := w.dp.Apply(w.t.Context(), changes); err != nil {
		w.t.Fatalf("apply: %v", err)
	}
	for _, c := range changes {
		if c.New == nil {
			delete(w.programmed, c.Old.Key)
		} else {
			w.programmed[c.New.Key] = c.New
		}
	}
}

func (w *topology) checkState(after string) {
	w.t.Helper()
	got, err := w.dp.Read(w.t.Context())
	if err != nil {
		w.t.Fatalf("read after %s: %v", after, err)
	}
	want := dataplane.StateOf(maps.Values(w.programmed))
	if !want.Equal(got) {
		w.t.Fatalf("the kernel does not hold what was programmed by %s:\n%s", after, want.Diff(got))
	}
}

// warmRestart closes the Dataplane, as the program does when it stops, and opens
// another, which is then told what there is.
func (w *topology) warmRestart() {
	w.t.Helper()
	if err := w.dp.Close(); err != nil {
		w.t.Fatalf("close the Dataplane: %v", err)
	}
	w.dp = w.open(w.t, w.net.Node.Fd())
	w.checkState("a restart")
	w.replace(slices.Collect(maps.Values(w.programmed))...)
}

// connect connects and asks once. It waits for longer than a sane machine
// needs, but not so long that a backend which loses everything takes hours.
func connect(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort) (nettest.Answer, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	return from.Connect(ctx, networkName(protocol), addr)
}

// maxJitter is for how long at most a client pauses to come in at another time than
// those that connect beside it.
const maxJitter = 20 * time.Millisecond

// enoughConnections returns how many connections reach each of k endpoints but once in
// 10^9 times, when they are distributed at random.
func enoughConnections(k int) int {
	return int(math.Ceil(float64(k) * (math.Log(float64(k)) + math.Log(1e9))))
}

// expectEndpoints checks that connections to addr reach all endpoints and nothing else,
// or are refused if there are none. It returns the answers.
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
			// Endpoints may be taken in turn, by several clients that keep step.
			time.Sleep(rand.N(maxJitter)) //nolint:gosec // no secret
		}
		answer, err := connect(t, from, protocol, addr)
		if err != nil {
			t.Errorf("connection %d: %v", len(answers), err)
			return answers
		}
		if !slices.Contains(endpoints, answer.Endpoint) {
			t.Errorf("a connection from %s to %s reached %s, which is no endpoint: want one of %v",
				from.Name, addr, answer.Endpoint, endpoints)
			return answers
		}
		answers = append(answers, answer)
		delete(missing, answer.Endpoint)
	}
	if len(missing) > 0 {
		t.Errorf("of %d connections from %s to %s none reached %v",
			len(answers), from.Name, addr, slices.SortedFunc(maps.Keys(missing), netip.AddrPort.Compare))
	}
	return answers
}

// expectRefused checks that a connection to addr is refused at once: before
// the client has to send its first packet again, which all protocols do after
// a second.
func expectRefused(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), retransmission)
	defer cancel()
	if answer, err := from.Connect(ctx, networkName(protocol), addr); !errors.Is(err, nettest.ErrRefused) {
		t.Errorf("a connection from %s to %s/%s: answer %+v, error %v, want it refused", from.Name, addr, protocol, answer, err)
	}
}

// expectDropped checks that nobody answers a connection to addr, not even to
// refuse it.
func expectDropped(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), retransmission/2)
	defer cancel()
	if answer, err := from.Connect(ctx, networkName(protocol), addr); !errors.Is(err, nettest.ErrTimeout) {
		t.Errorf("a connection from %s to %s/%s: answer %+v, error %v, want it dropped", from.Name, addr, protocol, answer, err)
	}
}

// expectVerdict checks that connections to addr, which no endpoint can take, get
// the verdict.
func expectVerdict(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort, verdict dataplane.Verdict) {
	t.Helper()
	if verdict == dataplane.Drop {
		expectDropped(t, from, protocol, addr)
	} else {
		expectRefused(t, from, protocol, addr)
	}
}

// expectSource checks that a connection to addr is answered, by a host that sees
// this source.
func expectSource(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort, source netip.Addr) {
	t.Helper()
	answer, err := connect(t, from, protocol, addr)
	if err != nil {
		t.Error(err)
		return
	}
	if answer.Source.Addr() != source {
		t.Errorf("%s from %s to %s: the endpoint sees source %s, want %s", protocol, from.Name, addr, answer.Source.Addr(), source)
	}
}
