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

// port is where the pods of a world serve all protocols; Services have other
// ports, so that a connection that keeps its port is noticed.
const port = 8080

// retransmission is when clients send their first packet again: RFC 6298, RFC 9260.
const retransmission = time.Second

func families() []dataplane.Family { return []dataplane.Family{dataplane.IPv4, dataplane.IPv6} }

func protocols() []dataplane.Protocol {
	return []dataplane.Protocol{dataplane.TCP, dataplane.UDP, dataplane.SCTP}
}

func network(p dataplane.Protocol) string { return strings.ToLower(p.String()) }

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

// world is a network with a Dataplane on its node. It remembers what was
// programmed, and checks after each call that the kernel holds it.
type world struct {
	t      *testing.T
	open   Opener
	net    *nettest.Network
	client *nettest.Host   // a pod that is no endpoint
	pods   []*nettest.Host // serve all protocols on port
	dp     dataplane.Dataplane
	node   dataplane.Node
	held   map[dataplane.Key]*dataplane.Service
}

// newBareWorld makes a world without pods, for tests that send no packets.
func newBareWorld(t *testing.T, s suite) *world {
	t.Helper()
	w := &world{
		t: t, open: s.open, net: nettest.NewT(t, nettest.Options{UniquePorts: s.limits.AmbiguousPorts}),
		held: map[dataplane.Key]*dataplane.Service{},
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

// newWorld makes a world with a client, a number of pods, and no Services.
func newWorld(t *testing.T, s suite, pods int) *world {
	t.Helper()
	w := newBareWorld(t, s)
	w.client = w.net.PodT(t, "client")
	for i := range pods {
		pod := w.net.PodT(t, fmt.Sprintf("pod-%d", i))
		for _, p := range protocols() {
			pod.ServeT(t, network(p), port)
		}
		w.pods = append(w.pods, pod)
	}
	return w
}

// endpoints returns the endpoints of a family that the pods are, by number.
func (w *world) endpoints(family dataplane.Family, pods ...int) []netip.AddrPort {
	addrs := make([]netip.AddrPort, 0, len(pods))
	for _, i := range pods {
		addrs = append(addrs, netip.AddrPortFrom(addrOf(w.pods[i], family), port))
	}
	return addrs
}

// service returns a Service of the family that its frontends have.
func (w *world) service(
	name string, protocol dataplane.Protocol, frontends []netip.AddrPort, endpoints []netip.AddrPort,
) *dataplane.Service {
	w.t.Helper()
	return w.serviceOf(dataplane.Key{Namespace: "default", Name: name, Port: network(protocol)}, protocol, frontends, endpoints)
}

func (w *world) serviceOf(
	key dataplane.Key, protocol dataplane.Protocol, frontends []netip.AddrPort, endpoints []netip.AddrPort,
) *dataplane.Service {
	w.t.Helper()
	return w.make(key, protocol, frontends, w.to(endpoints))
}

// to returns the Treatment that is nothing but these endpoints.
func (w *world) to(endpoints []netip.AddrPort) dataplane.Treatment {
	return dataplane.Treatment{Endpoints: list(endpoints)}
}

func list(addrs []netip.AddrPort) []dataplane.Endpoint {
	es := make([]dataplane.Endpoint, 0, len(addrs))
	for _, addr := range addrs {
		es = append(es, dataplane.Endpoint{Addr: addr, Local: true})
	}
	return es
}

// of returns a Service of one frontend.
func (w *world) of(
	kind dataplane.Kind, name string, protocol dataplane.Protocol, frontend netip.AddrPort, treatment dataplane.Treatment,
) *dataplane.Service {
	w.t.Helper()
	key := dataplane.Key{Namespace: "default", Name: name, Port: network(protocol), Kind: kind}
	return w.make(key, protocol, []netip.AddrPort{frontend}, treatment)
}

// make returns a Service of the family that its frontends have.
func (w *world) make(
	key dataplane.Key, protocol dataplane.Protocol, frontends []netip.AddrPort, treatment dataplane.Treatment,
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
func (w *world) replace(services ...*dataplane.Service) {
	w.t.Helper()
	if err := w.dp.Replace(w.t.Context(), w.node, slices.Values(services), nil); err != nil {
		w.t.Fatalf("replace: %v", err)
	}
	clear(w.held)
	for _, s := range services {
		w.held[s.Key] = s
	}
	w.checkRead("replace")
}

// put creates or changes Services, in one Apply.
func (w *world) put(services ...*dataplane.Service) {
	w.t.Helper()
	changes := make([]dataplane.Change, 0, len(services))
	for _, s := range services {
		changes = append(changes, dataplane.Change{Old: w.held[s.Key], New: s})
	}
	w.apply(changes)
}

// remove deletes Services, in one Apply.
func (w *world) remove(services ...*dataplane.Service) {
	w.t.Helper()
	changes := make([]dataplane.Change, 0, len(services))
	for _, s := range services {
		changes = append(changes, dataplane.Change{Old: w.held[s.Key]})
	}
	w.apply(changes)
}

func (w *world) apply(changes []dataplane.Change) {
	w.t.Helper()
	w.applyUnread(changes)
	w.checkRead("apply")
}

// applyUnread is apply without the check, for as many changes a second as there
// can be.
func (w *world) applyUnread(changes []dataplane.Change) {
	w.t.Helper()
	if err := w.dp.Apply(w.t.Context(), changes); err != nil {
		w.t.Fatalf("apply: %v", err)
	}
	for _, c := range changes {
		if c.New == nil {
			delete(w.held, c.Old.Key)
		} else {
			w.held[c.New.Key] = c.New
		}
	}
}

func (w *world) checkRead(after string) {
	w.t.Helper()
	got, err := w.dp.Read(w.t.Context())
	if err != nil {
		w.t.Fatalf("read after %s: %v", after, err)
	}
	want := dataplane.StateOf(maps.Values(w.held))
	if !want.Equal(got) {
		w.t.Fatalf("the kernel does not hold what was programmed by %s:\n%s", after, want.Diff(got))
	}
}

// restart closes the Dataplane, as the program does when it stops, and opens
// another, which is then told what there is.
func (w *world) restart() {
	w.t.Helper()
	if err := w.dp.Close(); err != nil {
		w.t.Fatalf("close the Dataplane: %v", err)
	}
	w.dp = w.open(w.t, w.net.Node.Fd())
	w.checkRead("a restart")
	w.replace(slices.Collect(maps.Values(w.held))...)
}

// connect connects and asks once. It waits for longer than a sane machine
// needs, but not so long that a backend which loses everything takes hours.
func connect(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort) (nettest.Answer, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	return from.Connect(ctx, network(protocol), addr)
}

// outOfStep is for how long at most a client pauses to come in at another time than
// those that connect beside it.
const outOfStep = 20 * time.Millisecond

// enough returns how many connections reach each of k endpoints but once in
// 10^9 times, when they are distributed at random.
func enough(k int) int { return int(math.Ceil(float64(k) * (math.Log(float64(k)) + math.Log(1e9)))) }

// expect checks that connections to addr reach all endpoints and nothing else,
// or are refused if there are none. It returns the answers.
func expect(
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
	for n := enough(len(endpoints)); len(answers) < n || len(missing) > 0 && len(answers) < 3*n; {
		if len(answers) >= n {
			// Endpoints may be taken in turn, by several clients that keep step.
			time.Sleep(rand.N(outOfStep)) //nolint:gosec // no secret
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
	if answer, err := from.Connect(ctx, network(protocol), addr); !errors.Is(err, nettest.ErrRefused) {
		t.Errorf("a connection from %s to %s/%s: answer %+v, error %v, want it refused", from.Name, addr, protocol, answer, err)
	}
}

// expectDropped checks that nobody answers a connection to addr, not even to
// refuse it.
func expectDropped(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), retransmission/2)
	defer cancel()
	if answer, err := from.Connect(ctx, network(protocol), addr); !errors.Is(err, nettest.ErrTimeout) {
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
