package nettest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

func networks() []string { return []string{nettest.TCP, nettest.UDP, nettest.SCTP} }

// run runs a program in the namespace of a host and returns its output.
func run(t *testing.T, h *nettest.Host, stdin string, name string, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
	err := h.Do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, &out)
	}
	return out.String()
}

func TestDirectConnections(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	a, b := n.PodT(t, "a"), n.PodT(t, "b")
	hosts := []*nettest.Host{a, b, n.Node, n.Outside}
	for _, h := range hosts {
		for _, network := range networks() {
			h.ServeT(t, network, 80)
		}
	}
	for _, network := range networks() {
		for _, from := range hosts {
			for _, to := range hosts {
				for i, addr := range to.Addrs() {
					t.Run(fmt.Sprintf("%s/%s to %s/%s", network, from.Name, to.Name, addr), func(t *testing.T) {
						t.Parallel()
						answer, err := from.Connect(t.Context(), network, netip.AddrPortFrom(addr, 80))
						if err != nil {
							t.Fatal(err)
						}
						want := nettest.Answer{Host: to.Name, Endpoint: netip.AddrPortFrom(addr, 80)}
						want.Source = netip.AddrPortFrom(from.Addrs()[i], answer.Source.Port())
						if answer != want {
							t.Errorf("answer %+v, want %+v", answer, want)
						}
					})
				}
			}
		}
	}
}

func TestConnectFromAddedNetwork(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	pod := n.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, 80)
	for i, text := range []string{"100.64.0.0/16", "2001:db8:64::/64"} {
		network := netip.MustParsePrefix(text)
		to := netip.AddrPortFrom(pod.Addrs()[i], 80)
		source := network.Addr().Next()
		if _, err := n.Outside.ConnectFrom(t.Context(), source, to); err == nil {
			t.Errorf("connected from %s, which the host does not have", source)
		}
		if err := n.Outside.AddNetwork(network); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			source = source.Next()
			answer, err := n.Outside.ConnectFrom(t.Context(), source, to)
			if err != nil || answer.Source.Addr() != source || answer.Endpoint != to {
				t.Errorf("from %s: answer %+v, error %v", source, answer, err)
			}
		}
	}
}

// TestAddedAddressIsDeprecated checks that other hosts can connect to an added address, but
// that the host does not choose it as a source address.
func TestAddedAddressIsDeprecated(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	pod := n.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, 80)
	for i, text := range []string{"198.51.100.1", "2001:db8:51::1"} {
		added := netip.MustParseAddr(text)
		if err := n.Node.AddAddr(added); err != nil {
			t.Fatal(err)
		}
		n.Node.ServeT(t, nettest.TCP, uint16(8080+i)) //nolint:gosec // fits
		answer, err := n.Node.Connect(t.Context(), nettest.TCP, netip.AddrPortFrom(pod.Addrs()[i], 80))
		if err != nil || answer.Source.Addr() != n.Node.Addrs()[i] {
			t.Errorf("to the pod: answer %+v, error %v, want source %s", answer, err, n.Node.Addrs()[i])
		}
		to := netip.AddrPortFrom(added, uint16(8080+i)) //nolint:gosec // fits
		if answer, err = n.Outside.Connect(t.Context(), nettest.TCP, to); err != nil || answer.Host != n.Node.Name {
			t.Errorf("to %s: answer %+v, error %v", to, answer, err)
		}
	}
}

func TestRepeatedRequests(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	a, b := n.PodT(t, "a"), n.PodT(t, "b")
	for _, network := range networks() {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			server := b.ServeT(t, network, 80)
			conn, err := a.Open(t.Context(), network, netip.AddrPortFrom(b.IPv4, 80))
			if err != nil {
				t.Fatal(err)
			}
			for range 100 {
				answer, err := conn.Ask(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if answer.Host != "b" || answer.Source != conn.Source() {
					t.Fatalf("answer %+v, want host b and source %s", answer, conn.Source())
				}
			}
			if err := server.Close(); err != nil {
				t.Error(err)
			}
			if answer, err := conn.Ask(t.Context()); err == nil || errors.Is(err, nettest.ErrTimeout) {
				t.Errorf("ask a closed server: answer %+v, error %v, want an error other than a timeout", answer, err)
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestClosedPortRefused checks that all responses of a host without a listener are refusals:
// a TCP reset, an ICMP port unreachable, an ICMP protocol unreachable (SCTP without kernel
// support), and an SCTP abort (from the package's own stack).
func TestClosedPortRefused(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	client, silent, server := n.PodT(t, "client"), n.PodT(t, "silent"), n.PodT(t, "server")
	server.ServeT(t, nettest.SCTP, 80)
	for _, network := range networks() {
		for _, to := range []*nettest.Host{silent, server} {
			for _, addr := range to.Addrs() {
				t.Run(network+"/"+to.Name+"/"+addr.String(), func(t *testing.T) {
					t.Parallel()
					for range 100 { // more than the default ICMP rate limits allow
						_, err := client.Connect(t.Context(), network, netip.AddrPortFrom(addr, 81))
						if !errors.Is(err, nettest.ErrRefused) {
							t.Fatalf("error %v, want refused", err)
						}
					}
				})
			}
		}
	}
}

func TestUnreachableAddressTimesOut(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	pod := n.PodT(t, "pod")
	for _, network := range networks() {
		for _, addr := range []string{"198.51.100.1:80", "[2001:db8:1::1]:80"} {
			t.Run(network+"/"+addr, func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
				defer cancel()
				_, err := pod.Connect(ctx, network, netip.MustParseAddrPort(addr))
				if !errors.Is(err, nettest.ErrTimeout) || errors.Is(err, nettest.ErrRefused) {
					t.Errorf("error %v, want a timeout", err)
				}
			})
		}
	}
}

// TestNodeNetfilter checks, with a hand-written ruleset, that servers and clients observe
// translated destinations, translated sources and rejections.
func TestNodeNetfilter(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	client, server := n.PodT(t, "client"), n.PodT(t, "server")
	for _, network := range networks() {
		server.ServeT(t, network, 8080)
	}
	rules := ""
	for family, r := range map[string]struct{ ip, vip, reject, masquerade, pod string }{
		"ip":  {"ip", "10.96.0.1", "10.96.0.2", "10.96.0.3", server.IPv4.String()},
		"ip6": {"ip6", "fd00:10:96::1", "fd00:10:96::2", "fd00:10:96::3", server.IPv6.String()},
	} {
		rules += strings.NewReplacer("FAMILY", family, "VIP", r.vip, "REJECT", r.reject, "MASQ", r.masquerade, "POD", addrForDNAT(r.pod)).Replace(`
table FAMILY test {
	chain prerouting { type nat hook prerouting priority dstnat; jump services; }
	chain output { type nat hook output priority -100; jump services; }
	chain services {
		FAMILY daddr { VIP, MASQ } meta l4proto { tcp, udp, sctp } th dport 80 dnat to POD:8080
	}
	chain postrouting {
		type nat hook postrouting priority srcnat;
		ct original FAMILY daddr MASQ masquerade
	}
	chain forward { type filter hook forward priority filter; jump rejected; }
	chain local { type filter hook output priority filter; jump rejected; }
	chain rejected {
		FAMILY daddr REJECT meta l4proto tcp reject with tcp reset
		FAMILY daddr REJECT reject
	}
}`)
	}
	run(t, n.Node, rules, "nft", "-f", "-")
	masqueraded := map[bool]netip.Addr{false: n.Node.IPv4, true: n.Node.IPv6}
	for _, network := range networks() {
		for _, from := range []*nettest.Host{client, n.Node, n.Outside} {
			for i, own := range from.Addrs() {
				server := netip.AddrPortFrom(server.Addrs()[i], 8080)
				for _, tt := range []struct {
					name   string
					addrs  [2]string
					source netip.Addr
				}{
					{"translated", [2]string{"10.96.0.1", "fd00:10:96::1"}, own},
					{"masqueraded", [2]string{"10.96.0.3", "fd00:10:96::3"}, masqueraded[i == 1]},
				} {
					t.Run(fmt.Sprintf("%s/%s/%s/%s", network, from.Name, tt.name, tt.addrs[i]), func(t *testing.T) {
						t.Parallel()
						answer, err := from.Connect(t.Context(), network, netip.AddrPortFrom(netip.MustParseAddr(tt.addrs[i]), 80))
						if err != nil {
							t.Fatal(err)
						}
						if answer.Host != "server" || answer.Endpoint != server || answer.Source.Addr() != tt.source {
							t.Errorf("answer %+v, want host server, endpoint %s, source %s", answer, server, tt.source)
						}
					})
				}
				t.Run(fmt.Sprintf("%s/%s/rejected/%s", network, from.Name, own), func(t *testing.T) {
					t.Parallel()
					addr := netip.MustParseAddr([]string{"10.96.0.2", "fd00:10:96::2"}[i])
					for range 20 {
						start := time.Now()
						_, err := from.Connect(t.Context(), network, netip.AddrPortFrom(addr, 80))
						if !errors.Is(err, nettest.ErrRefused) {
							t.Fatalf("error %v after %v, want refused", err, time.Since(start))
						}
					}
				})
			}
		}
	}
}

func addrForDNAT(addr string) string {
	if strings.Contains(addr, ":") {
		return "[" + addr + "]"
	}
	return addr
}

// TestConcurrentAssociations checks that concurrent associations between the same two hosts
// do not affect each other, even if some are refused.
func TestConcurrentAssociations(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	a, b := n.PodT(t, "a"), n.PodT(t, "b")
	b.ServeT(t, nettest.SCTP, 80)
	run(t, n.Node, `table inet test { chain forward { type filter hook forward priority filter; sctp dport 81 reject; }; }`, "nft", "-f", "-")
	var wg sync.WaitGroup
	for range 8 {
		for _, addr := range b.Addrs() {
			wg.Go(func() {
				for range 25 {
					if _, err := a.Connect(t.Context(), nettest.SCTP, netip.AddrPortFrom(addr, 80)); err != nil {
						t.Error(err)
					}
				}
			})
			wg.Go(func() {
				for range 25 {
					if _, err := a.Connect(t.Context(), nettest.SCTP, netip.AddrPortFrom(addr, 81)); !errors.Is(err, nettest.ErrRefused) {
						t.Errorf("error %v, want refused", err)
					}
				}
			})
		}
	}
	wg.Wait()
}

func TestAddAndRemovePods(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24")}})
	client := n.PodT(t, "client")
	for i := range 3 {
		pod := n.PodT(t, "pod", netip.MustParseAddr("10.9.9.9"))
		pod.ServeT(t, nettest.TCP, 80)
		if _, err := n.AddPod("pod"); err == nil {
			t.Fatal("AddPod accepted a name in use")
		}
		if _, err := n.AddPod("pod2", netip.MustParseAddr("10.9.9.9")); err == nil {
			t.Fatal("AddPod accepted an address in use")
		}
		answer, err := client.Connect(t.Context(), nettest.TCP, netip.MustParseAddrPort("10.9.9.9:80"))
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		if want := netip.MustParseAddr("10.1.2.1"); answer.Source.Addr() != want {
			t.Errorf("source %s, want %s", answer.Source, want)
		}
		if err := pod.Close(); err != nil {
			t.Fatal(err)
		}
		if err := pod.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
	}
	if links := run(t, n.Node, "", "ip", "-brief", "link"); strings.Count(links, "veth") != 1 {
		t.Errorf("links of removed pods remain on the node:\n%s", links)
	}
}

func TestNamespace(t *testing.T) {
	t.Parallel()
	ns, err := nettest.NewNamespace("")
	if err != nil {
		t.Fatal(err)
	}
	inode := func() string {
		link, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Error(err)
		}
		return link
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own := inode()
	var inside string
	if err := ns.Do(func() error { inside = inode(); return nil }); err != nil {
		t.Fatal(err)
	}
	if inside == own {
		t.Errorf("Do ran fn in the namespace of the test, %s", own)
	}
	failure := errors.New("failure")
	if err := ns.Do(func() error { return failure }); !errors.Is(err, failure) {
		t.Errorf("Do returned %v, want the error of fn", err)
	}
	if err := ns.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do returned nil, but fn exited its goroutine")
	}
	// No other goroutine runs on a thread that is still in the namespace.
	for range 100 {
		wait := make(chan string)
		go func() { wait <- inode() }()
		if got := <-wait; got != own {
			t.Fatalf("a goroutine runs in namespace %s, want %s", got, own)
		}
	}
	for range 2 {
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := ns.Do(func() error { return nil }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Do after Close returned %v, want %v", err, os.ErrClosed)
	}
}

func TestNamedNetwork(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("nettest-%d", os.Getpid())
	names := func() string {
		paths, err := filepath.Glob("/run/netns/" + name + "-*")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(paths, " ")
	}
	crashed, err := nettest.New(nettest.Options{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	n := nettest.NewT(t, nettest.Options{Name: name}) // removes the namespaces of crashed
	pod := n.PodT(t, "pod")
	want := strings.ReplaceAll("/run/netns/X-node /run/netns/X-outside /run/netns/X-pod", "X", name)
	if got := names(); got != want {
		t.Errorf("named namespaces %q, want %q", got, want)
	}
	out, err := exec.CommandContext(t.Context(), "ip", "netns", "exec", name+"-pod", "ip", "-brief", "addr").CombinedOutput()
	if err != nil || !strings.Contains(string(out), pod.IPv4.String()) {
		t.Errorf("ip netns exec: %v\n%s\nwant the address %s", err, out, pod.IPv4)
	}
	for _, n := range []*nettest.Network{n, crashed} {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
	if got := names(); got != "" {
		t.Errorf("names %q remain", got)
	}
}

func TestListen(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	pod := n.PodT(t, "pod")
	l, err := pod.Listen(t.Context(), "tcp", netip.AddrPortFrom(pod.IPv6, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Close()
		}
	}()
	conn, err := n.Outside.Dial(t.Context(), "tcp", l.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
