package health_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/internal/nettest"
)

// waitTimeout bounds the wait for events that take milliseconds, or one [health.RetryPeriod].
const waitTimeout = 15 * time.Second

func eventually(t *testing.T, check func() error) {
	t.Helper()
	for deadline := time.Now().Add(waitTimeout); ; time.Sleep(2 * time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("timed out after %s: %v", waitTimeout, err)
		}
	}
}

// node is a network whose node has health-check node ports.
type node struct {
	*nettest.Network

	t       *testing.T
	ports   *health.Ports
	healthy atomic.Bool
	stop    func() // cancels Run and waits until it returns

	mu           sync.Mutex
	listenErrors []string
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, Network: nettest.NewT(t, nettest.Options{})}
	n.healthy.Store(true)
	n.ports = health.NewPorts(health.PortsOptions{
		Healthy: n.healthy.Load,
		OnListenError: func(service health.Service, port uint16, err error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.listenErrors = append(n.listenErrors, fmt.Sprintf("%s %d %t", service, port, errors.Is(err, syscall.EADDRINUSE)))
		},
		Listen: func(ctx context.Context, network, address string) (net.Listener, error) {
			return n.Node.Listen(ctx, network, netip.MustParseAddrPort(address))
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.ports.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(n.stop)
	return n
}

func (n *node) setService(name string, port uint16, endpoints int) {
	n.ports.Set(map[health.Service]*health.Check{{Namespace: "shop", Name: name}: {Port: port, LocalEndpoints: endpoints}})
}

// request sends an HTTP request from the host outside, over a new connection.
func (n *node) request(method string, addr netip.Addr, port uint16, path string) (*http.Response, string, error) {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
		return n.Outside.Dial(ctx, "tcp", netip.MustParseAddrPort(address))
	}}
	request, err := http.NewRequestWithContext(n.t.Context(), method, "http://"+netip.AddrPortFrom(addr, port).String()+path, nil)
	if err != nil {
		return nil, "", err
	}
	response, err := (&http.Client{Transport: transport, Timeout: time.Second}).Do(request)
	if err != nil {
		return nil, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response, string(body), err
}

// await waits until the Service shop/NAME answers at an address with the given weight.
func (n *node) await(addr netip.Addr, port uint16, name string, weight int) {
	n.t.Helper()
	eventually(n.t, func() error {
		response, body, err := n.request(http.MethodGet, addr, port, "/")
		if err != nil {
			return err
		}
		if got := response.Header.Get("X-Load-Balancing-Endpoint-Weight"); got != fmt.Sprint(weight) || !strings.Contains(body, `"name": "`+name+`"`) {
			return fmt.Errorf("weight %s, want %d for %s; body %s", got, weight, name, body)
		}
		return nil
	})
}

// awaitRefused waits until connections to the address are refused.
func (n *node) awaitRefused(addr netip.Addr, port uint16) {
	n.t.Helper()
	eventually(n.t, func() error {
		_, body, err := n.request(http.MethodGet, addr, port, "/")
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		return fmt.Errorf("answer %q, error %w; want ECONNREFUSED", body, err)
	})
}

func unspecifiedAddrs() []netip.Addr {
	return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
}

// TestPortResponses checks status, header and body for all methods and paths.
func TestPortResponses(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.ports.SetAddrs(unspecifiedAddrs())
	n.setService("web", 30100, 0)
	n.await(n.Node.IPv4, 30100, "web", 0)
	tests := []struct {
		endpoints int
		healthy   bool
		want      int
	}{
		{0, true, 503},
		{1, true, 200},
		{3, true, 200},
		{3, false, 503},
		{0, false, 503},
	}
	for _, test := range tests {
		n.healthy.Store(test.healthy)
		n.setService("web", 30100, test.endpoints)
		n.await(n.Node.IPv4, 30100, "web", test.endpoints)
		for _, addr := range n.Node.Addrs() {
			for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodHead, "ANYTHING"} {
				for _, path := range []string{"/", "/healthz", "/any/path?at=all", "//"} {
					response, body, err := n.request(method, addr, 30100, path)
					if err != nil {
						t.Fatalf("%s %s at %s: %v", method, path, addr, err)
					}
					wantBody := fmt.Sprintf("{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n"+
						"\t\"localEndpoints\": %d,\n\t\"serviceProxyHealthy\": %t\n}", test.endpoints, test.healthy)
					if method == http.MethodHead {
						wantBody = ""
					}
					if diff := cmp.Diff(wantBody, body); diff != "" || response.StatusCode != test.want {
						t.Errorf("%s %s at %s with %+v: status %d, body (-want +got):\n%s", method, path, addr, test, response.StatusCode, diff)
					}
					header := response.Header
					header.Del("Date")
					header.Del("Content-Length")
					header.Del("Connection")
					want := http.Header{
						"Content-Type": {"application/json"}, "X-Content-Type-Options": {"nosniff"},
						"X-Load-Balancing-Endpoint-Weight": {fmt.Sprint(test.endpoints)},
					}
					if diff := cmp.Diff(want, header); diff != "" {
						t.Errorf("%s %s at %s: header (-want +got):\n%s", method, path, addr, diff)
					}
				}
			}
		}
	}
}

// TestPortsChangeOwner checks that a port is free as soon as its Service is removed or has
// another port.
func TestPortsChangeOwner(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.ports.SetAddrs(unspecifiedAddrs())
	n.setService("a", 30100, 1)
	n.setService("b", 30101, 2)
	n.await(n.Node.IPv6, 30100, "a", 1)
	n.await(n.Node.IPv6, 30101, "b", 2)
	for i := range 20 { // the Services exchange their ports in one call
		a, b := uint16(30100), uint16(30101)
		if i%2 == 0 {
			a, b = b, a
		}
		n.ports.Set(map[health.Service]*health.Check{
			{Namespace: "shop", Name: "a"}: {Port: a, LocalEndpoints: 1},
			{Namespace: "shop", Name: "b"}: {Port: b, LocalEndpoints: 2},
		})
		n.await(n.Node.IPv6, a, "a", 1)
		n.await(n.Node.IPv4, b, "b", 2)
	}
	n.ports.Set(map[health.Service]*health.Check{{Namespace: "shop", Name: "a"}: nil, {Namespace: "shop", Name: "never"}: nil})
	n.awaitRefused(n.Node.IPv4, 30100)
	n.await(n.Node.IPv4, 30101, "b", 2)
	if len(n.listenErrors) != 0 {
		t.Errorf("unexpected errors: %s", n.listenErrors)
	}
	n.stop()
	n.awaitRefused(n.Node.IPv4, 30101)
}

// TestSetAddrs checks that the addresses to listen on can change.
func TestSetAddrs(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.setService("web", 30100, 1)
	n.awaitRefused(n.Node.IPv4, 30100)
	n.ports.SetAddrs([]netip.Addr{n.Node.IPv4, netip.MustParseAddr("fe80::1")})
	n.await(n.Node.IPv4, 30100, "web", 1)
	n.awaitRefused(n.Node.IPv6, 30100)
	n.ports.SetAddrs([]netip.Addr{n.Node.IPv6})
	n.await(n.Node.IPv6, 30100, "web", 1)
	n.awaitRefused(n.Node.IPv4, 30100)
	n.ports.SetAddrs(unspecifiedAddrs())
	n.await(n.Node.IPv4, 30100, "web", 1)
	n.await(n.Node.IPv6, 30100, "web", 1)
	n.ports.SetAddrs(n.Node.Addrs())
	n.await(n.Node.IPv4, 30100, "web", 1)
	n.await(n.Node.IPv6, 30100, "web", 1)
	n.ports.SetAddrs(nil)
	n.awaitRefused(n.Node.IPv4, 30100)
	n.awaitRefused(n.Node.IPv6, 30100)
	if len(n.listenErrors) != 0 {
		t.Errorf("unexpected errors: %s", n.listenErrors)
	}
}

// TestPortInUse checks that an address in use is reported once, does not delay the others,
// and is retried.
func TestPortInUse(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	taken, err := n.Node.Listen(t.Context(), "tcp4", netip.AddrPortFrom(n.Node.IPv4, 30100))
	if err != nil {
		t.Fatal(err)
	}
	n.ports.SetAddrs(n.Node.Addrs())
	n.setService("web", 30100, 1)
	n.setService("other", 30101, 2)
	n.await(n.Node.IPv6, 30100, "web", 1)
	n.await(n.Node.IPv4, 30101, "other", 2)
	n.setService("web", 30100, 3)
	n.await(n.Node.IPv6, 30100, "web", 3)
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	n.await(n.Node.IPv4, 30100, "web", 3)
	n.mu.Lock()
	defer n.mu.Unlock()
	if diff := cmp.Diff([]string{"shop/web 30100 true"}, n.listenErrors); diff != "" {
		t.Errorf("listen errors (-want +got):\n%s", diff)
	}
}

// TestServe checks that Serve fails at once with HardFail, and otherwise retries until the
// address is free.
func TestServe(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := taken.Addr().String()
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") })

	err = health.Serve(t.Context(), health.ServeOptions{Address: address, Handler: handler, HardFail: true})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("with HardFail: %v, want EADDRINUSE", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	attempts := make(chan struct{}, 100)
	listen := func(ctx context.Context, network, address string) (net.Listener, error) {
		defer func() { attempts <- struct{}{} }()
		return new(net.ListenConfig).Listen(ctx, network, address)
	}
	go func() {
		done <- health.Serve(ctx, health.ServeOptions{Address: address, Handler: handler, Listen: listen})
	}()
	<-attempts // the first attempt failed
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		return response.Body.Close()
	})
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve: %v", err)
	}
	again, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatalf("the address is still in use after Serve returned: %v", err)
	}
	again.Close()
}

// TestServeCanceledBetweenRetries checks that Serve returns when its context is canceled
// while it waits for the next attempt.
func TestServeCanceledBetweenRetries(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	listen := func(context.Context, string, string) (net.Listener, error) {
		cancel()
		return nil, errors.New("cannot listen")
	}
	if err := health.Serve(ctx, health.ServeOptions{Address: "x", Listen: listen}); err != nil {
		t.Errorf("error %v, want none", err)
	}
}

// TestMaxListeners checks that sockets of health-check node ports leave file descriptors for
// the rest of the program. Sockets over the limit are reported, and opened when there is
// room.
func TestMaxListeners(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var open atomic.Int64
		var failed []string
		ports := health.NewPorts(health.PortsOptions{
			Healthy: func() bool { return true }, MaxListeners: 3,
			OnListenError: func(service health.Service, _ uint16, err error) {
				failed = append(failed, service.Name+" "+err.Error())
			},
			Listen: func(context.Context, string, string) (net.Listener, error) {
				open.Add(1)
				l := newIdleListener()
				inner := l.close
				l.close = sync.OnceFunc(func() { open.Add(-1); inner() })
				return l, nil
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- ports.Run(ctx) }()
		checkSockets := func(want int64, wantFailed int) {
			t.Helper()
			time.Sleep(2 * health.RetryPeriod)
			synctest.Wait() // orders the writes of Run's goroutine before the reads below
			if got := open.Load(); got != want || len(failed) != wantFailed {
				t.Errorf("%d sockets, want %d; errors %q, want %d", got, want, failed, wantFailed)
			}
		}
		service := func(name string) health.Service { return health.Service{Namespace: "shop", Name: name} }
		addrs := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}
		ports.SetAddrs(addrs)
		ports.Set(map[health.Service]*health.Check{service("a"): {Port: 30100}})
		checkSockets(2, 0)
		ports.Set(map[health.Service]*health.Check{service("b"): {Port: 30101}})
		checkSockets(3, 1)
		if len(failed) > 0 && (!strings.HasPrefix(failed[0], "b ") || !strings.Contains(failed[0], "RLIMIT_NOFILE")) {
			t.Errorf("error %q", failed[0])
		}
		ports.Set(map[health.Service]*health.Check{service("a"): nil})
		checkSockets(2, 1)
		ports.Set(map[health.Service]*health.Check{service("c"): {Port: 30102}})
		checkSockets(3, 2)
		ports.SetAddrs(addrs[:1])
		checkSockets(2, 2)
		ports.SetAddrs(nil)
		checkSockets(0, 2)
		ports.SetAddrs(addrs[1:])
		checkSockets(2, 2)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
