package main

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// openHalfSent opens connections that send only part of a request, and keeps them open until the
// test ends. The program may close them earlier.
func (n *testNode) openHalfSent(count int, host *nettest.Host, addr netip.AddrPort, part string) {
	n.t.Helper()
	for range count {
		ctx, cancel := context.WithTimeout(n.t.Context(), connectTimeout)
		conn, err := host.Dial(ctx, "tcp", addr)
		cancel()
		if err != nil {
			continue // other checks notice a server that accepts no more connections
		}
		n.t.Cleanup(func() { _ = conn.Close() })
		_, _ = conn.Write([]byte(part)) // the server may have closed the connection
	}
}

// limitFiles sets the limit of open files of the running program.
func (n *testNode) limitFiles(files uint64) {
	n.t.Helper()
	pid := n.program.cmd.Process.Pid
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		n.t.Fatal(err)
	}
	limit.Cur = files
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		n.t.Fatal(err)
	}
}

// askOverTCP sends a DNS query over TCP for the name of Service backend.
func (n *testNode) askOverTCP() error {
	ctx, cancel := context.WithTimeout(n.t.Context(), waitTimeout)
	defer cancel()
	conn, err := n.client.Dial(ctx, "tcp", n.dnsAddress())
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(waitTimeout)); err != nil {
		return err
	}
	c := &dns.Conn{Conn: conn}
	query := new(dns.Msg).SetQuestion("backend.default.svc.cluster.local.", dns.TypeA)
	if err := c.WriteMsg(query); err != nil {
		return err
	}
	reply, err := c.ReadMsg()
	if err == nil && len(reply.Answer) == 0 {
		err = fmt.Errorf("no answer in %s", reply)
	}
	return err
}

// TestHalfSentRequests checks that thousands of half-sent requests of one client do not prevent any
// server from answering: not for the kubelet, for load balancers or for the client itself.
func TestHalfSentRequests(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", loadBalancerYAML(32000))
	n.writePods("backend", "a")
	n.run()
	health, check, metrics := netip.AddrPortFrom(n.Node.IPv4, 10256), netip.AddrPortFrom(n.Node.IPv4, 32000), "127.0.0.1:10249"
	n.awaitGet(n.Node, metrics, "/metrics", http.StatusOK, "fairlead_server_connections_limit{server=\"healthz\"} 256\n")
	n.limitFiles(1024)
	const part = "GET /livez HTTP/1.1\r\nHost:"
	n.openHalfSent(2000, n.Outside, health, part)
	n.openHalfSent(500, n.Outside, check, part)
	n.openHalfSent(500, n.Outside, n.dnsAddress(), "\x00")
	n.openHalfSent(500, n.Node, netip.MustParseAddrPort(metrics), part)
	n.openHalfSent(500, n.Node, health, part)
	for _, from := range []*nettest.Host{n.Outside, n.client, n.Node} {
		n.awaitGet(from, health.String(), "/livez", http.StatusOK, `"healthy":true`)
		n.awaitGet(from, check.String(), "/", http.StatusOK, `"localEndpoints": 1`)
	}
	n.awaitGet(n.Node, "127.0.0.1:10256", "/livez", http.StatusOK, `"healthy":true`)
	if err := n.askOverTCP(); err != nil {
		t.Errorf("DNS over TCP: %v", err)
	}
	if got, err := n.lookup("ip4", "backend"); err != nil || len(got) != 1 {
		t.Errorf("DNS: %v, error %v", got, err)
	}
	_, body, err := get(t.Context(), n.Node, metrics, "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(body) {
		text, ok := strings.CutPrefix(line, "fairlead_server_connections{")
		if !ok {
			continue
		}
		server, value, _ := strings.Cut(strings.TrimSpace(text), "} ")
		if open, err := strconv.Atoi(value); err != nil || open > 200 { // two clients at most, or one of health-check node ports
			t.Errorf("%s: %s open connections, want at most 200", server, value)
		}
	}
	n.program.awaitLog(func(r record) bool {
		return r.Level == "WARN" && strings.Contains(r.Msg, "to make room") && r.Reason == "client has too many connections"
	})
	if got := len(n.program.log.records()); got > 100 {
		t.Errorf("%d log lines, want at most 100", got)
	}
}

// TestFileDescriptorsExhausted checks that without free file descriptors, probes are answered and
// the program does not spin, and that it recovers when descriptors are available.
func TestFileDescriptorsExhausted(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	metrics := netip.MustParseAddrPort("127.0.0.1:10249")
	n.awaitGet(n.Outside, n.hostPort(n.Node.IPv4, 10256), "/livez", http.StatusOK, "")
	if err := n.askOverTCP(); err != nil {
		t.Fatal(err)
	}
	// Connections use up the free descriptors below the reserve, so that the limit leaves none.
	agenttest.Eventually(t, func() error {
		folder := fmt.Sprintf("/proc/%d/fd", n.program.cmd.Process.Pid)
		free, reserve := 0, 0
		for fd := range 1024 {
			target, err := os.Readlink(fmt.Sprintf("%s/%d", folder, fd))
			switch {
			case err == nil && target == "anon_inode:[eventfd]":
				reserve = fd
			case err != nil && free == 0:
				free = fd
			}
		}
		if free < reserve {
			n.openHalfSent(1, n.Node, metrics, "G")
			return fmt.Errorf("descriptor %d below the last descriptor of the reserve, %d, is free", free, reserve)
		}
		n.limitFiles(uint64(free)) //nolint:gosec // positive
		return nil
	})
	probe := func() {
		t.Helper()
		for _, from := range []*nettest.Host{n.Outside, n.client, n.Node} {
			n.awaitGet(from, n.hostPort(n.Node.IPv4, 10256), "/livez", http.StatusOK, `"healthy":true`)
		}
	}
	probe()
	n.openHalfSent(20, n.Outside, netip.AddrPortFrom(n.Node.IPv4, 10256), "GET /") // uses up the reserve
	probe()
	if got, err := n.lookup("ip4", "backend"); err != nil || len(got) != 1 {
		t.Errorf("DNS over UDP: %v, error %v", got, err)
	}
	// A DNS client over TCP has to wait. Meanwhile the program must not use CPU time.
	answered := make(chan error, 1)
	go func() { answered <- n.askOverTCP() }()
	before := n.processorTime()
	time.Sleep(2 * time.Second)
	if used := n.processorTime() - before; used > time.Second {
		t.Errorf("%s of CPU time while a DNS client waits", used)
	}
	n.limitFiles(1024)
	if err := <-answered; err != nil {
		t.Errorf("DNS over TCP after descriptors became available: %v", err)
	}
	probe()
	n.awaitGet(n.Node, metrics.String(), "/metrics", http.StatusOK, "fairlead_server_connections")
	select {
	case <-n.program.ended:
		t.Error("the program has exited")
	default:
	}
}

// processorTime returns the CPU time that the program has used.
func (n *testNode) processorTime() time.Duration {
	n.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.program.cmd.Process.Pid))
	if err != nil {
		n.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	var ticks int
	for _, field := range fields[11:13] { // utime and stime of proc(5)
		t, err := strconv.Atoi(field)
		if err != nil {
			n.t.Fatal(err)
		}
		ticks += t
	}
	const tick = 10 * time.Millisecond
	return time.Duration(ticks) * tick
}
