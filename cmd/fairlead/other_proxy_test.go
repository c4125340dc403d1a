package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// addOtherProxyRules adds rules like those of kube-proxy in the given mode. They direct TCP
// connections for the addresses to a pod.
func (n *testNode) addOtherProxyRules(mode, pod string, addrs []netip.AddrPort) {
	n.t.Helper()
	for i, addr := range addrs {
		to := netip.AddrPortFrom(n.pods[pod].Addrs()[i], podPort)
		if mode == "nftables" {
			n.nft(fmt.Sprintf(`table %[1]s kube-proxy {
				chain nat-prerouting { type nat hook prerouting priority -100; %[1]s daddr %[2]s tcp dport %[3]d dnat to %[4]s; }
			}`, []string{"ip", "ip6"}[i], addr.Addr(), addr.Port(), to))
			continue
		}
		program := []string{"iptables", "ip6tables"}[i] + strings.TrimPrefix(mode, "iptables")
		n.command(program, "-t", "nat", "-N", "KUBE-SERVICES")
		n.command(program, "-t", "nat", "-A", "PREROUTING", "-j", "KUBE-SERVICES")
		n.command(program, "-t", "nat", "-A", "KUBE-SERVICES", "-d", addr.Addr().String(), "-p", "tcp", "--dport", fmt.Sprint(addr.Port()),
			"-j", "DNAT", "--to-destination", to.String())
	}
}

// awaitTCP waits until only this pod answers TCP connections to the addresses.
func (n *testNode) awaitTCP(addrs []netip.AddrPort, by string) {
	n.t.Helper()
	for _, addr := range addrs {
		agenttest.Eventually(n.t, func() error { return checkAnswers(n.t.Context(), n.client, nettest.TCP, addr, by) })
	}
}

// TestOtherProxy checks that leftover rules of another proxy are reported, and that they get no
// connections while Fairlead runs or restarts. Once Fairlead has been stopped for --give-way-after,
// these rules take precedence.
func TestOtherProxy(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"nftables", "iptables-legacy", "iptables-nft"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t, "ours", "theirs")
			backend := agenttest.ServiceAddrs(10, 80)
			n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
			n.writePods("backend", "ours")
			n.run()
			n.awaitTCP(backend, "ours")
			metric := fmt.Sprintf(`fairlead_other_proxy_rules{mode="%s",proxy="kube-proxy"}`, strings.Split(mode, "-")[0])
			n.awaitMetric("127.0.0.1:10249", metric+" 0")
			n.addOtherProxyRules(mode, "theirs", backend)
			n.program.awaitLog(func(r record) bool {
				return r.Level == "WARN" && strings.HasPrefix(r.Msg, "rules of another Service proxy found on this node")
			})
			n.awaitMetric("127.0.0.1:10249", metric+" 1")
			n.awaitTCP(backend, "ours")
			established := n.openConns(backend)
			n.stop()
			n.awaitTCP(backend, "ours")
			n.program = n.start(nil, append(n.runArgs(), "--give-way-after=0s")...)
			n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
			n.awaitTCP(backend, "ours")
			n.stop()
			n.awaitTCP(backend, "theirs")
			n.run()
			n.awaitTCP(backend, "ours")
			established.checkOpen(t)
		})
	}
}
