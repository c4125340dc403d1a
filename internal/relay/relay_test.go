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
	nodePort   = 30080 // in the network namespaces of the tests
	targetPort = 8080
)

// waitTimeout bounds the wait for events that normally take milliseconds.
const waitTimeout = 30 * time.Second

// node is a node with a Relay and pods.
type node struct {
	*nettest.Network

	relay *relay.Relay
	log   *logBuffer
	stop  func() // stops the Relay and waits until Run returns
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

// newNode starts a Relay for both families on a node.
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
			t.Error("Run does not return")
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

// loopbackAddr returns the address that clients connect to.
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

// endpointsOn returns endpoints at targetPort of the hosts.
func endpointsOn(f dataplane.Family, hosts ...*nettest.Host) []dataplane.Endpoint {
	endpoints := []dataplane.Endpoint{}
	for _, h := range hosts {
		endpoints = append(endpoints, dataplane.Endpoint{Addr: netip.AddrPortFrom(addrOf(h, f), targetPort)})
	}
	return endpoints
}

// newNodePort returns the node port of a Service.
func newNodePort(t *testing.T, f dataplane.Family, name string, port uint16, spec dataplane.ServiceSpec) *dataplane.Service {
	t.Helper()
	unspecified := netip.IPv4Unspecified()
	if f == dataplane.IPv6 {
		unspecified = netip.IPv6Unspecified()
	}
	svc, err := dataplane.NewService(dataplane.Key{Namespace: "default", Name: name, Family: f, Kind: dataplane.NodePort},
		[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(unspecified, port)}}, spec)
	if err != nil {
		t.Fatal(err)
	}
	return svc
}

// commit reports a changed Service to the Relay.
func (n *node) commit(before, after *dataplane.Service) {
	n.relay.OnCommit(sync.Commit{Op: sync.OpApply, Changes: []dataplane.Change{{Old: before, New: after}}})
}

// waitListeners waits until the Relay listens on the given number of node ports of a family.
func (n *node) waitListeners(t *testing.T, f dataplane.Family, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d listeners", want), func() bool { return n.relay.Stats(f).Listeners == want })
}

func eventually(t *testing.T, condition string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(waitTimeout); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timed out waiting for: %s", condition)
		}
	}
}

// dial connects from the node.
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

// withDeadline sets a deadline on conn and closes it at the end of the test.
func withDeadline(t *testing.T, conn net.Conn) *net.TCPConn {
	t.Helper()
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(waitTimeout)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// readError connects, sends nothing, and returns the error of connecting or reading, if any:
// a reset may arrive before the client knows that it is connected.
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

// checkRefused fails the test unless the kernel refuses the connection.
func (n *node) checkRefused(t *testing.T, addr netip.AddrPort) {
	t.Helper()
	conn, err := n.Node.Dial(t.Context(), "tcp", addr)
	if err == nil {
		_ = conn.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connect to %s: %v, want ECONNREFUSED", addr, err)
	}
}

// connectPair returns both ends of a relayed connection: the client's and the pod's.
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

// TestConnectReachesEveryPod checks that a client on the node reaches every pod of a Service,
// and that the pods see an address of the node.
func TestConnectReachesEveryPod(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{})
		pods := []*nettest.Host{n.PodT(t, "a"), n.PodT(t, "b"), n.PodT(t, "c")}
		for _, p := range pods {
			p.ServeT(t, nettest.TCP, targetPort)
		}
		n.checkRefused(t, loopbackAddr(f, nodePort)) // not programmed yet
		n.commit(nil, newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, pods...)}))
		n.waitListeners(t, f, 1)
		reached := map[string]bool{}
		clients := uint64(0)
		for ; len(reached) < len(pods) && clients < 1000; clients++ {
			answer, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort))
			if err != nil {
				t.Fatal(err)
			}
			reached[answer.Host] = true
			if !slices.Contains(n.Node.Addrs(), answer.Source.Addr()) && !strings.HasPrefix(answer.Source.Addr().String(), "169.254.") {
				t.Fatalf("a pod saw the client address %s, which is not an address of the node", answer.Source)
			}
		}
		if len(reached) < len(pods) {
			t.Errorf("%d clients reached only %v", clients, reached)
		}
		eventually(t, "no open connections", func() bool { return n.relay.Stats(f).Open == 0 })
		if got, want := n.relay.Stats(f), (relay.Stats{Listeners: 1, Connected: clients, Limit: 4096}); got != want {
			t.Errorf("stats %+v, want %+v", got, want)
		}
		if n.log.String() != "" {
			t.Errorf("log: %s", n.log)
		}
	})
}

// TestConnectionRefused checks that the kernel refuses connections to node ports that the
// Relay does not serve: without endpoints, without a Service, in a disabled family, and of
// other kinds and protocols.
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
		n.relay.SetFamilies(families()...) // including changes made in the meantime
		n.waitListeners(t, f, 1)
		if _, err := n.Node.Connect(t.Context(), nettest.TCP, addr); err != nil {
			t.Error(err)
		}
	})
}

// TestExternalTrafficPolicyLocal checks that with externalTrafficPolicy Local the node
// reaches the pods of the whole cluster, as it does at its own address.
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

// TestNodePortChangesOwner moves a node port between Services. The order of the changes in a
// commit does not matter.
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
	waitServedBy := func(want string) {
		t.Helper()
		eventually(t, "served by "+want, func() bool {
			answer, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort))
			if err != nil {
				t.Fatal(err) // the port must never close
			}
			return answer.Host == want
		})
	}
	waitServedBy("a")
	n.relay.OnCommit(sync.Commit{Changes: []dataplane.Change{{New: second}, {Old: first}}})
	waitServedBy("b")
	n.relay.OnCommit(sync.Commit{Changes: []dataplane.Change{{Old: second}, {New: first}}})
	waitServedBy("a")
	// The new Service gets the port even if the old one fails to give it up.
	n.commit(nil, second)
	waitServedBy("b")
	n.commit(first, nil)
	n.commit(nil, newNodePort(t, f, "c", nodePort+2, dataplane.ServiceSpec{Endpoints: endpointsOn(f, a)}))
	n.waitListeners(t, f, 2) // the Relay has handled the removal
	waitServedBy("b")
	n.relay.OnCommit(sync.Commit{Changes: []dataplane.Change{{Old: second}, {New: first}}})
	waitServedBy("a")
	// The same Service moves to another node port.
	n.commit(first, newNodePort(t, f, "a", nodePort+1, dataplane.ServiceSpec{Endpoints: endpointsOn(f, a)}))
	eventually(t, "the new node port answers", func() bool {
		_, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort+1))
		return err == nil
	})
	n.waitListeners(t, f, 2)
	n.checkRefused(t, loopbackAddr(f, nodePort))
}

// TestHalfClose checks that either side can close its sending direction and still receive,
// and that all data arrives.
func TestHalfClose(t *testing.T) {
	t.Parallel()
	data := make([]byte, 4<<20)
	for i := range data {
		data[i] = byte(rand.IntN(256))
	}
	sendAll := func(t *testing.T, from, to *net.TCPConn) {
		t.Helper()
		go func() {
			if _, err := from.Write(data); err != nil {
				t.Errorf("write: %v", err)
			}
			if err := from.CloseWrite(); err != nil {
				t.Errorf("close the sending direction: %v", err)
			}
		}()
		got, err := io.ReadAll(to)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("read %d bytes of %d, equal: %t, error %v", len(got), len(data), bytes.Equal(got, data), err)
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
			sendAll(t, first, second)
			sendAll(t, second, first)
			eventually(t, "no open connections", func() bool { return n.relay.Stats(f).Open == 0 })
		}
	})
}

// TestResetForwarded checks that a reset of either side, which means that data is missing,
// reaches the other side as a reset and not as the end of the stream.
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
				t.Errorf("reset by the client: %t: read %q, error %v, want ECONNRESET", byClient, got, err)
			}
			eventually(t, "no open connections", func() bool { return n.relay.Stats(f).Open == 0 })
		}
	})
}

// TestConnectionsSurviveChanges checks that a connection survives the removal of its endpoint
// and of its Service, and the disabling of its family.
func TestConnectionsSurviveChanges(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{})
		client, pod := n.connectPair(t, f)
		checkWorks := func(after string) {
			t.Helper()
			if _, err := client.Write([]byte("x")); err != nil {
				t.Fatalf("after %s: %v", after, err)
			}
			if _, err := io.ReadFull(pod, make([]byte, 1)); err != nil {
				t.Fatalf("after %s: %v", after, err)
			}
		}
		checkWorks("connecting")
		with := newNodePort(t, f, "web", nodePort, dataplane.ServiceSpec{Endpoints: endpointsOn(f, n.Node)})
		n.commit(nil, with)
		checkWorks("removing the endpoint")
		n.commit(with, nil)
		n.waitListeners(t, f, 0)
		checkWorks("removing the Service")
		n.relay.SetFamilies()
		checkWorks("disabling the family")
		// An open connection does not prevent listening on its port again.
		n.relay.SetFamilies(families()...)
		n.commit(nil, with)
		n.waitListeners(t, f, 1)
		checkWorks("restoring everything")
		if got := n.relay.Stats(f).ListenFailures; got > 0 {
			t.Errorf("%d attempts to listen failed", got)
		}
	})
}

// TestEndpointRefusesConnection checks that the Relay skips endpoints that refuse the
// connection, and resets the client if all of them do.
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
			t.Error("Unreachable does not count the client")
		}
	})
}

// TestAffinity checks that all clients share an endpoint, and share another one when it is
// removed.
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

// TestPortInUse checks that a port in use is logged once, does not delay other ports, and is
// opened once it is free.
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
	spec := dataplane.ServiceSpec{Endpoints: endpointsOn(f, pod)}
	n.relay.OnCommit(sync.Commit{Changes: []dataplane.Change{
		{New: newNodePort(t, f, "web", nodePort, spec)}, {New: newNodePort(t, f, "other", nodePort+1, spec)},
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

// TestPortInUseNotRetriedAfterDelete checks that the Relay stops retrying a port whose
// Service was removed.
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

// TestMaxConnections checks that clients over the limit are reset, and that a free slot is
// used again.
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
		t.Errorf("the third client got %v, want ECONNRESET", err)
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

// TestHalfClosedTimeout checks that a connection that one side has closed is reset once no
// data moves in the other direction for the timeout.
func TestHalfClosedTimeout(t *testing.T) {
	t.Parallel()
	const timeout = 300 * time.Millisecond
	for _, test := range []struct {
		name     string
		byClient bool
		close    func(*net.TCPConn) error
	}{
		{"the client closes", true, (*net.TCPConn).Close},
		{"the client closes its sending direction", true, (*net.TCPConn).CloseWrite},
		{"the pod closes", false, (*net.TCPConn).Close},
		{"the pod closes its sending direction", false, (*net.TCPConn).CloseWrite},
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
					t.Fatalf("the end of the stream is not forwarded: %v", err)
				}
				eventually(t, "no open connections", func() bool { return n.relay.Stats(f).Open == 0 })
				if got := n.relay.Stats(f).HalfClosed; got != 1 {
					t.Errorf("HalfClosed is %d, want 1", got)
				}
				eventually(t, "the peer is reset", func() bool {
					_, err := to.Write([]byte("x"))
					return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
				})
			})
		})
	}
}

// TestHalfClosedWithProgress checks that a half-closed connection stays open while data moves
// in the other direction, however slowly: a client may send its whole request and then read
// for an hour.
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

// TestLeakingPodReleasesSlots checks that a pod that never closes its sockets does not hold
// slots forever after its clients have closed, and takes none from another node port.
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
	eventually(t, "clients are rejected", func() bool { return n.relay.Stats(f).RejectedByPortLimit > 0 })
	for range 20 {
		if _, err := n.Node.Connect(t.Context(), nettest.TCP, loopbackAddr(f, nodePort+1)); err != nil {
			t.Fatalf("the other node port: %v", err)
		}
	}
	eventually(t, "one warning", func() bool { return strings.Count(n.log.String(), "level=WARN") == 1 })
	if log := n.log.String(); !strings.Contains(log, "node port holds its share of the connections") ||
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

// TestKeepAlive checks that an idle connection ends when the host of its endpoint is gone,
// and stays open otherwise.
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
			pod, err := l.Accept() // outlives its network namespace without closing
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
			t.Errorf("the connection to a pod that is gone: %v, want ECONNRESET", err)
		}
		eventually(t, "one connection", func() bool { return n.relay.Stats(f).Open == 1 })
		if err := kept.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := kept.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the idle connection to a live pod: %v", err)
		}
	})
}

// TestMaxListeners checks that sockets of node ports leave file descriptors for the rest of
// the program.
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

// TestShutdown checks that Run resets connections and closes the ports when its context is
// done, and that a client that waits for an endpoint does not delay it.
func TestShutdown(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(t *testing.T, f dataplane.Family) {
		n := newNode(t, relay.Options{})
		client, pod := n.connectPair(t, f)
		// The host outside the node drops packets to this address.
		unresponsive := dataplane.Endpoint{Addr: netip.MustParseAddrPort("198.51.100.1:80")}
		if f == dataplane.IPv6 {
			unresponsive = dataplane.Endpoint{Addr: netip.MustParseAddrPort("[2001:db8:9::1]:80")}
		}
		n.commit(nil, newNodePort(t, f, "unresponsive", nodePort+1, dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{unresponsive}}))
		n.waitListeners(t, f, 2)
		waiting := n.dial(t, loopbackAddr(f, nodePort+1))
		// Until the connection counts as connected, the Relay may not have dialed the pod
		// yet.
		eventually(t, "two connections", func() bool { return n.relay.Stats(f).Open == 2 && n.relay.Stats(f).Connected == 1 })
		n.stop()
		for name, conn := range map[string]*net.TCPConn{"client": client, "pod": pod, "waiting client": waiting} {
			if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: %v, want ECONNRESET", name, err)
			}
		}
		n.checkRefused(t, loopbackAddr(f, nodePort))
		if got := n.relay.Stats(f); got.Listeners != 0 || got.Open != 0 {
			t.Errorf("stats %+v", got)
		}
	})
}
