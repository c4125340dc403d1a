package relay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	stdsync "sync"
	"syscall"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/relay"
	"fairlead.io/fairlead/sync"
)

const (
	nodePort   = 30080 // in namespaces of the tests' own
	targetPort = 8080
)

// waitTimeout is how long a test waits for what comes in a moment.
const waitTimeout = 30 * time.Second

// node is a node with a Relay and pods.
type node struct {
	*nettest.Network

	relay *relay.Relay
	log   *logBuffer
	stop  func() // ends the Relay and waits for it
}

type logBuffer struct {
	mu stdsync.Mutex
	b  bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// newNode starts a Relay on a node, for both families.
func newNode(t *testing.T, opts relay.Options) *node {
	t.Helper()
	n := &node{Network: nettest.NewT(t, nettest.Options{}), log: &logBuffer{}}
	opts.Listen, opts.Dial = n.Node.Listen, n.Node.Dial
	opts.Logger = slog.New(slog.NewTextHandler(n.log, nil))
	n.relay = relay.New(opts)
	n.relay.SetFamilies(families()...)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.relay.Run(ctx) }()
	n.stop = stdsync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(waitTimeout):
			t.Error("Run does not end")
		}
	})
	t.Cleanup(n.stop)
	return n
}

func families() []dataplane.Family { return []dataplane.Family{dataplane.IPv4, dataplane.IPv6} }

// eachFamily runs a test for both families.
func eachFamily(t *testing.T, test func(*testing.T, dataplane.Family)) {
	t.Helper()
	for _, f := range families() {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			test(t, f)
		})
	}
}

// loopbackAddr returns where clients connect.
func loopbackAddr(f dataplane.Family, port uint16) netip.AddrPort {
	if f == dataplane.IPv4 {
		return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	}
	return netip.AddrPortFrom(netip.IPv6Loopback(), port)
}

func addrOf(h *nettest.Host, f dataplane.Family) netip.Addr {
	if f == dataplane.IPv4 {
		return h.IPv4
	}
	return h.IPv6
}

// endpointsOn returns endpoints at targetPort of hosts.
func endpointsOn(f dataplane.Family, hosts ...*nettest.Host) []dataplane.Endpoint {
	endpoints := []dataplane.Endpoint{}
	for _, h := range hosts {
		endpoints = append(endpoints, dataplane.Endpoint{Addr: netip.AddrPortFrom(addrOf(h, f), targetPort)})
	}
	return endpoints
}

// newNodePort returns the node port of a Service.
func newNodePort(t *testing.T, f dataplane.Family, name string, port uint16, treatment dataplane.ServiceSpec) *dataplane.Service {
	t.Helper()
	unspecified := netip.IPv4Unspecified()
	if f == dataplane.IPv6 {
		unspecified = netip.IPv6Unspecified()
	}
	svc, err := dataplane.NewService(dataplane.Key{Namespace: "default", Name: name, Family: f, Kind: dataplane.NodePort},
		[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(unspecified, port)}}, treatment)
	if err != nil {
		t.Fatal(err)
	}
	return svc
}

// commit tells the Relay that a Service has changed.
func (n *node) commit(was, is *dataplane.Service) {
	n.relay.OnCommit(sync.Commit{Op: sync.OpApply, Changes: []dataplane.Change{{Old: was, New: is}}})
}

// waitListeners waits until so many node ports of a family are listened on.
func (n *node) waitListeners(t *testing.T, f dataplane.Family, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d listeners", want), func() bool { return n.relay.Stats(f).Listeners == want })
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(waitTimeout); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// dial connects a client on the node.
func (n *node) dial(t *testing.T, addr netip.AddrPort) *net.TCPConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitTimeout)
	defer cancel()
	conn, err := n.Node.Dial(ctx, "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return withDeadline(t, conn)
}

// withDeadline returns a connection that does not block for ever.
func withDeadline(t *testing.T, conn net.Conn) *net.TCPConn {
	t.Helper()
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(waitTimeout)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// readError connects a client that says nothing, and returns the error that it
// gets, if any: a reset may come before it knows that it is connected.
func (n *node) readError(t *testing.T, addr netip.AddrPort) error {
	t.Helper()
	conn, err := n.Node.Dial(t.Context(), "tcp", addr)
	if err != nil {
		return err
	}
	client := withDeadline(t, conn)
	_ = client.CloseWrite()
	_, err = io.ReadAll(client)
	return err
}

// checkRefused fails the test unless the kernel refuses a client.
func (n *node) checkRefused(t *testing.T, addr netip.AddrPort) {
	t.Helper()
	conn, err := n.Node.Dial(t.Context(), "tcp", addr)
	if err == nil {
		_ = conn.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connect to %s: %v, want it refused", addr, err)
	}
}

// connectPair returns both ends of a connection through the Relay, of which a pod
// accepts the other.
func (n *node) connectPair(t *testing.T, f dataplane.Family) (client, pod *net.TCPConn) {
	t.Helper()
	host := n.PodT(t, "pod")
	l, err := host.Listen(t.Context(), "tcp", netip.AddrPortFrom(addrOf(host, f), targetPort))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n.commit(nil, newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, host)}))
	n.waitListeners(t, f, 1)
	client = n.dial(t, loopbackAddr(f, nodePort))
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return client, withDeadline(t, conn)
}

// A client on the node reaches every pod of a Service, and the pods see the
// node's address.
func TestConnectReachesEveryPod(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{})
		pods := []*nettest.Host{n.PodT(t, "a"), n.PodT(t, "b"), n.PodT(t, "c")}
		for _, p := range pods {
			p.ServeT(t, nettest.TCP, targetPort)
		}
		n.checkRefused(t, loopbackAddr(f, nodePort)) // nothing is programmed yet
		n.commit(nil, newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, pods...)}))
		n.waitListeners(t, f, 1)
		met := map[string]bool{}
		clients := uint64(0)
		for ; len(met) < len(pods) && clients < 1000; clients++ {
			answer, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort))
			if err != nil {
				t.Fatal(err)
			}
			met[answer.Host] = true
			if !slices.Contains(n.Node.Addrs(), answer.Source.Addr()) && !strings.HasPrefix(answer.Source.Addr().String(), "169.254.") {
				t.Fatalf("a pod saw %s, which is no address of the node", answer.Source)
			}
		}
		if len(met) < len(pods) {
			t.Errorf("%d clients met only %v", clients, met)
		}
		eventually(t, "no connection is open", func() bool { return n.relay.Stats(f).Open == 0 })
		if got, want := n.relay.Stats(f), (relay.Stats{Listeners: 1, Connected: clients, Limit: 4096}); got != want {
			t.Errorf("stats %+v, want %+v", got, want)
		}
		if n.log.String() != "" {
			t.Errorf("log: %s", n.log)
		}
	})
}

// A node port that nobody serves is refused by the kernel: without endpoints,
// without its Service, in a family that is off, and of other kinds and protocols.
func TestConnectionRefused(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{})
		pod := n.PodT(t, "pod")
		pod.ServeT(t, nettest.TCP, targetPort)
		served := newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, pod)})
		empty := newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{})
		local := newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{ExternalTrafficPolicyLocal: true, LocalEndpoints: endpointsOn(f, pod), NoEndpointsVerdict: dataplane.Drop})
		udp := *served
		udp.Frontends = []dataplane.Frontend{{Protocol: dataplane.UDP, Addr: served.Frontends[0].Addr}}
		external := *served
		external.Key.Kind = dataplane.ExternalIP
		addr := loopbackAddr(f, nodePort)
		for _, svc := range []*dataplane.Service{empty, local, &udp, &external, nil} {
			n.commit(nil, served)
			n.waitListeners(t, f, 1)
			if _, err := n.Node.Connect(t.Context(), nettest.TCP, addr); err != nil {
				t.Fatal(err)
			}
			if svc != nil && svc.Key.Kind != dataplane.NodePort {
				n.commit(served, nil)
				n.commit(nil, svc)
			} else {
				n.commit(served, svc)
			}
			n.waitListeners(t, f, 0)
			n.checkRefused(t, addr)
			n.commit(svc, nil)
		}
		n.commit(nil, served)
		n.waitListeners(t, f, 1)
		n.relay.SetFamilies(slices.DeleteFunc(families(), func(other dataplane.Family) bool { return other == f })...)
		n.waitListeners(t, f, 0)
		n.checkRefused(t, addr)
		n.relay.SetFamilies(families()...) // what was told meanwhile, and before, counts
		n.waitListeners(t, f, 1)
		if _, err := n.Node.Connect(t.Context(), nettest.TCP, addr); err != nil {
			t.Error(err)
		}
	})
}

// With externalTrafficPolicy Local the node reaches the pods of the cluster, as
// at its own address.
func TestExternalTrafficPolicyLocal(t *testing.T) {
	t.Parallel()
	const f = dataplane.IPv4
	n := newNode(t, relay.Options{})
	here, there := n.PodT(t, "here"), n.PodT(t, "there")
	there.ServeT(t, nettest.TCP, targetPort)
	n.commit(nil, newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{
		Endpoints: endpointsOn(f, there), ExternalTrafficPolicyLocal: true, LocalEndpoints: endpointsOn(f, here),
	}))
	n.waitListeners(t, f, 1)
	if answer, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort)); err != nil || answer.Host != "there" {
		t.Errorf("answer %+v, error %v", answer, err)
	}
}

// A commit that failed as a whole has changed nothing, and one in which a node
// port goes from one Service to another ends with the latter, in whatever order
// its changes are.
func TestNodePortChangesOwner(t *testing.T) {
	t.Parallel()
	const f = dataplane.IPv4
	n := newNode(t, relay.Options{})
	a, b := n.PodT(t, "a"), n.PodT(t, "b")
	a.ServeT(t, nettest.TCP, targetPort)
	b.ServeT(t, nettest.TCP, targetPort)
	first := newNodePort(t, f, "a", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, a)})
	second := newNodePort(t, f, "b", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, b)})
	n.commit(nil, first)
	n.waitListeners(t, f, 1)
	owned := func(want string) {
		t.Helper()
		eventually(t, "served by "+want, func() bool {
			answer, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort))
			if err != nil {
				t.Fatal(err) // it is listened on without a break
			}
			return answer.Host == want
		})
	}
	owned("a")
	n.relay.OnCommit(sync.Commit{Changes: []dataplane.Change{{New: second}, {Old: first}}})
	owned("b")
	n.relay.OnCommit(sync.Commit{Changes: []dataplane.Change{{Old: second}, {New: first}}})
	owned("a")
	// What the Service that had it fails to give up, the other has all the same.
	n.commit(nil, second)
	owned("b")
	n.commit(first, nil)
	n.commit(nil, newNodePort(t, f, "c", nodePort+2, dataplane.ServiceSpec{Endpoints: endpointsOn(f, a)}))
	n.waitListeners(t, f, 2) // and so the Relay knows that the Service has left
	owned("b")
	n.relay.OnCommit(sync.Commit{Changes: []dataplane.Change{{Old: second}, {New: first}}})
	owned("a")
	// The same Service at another node port.
	n.commit(first, newNodePort(t, f, "a", nodePort+1, dataplane.ServiceSpec{Endpoints: endpointsOn(f, a)}))
	eventually(t, "the other node port", func() bool {
		_, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort+1))
		return err == nil
	})
	n.waitListeners(t, f, 2)
	n.checkRefused(t, loopbackAddr(f, nodePort))
}

// Either side may say all and go on listening, and all that is said arrives.
func TestHalfClose(t *testing.T) {
	t.Parallel()
	said := make([]byte, 4<<20)
	for i := range said {
		said[i] = byte(rand.IntN(256))
	}
	say := func(t *testing.T, from, to *net.TCPConn) {
		t.Helper()
		go func() {
			if _, err := from.Write(said); err != nil {
				t.Errorf("write: %v", err)
			}
			if err := from.CloseWrite(); err != nil {
				t.Errorf("close one direction: %v", err)
			}
		}()
		got, err := io.ReadAll(to)
		if err != nil || !bytes.Equal(got, said) {
			t.Errorf("read %d bytes of %d, equal: %t, error %v", len(got), len(said), bytes.Equal(got, said), err)
		}
	}
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		for _, clientFirst := range []bool{true, false} {
			n := newNode(t, relay.Options{})
			client, pod := n.connectPair(t, f)
			first, second := pod, client
			if clientFirst {
				first, second = client, pod
			}
			say(t, first, second)
			say(t, second, first)
			eventually(t, "no connection is open", func() bool { return n.relay.Stats(f).Open == 0 })
		}
	})
}

// A reset of either side, which says that something is missing, is not passed on
// as an end.
func TestResetForwarded(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		for _, byClient := range []bool{true, false} {
			n := newNode(t, relay.Options{})
			client, pod := n.connectPair(t, f)
			from, to := pod, client
			if byClient {
				from, to = client, pod
			}
			if err := errors.Join(from.SetLinger(0), from.Close()); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(to); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("by the client: %t: read %q, error %v, want a reset", byClient, got, err)
			}
			eventually(t, "no connection is open", func() bool { return n.relay.Stats(f).Open == 0 })
		}
	})
}

// A connection outlives its endpoint's place in the Service, the Service, and
// the family.
func TestConnectionsSurviveChanges(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{})
		client, pod := n.connectPair(t, f)
		works := func(after string) {
			t.Helper()
			if _, err := client.Write([]byte("x")); err != nil {
				t.Fatalf("after %s: %v", after, err)
			}
			if _, err := io.ReadFull(pod, make([]byte, 1)); err != nil {
				t.Fatalf("after %s: %v", after, err)
			}
		}
		works("the beginning")
		with := newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, n.Node)})
		n.commit(nil, with)
		works("the endpoint left")
		n.commit(with, nil)
		n.waitListeners(t, f, 0)
		works("the Service left")
		n.relay.SetFamilies()
		works("the family was switched off")
		// Nor does it keep the port from being listened on again.
		n.relay.SetFamilies(families()...)
		n.commit(nil, with)
		n.waitListeners(t, f, 1)
		works("all came back")
		if got := n.relay.Stats(f).ListenFailures; got > 0 {
			t.Errorf("%d attempts to listen failed", got)
		}
	})
}

// An endpoint that refuses is passed over; if all do, the client is reset.
func TestEndpointRefusesConnection(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{})
		good, bad, worse := n.PodT(t, "good"), n.PodT(t, "bad"), n.PodT(t, "worse")
		good.ServeT(t, nettest.TCP, targetPort)
		for _, affinity := range []time.Duration{0, time.Hour} {
			n.commit(nil, newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, good, bad, worse), Affinity: affinity}))
			n.waitListeners(t, f, 1)
			for range 20 {
				if _, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort)); err != nil {
					t.Fatalf("affinity %s: %v", affinity, err)
				}
			}
		}
		n.commit(nil, newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, bad, worse)}))
		eventually(t, "a client is reset", func() bool {
			return errors.Is(n.readError(t, loopbackAddr(f, nodePort)), syscall.ECONNRESET)
		})
		if got := n.relay.Stats(f).Unreachable; got == 0 {
			t.Error("the client is not counted")
		}
	})
}

// All clients share an endpoint, and another when it leaves.
func TestAffinity(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{})
		pods := map[string]*nettest.Host{}
		for _, name := range []string{"a", "b", "c", "d"} {
			pods[name] = n.PodT(t, name)
			pods[name].ServeT(t, nettest.TCP, targetPort)
		}
		program := func() {
			var hosts []*nettest.Host
			for _, p := range pods {
				hosts = append(hosts, p)
			}
			n.commit(nil, newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, hosts...), Affinity: time.Hour}))
			n.waitListeners(t, f, 1)
		}
		ask := func() string {
			t.Helper()
			answer, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort))
			if err != nil {
				t.Fatal(err)
			}
			return answer.Host
		}
		program()
		first := ask()
		for range 20 {
			if got := ask(); got != first {
				t.Fatalf("%s after %s", got, first)
			}
		}
		delete(pods, first)
		program()
		var second string
		eventually(t, "another endpoint", func() bool { second = ask(); return second != first })
		for range 20 {
			if got := ask(); got != second {
				t.Fatalf("%s after %s", got, second)
			}
		}
	})
}

// A port that is taken is told of once, holds no other up, and is served when it
// is free.
func TestPortInUse(t *testing.T) {
	t.Parallel()
	const f = dataplane.IPv4
	n := newNode(t, relay.Options{})
	pod := n.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, targetPort)
	taken, err := n.Node.Listen(t.Context(), "tcp4", loopbackAddr(f, nodePort))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	treatment := dataplane.ServiceSpec{Endpoints: endpointsOn(f, pod)}
	n.relay.OnCommit(sync.Commit{Changes: []dataplane.Change{
		{New: newNodePort(t, f, "web", nodePort, treatment)}, {New: newNodePort(t, f, "other", nodePort+1, treatment)},
	}})
	n.waitListeners(t, f, 1)
	if _, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort+1)); err != nil {
		t.Error(err)
	}
	eventually(t, "more attempts", func() bool { return n.relay.Stats(f).ListenFailures >= 3 })
	if got := n.relay.Stats(f); got.Failing != 1 || got.Listeners != 1 {
		t.Errorf("stats %+v", got)
	}
	if log := n.log.String(); strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, "address=127.0.0.1:30080 service=default/web") {
		t.Errorf("log:\n%s", log)
	}
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	n.waitListeners(t, f, 2)
	if got := n.relay.Stats(f); got.Failing != 0 {
		t.Errorf("stats %+v", got)
	}
	if _, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort)); err != nil {
		t.Error(err)
	}
	if log := n.log.String(); !strings.Contains(log, "level=INFO") {
		t.Errorf("log:\n%s", log)
	}
}

// A port that is taken is not tried again once nobody wants it.
func TestPortInUseNotRetriedAfterDelete(t *testing.T) {
	t.Parallel()
	const f = dataplane.IPv4
	n := newNode(t, relay.Options{})
	taken, err := n.Node.Listen(t.Context(), "tcp4", loopbackAddr(f, nodePort))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	svc := newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, n.Node)})
	n.commit(nil, svc)
	eventually(t, "a failure", func() bool { return n.relay.Stats(f).Failing == 1 })
	n.commit(svc, nil)
	eventually(t, "no failure", func() bool { return n.relay.Stats(f).Failing == 0 })
}

// There are no more connections than allowed; others are reset, and a place that
// is free again is used.
func TestMaxConnections(t *testing.T) {
	t.Parallel()
	const f = dataplane.IPv4
	n := newNode(t, relay.Options{MaxConnections: 2})
	pod := n.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, targetPort)
	n.commit(nil, newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, pod)}))
	n.waitListeners(t, f, 1)
	addr := loopbackAddr(f, nodePort)
	first := n.dial(t, addr)
	n.dial(t, addr)
	eventually(t, "two connections", func() bool { return n.relay.Stats(f).Connected == 2 })
	if err := n.readError(t, addr); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the third client got %v, want a reset", err)
	}
	if got := n.relay.Stats(f); got.RejectedByLimit != 1 || got.Open != 2 {
		t.Errorf("stats %+v", got)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one connection", func() bool { return n.relay.Stats(f).Open == 1 })
	if _, err := n.Node.Connect(t.Context(), nettest.TCP, addr); err != nil {
		t.Error(err)
	}
}

// A connection that one side has closed ends with a reset when nothing moves in
// the other direction any more, and not before.
func TestHalfClosedTimeout(t *testing.T) {
	t.Parallel()
	const timeout = 300 * time.Millisecond
	for _, test := range []struct {
		name     string
		byClient bool
		close    func(*net.TCPConn) error
	}{
		{"the client closes", true, (*net.TCPConn).Close},
		{"the client closes one direction", true, (*net.TCPConn).CloseWrite},
		{"the pod closes", false, (*net.TCPConn).Close},
		{"the pod closes one direction", false, (*net.TCPConn).CloseWrite},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			eachFamily(t, func(t *testing.T, f dataplane.Family) {
				n := newNode(t, relay.Options{HalfClosedTimeout: timeout})
				client, pod := n.connectPair(t, f)
				from, to := pod, client
				if test.byClient {
					from, to = client, pod
				}
				if err := test.close(from); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadAll(to); err != nil && !errors.Is(err, syscall.ECONNRESET) {
					t.Fatalf("the end of the stream is not passed on: %v", err)
				}
				eventually(t, "no connection is open", func() bool { return n.relay.Stats(f).Open == 0 })
				if got := n.relay.Stats(f).HalfClosed; got != 1 {
					t.Errorf("%d connections are counted as half closed for too long, want 1", got)
				}
				eventually(t, "the peer is reset", func() bool {
					_, err := to.Write([]byte("x"))
					return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
				})
			})
		})
	}
}

// A half-closed connection stays as long as the other direction moves, however
// slowly and however long: a client may say all that it asks for, and read for an hour.
func TestHalfClosedWithProgress(t *testing.T) {
	t.Parallel()
	const timeout = 2 * time.Second
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{HalfClosedTimeout: timeout})
		client, pod := n.connectPair(t, f)
		if err := client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		one := make([]byte, 1)
		for end := time.Now().Add(2 * timeout); time.Now().Before(end); time.Sleep(timeout / 20) {
			if _, err := pod.Write(one); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(client, one); err != nil {
				t.Fatal(err)
			}
		}
		if got := n.relay.Stats(f); got.Open != 1 || got.HalfClosed != 0 {
			t.Errorf("stats %+v", got)
		}
	})
}

// Clients that close while the pod never does, as a program that leaks sockets,
// take no slots for ever, and none of another node port's.
func TestLeakingPodReleasesSlots(t *testing.T) {
	t.Parallel()
	const f = dataplane.IPv4
	n := newNode(t, relay.Options{MaxConnections: 16, HalfClosedTimeout: 3 * time.Second})
	leaking, good := n.PodT(t, "leaking"), n.PodT(t, "good")
	good.ServeT(t, nettest.TCP, targetPort)
	l, err := leaking.Listen(t.Context(), "tcp", netip.AddrPortFrom(addrOf(leaking, f), targetPort))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = conn.Close() })
		}
	}()
	n.relay.OnCommit(sync.Commit{Changes: []dataplane.Change{
		{New: newNodePort(t, f, "leaking", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, leaking)})},
		{New: newNodePort(t, f, "good", nodePort+1, dataplane.ServiceSpec{Endpoints: endpointsOn(f, good)})},
	}})
	n.waitListeners(t, f, 2)
	for range 50 {
		conn, err := n.Node.Dial(t.Context(), "tcp", loopbackAddr(f, nodePort))
		if err == nil {
			_ = conn.Close()
		}
	}
	eventually(t, "clients are refused", func() bool { return n.relay.Stats(f).RejectedByPortLimit > 0 })
	for range 20 {
		if _, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort+1)); err != nil {
			t.Fatalf("the other node port: %v", err)
		}
	}
	eventually(t, "one warning", func() bool { return strings.Count(n.log.String(), "level=WARN") == 1 })
	if log := n.log.String(); !strings.Contains(log, "it has its share of the connections") ||
		!strings.Contains(log, "address=127.0.0.1:30080 service=default/leaking") || !strings.Contains(log, "limit=16") {
		t.Errorf("log:\n%s", log)
	}
	eventually(t, "the slots are free", func() bool { return n.relay.Stats(f).Open == 0 })
	before := n.relay.Stats(f)
	n.dial(t, loopbackAddr(f, nodePort))
	eventually(t, "a client is connected", func() bool { return n.relay.Stats(f).Connected > before.Connected })
	if before.HalfClosed == 0 || before.RejectedByLimit != 0 {
		t.Errorf("stats %+v", before)
	}
}

// A silent connection ends when the host of its endpoint is gone, and stays while
// it is there.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{KeepAlive: net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 1}})
		gone, there := n.PodT(t, "gone"), n.PodT(t, "there")
		clients := map[*nettest.Host]*net.TCPConn{}
		for port, host := range map[uint16]*nettest.Host{nodePort: gone, nodePort + 1: there} {
			l, err := host.Listen(t.Context(), "tcp", netip.AddrPortFrom(addrOf(host, f), targetPort))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			n.commit(nil, newNodePort(t, f, host.Name, port, dataplane.ServiceSpec{Endpoints: endpointsOn(f, host)}))
			eventually(t, "listening", func() bool {
				conn, err := n.Node.Dial(t.Context(), "tcp", loopbackAddr(f, port))
				if err == nil {
					clients[host] = withDeadline(t, conn)
				}
				return err == nil
			})
			pod, err := l.Accept() // which outlives its network, and says nothing of it
			if err != nil {
				t.Fatal(err)
			}
			defer pod.Close()
		}
		lost, kept := clients[gone], clients[there]
		if err := gone.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(lost); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v, want a reset", err)
		}
		eventually(t, "one connection", func() bool { return n.relay.Stats(f).Open == 1 })
		if err := kept.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := kept.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the silent connection to a live pod: %v", err)
		}
	})
}

// Sockets of node ports leave files for other parts of the program.
func TestMaxListeners(t *testing.T) {
	t.Parallel()
	const f = dataplane.IPv4
	n := newNode(t, relay.Options{MaxListeners: 1})
	pod := n.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, targetPort)
	first := newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, pod)})
	n.commit(nil, first)
	n.waitListeners(t, f, 1)
	n.commit(nil, newNodePort(t, f, "other", nodePort+1, dataplane.ServiceSpec{Endpoints: endpointsOn(f, pod)}))
	eventually(t, "a failure", func() bool { return n.relay.Stats(f).Failing == 1 })
	if log := n.log.String(); !strings.Contains(log, "RLIMIT_NOFILE") || !strings.Contains(log, "service=default/other") {
		t.Errorf("log:\n%s", log)
	}
	n.commit(first, nil)
	n.waitListeners(t, f, 0)
	n.waitListeners(t, f, 1)
	if _, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort+1)); err != nil {
		t.Error(err)
	}
}

// The end resets connections and frees the ports; a client that waits for an
// endpoint does not hold it up.
func TestShutdown(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{})
		client, pod := n.connectPair(t, f)
		// Nobody answers for an address that the outside host drops.
		silent := dataplane.Endpoint{Addr: netip.MustParseAddrPort("198.51.100.1:80")}
		if f == dataplane.IPv6 {
			silent = dataplane.Endpoint{Addr: netip.MustParseAddrPort("[2001:db8:9::1]:80")}
		}
		n.commit(nil, newNodePort(t, f, "silent", nodePort+1, dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{silent}}))
		n.waitListeners(t, f, 2)
		waiting := n.dial(t, loopbackAddr(f, nodePort+1))
		// Before it counts as connected, the Relay may not know the pod's connection yet.
		eventually(t, "two connections", func() bool { return n.relay.Stats(f).Open == 2 && n.relay.Stats(f).Connected == 1 })
		n.stop()
		for name, conn := range map[string]*net.TCPConn{"client": client, "pod": pod, "client that waits": waiting} {
			if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: %v, want a reset", name, err)
			}
		}
		n.checkRefused(t, loopbackAddr(f, nodePort))
		if got := n.relay.Stats(f); got.Listeners != 0 || got.Open != 0 {
			t.Errorf("stats %+v", got)
		}
	})
}
