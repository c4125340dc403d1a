package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// TestStaleUDPFlows checks that UDP flows to a removed endpoint continue to another one.
func TestStaleUDPFlows(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	var conns []*nettest.Conn
	for _, addr := range agenttest.ServiceAddrs(10, 80) {
		conn, err := n.client.Open(t.Context(), nettest.UDP, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if answer, err := conn.Ask(t.Context()); err != nil || answer.Host != "a" {
			t.Fatalf("answer %+v, error %v; want an answer from a", answer, err)
		}
		conns = append(conns, conn)
	}
	n.writePods("backend", "b")
	n.removeFile("pod-a.yaml")
	for _, conn := range conns {
		agenttest.Eventually(t, func() error {
			answer, err := conn.Ask(t.Context())
			if err == nil && answer.Host != "b" {
				err = fmt.Errorf("answer from %s, want b", answer.Host)
			}
			return err
		})
	}
}

// TestConnectAfterLostTables checks that a client reaches a Service whose tables were lost for a
// while, although the client sent a SYN from the same port meanwhile. The kernel has an
// untranslated connection-tracking entry for this SYN, which it does not translate later.
func TestConnectAfterLostTables(t *testing.T) {
	t.Parallel()
	newTestNode(t, "a").checkConnectAfterLoss("nft flush ruleset")
}

// checkConnectAfterLoss runs the program with the arguments, and the commands that lose its kernel
// state.
func (n *testNode) checkConnectAfterLoss(lose string, args ...string) {
	t := n.t
	t.Helper()
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run(args...)
	addrs := agenttest.ServiceAddrs(10, 80)
	n.awaitAnswers(addrs, "a")
	n.stop()
	n.command("sh", "-ec", lose)
	// While the tables are lost, no host answers packets to cluster IPs.
	agenttest.Command(t, n.Outside, "nft", "add table inet silent; add chain inet silent in { type filter hook prerouting priority raw; policy drop; }")
	// Without rules nothing would track connections.
	n.nft("add table inet tracker; add chain inet tracker in { type filter hook prerouting priority 0; }; add rule inet tracker in ct state new counter")
	const port = 40000
	for _, addr := range addrs {
		err := dialFrom(t.Context(), n.client, port, addr, 500*time.Millisecond)
		if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() {
			t.Fatalf("%s without tables: error %v, want a timeout", addr, err)
		}
	}
	n.run(args...)
	for i, addr := range addrs {
		family := dataplane.FamilyOf(addr.Addr()).String()
		n.awaitMetric("127.0.0.1:10249", fmt.Sprintf(`kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=%q} 1`, family))
		if err := dialFrom(t.Context(), n.client, port, addr, waitTimeout); err != nil {
			t.Errorf("address %d with tables: %v", i, err)
		}
	}
}

// dialFrom opens a TCP connection from a port of a host and closes it.
func dialFrom(ctx context.Context, host *nettest.Host, port int, to netip.AddrPort, timeout time.Duration) error {
	return host.Do(func() error {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{Port: port}, Timeout: timeout}
		conn, err := dialer.DialContext(ctx, "tcp", to.String())
		if err != nil {
			return err
		}
		if err := conn.(*net.TCPConn).SetLinger(0); err != nil { // no TIME_WAIT
			return err
		}
		return conn.Close()
	})
}
