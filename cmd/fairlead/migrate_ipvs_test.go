//go:build ipvs

package main

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/ipvs"
)

// flows are established TCP connections and UDP flows.
type flows struct {
	t        *testing.T
	tcp, udp connections
}

// establish opens a TCP connection and a UDP flow to each address, and sends a request over each.
func (n *testNode) establish(addrs []netip.AddrPort) *flows {
	n.t.Helper()
	f := &flows{t: n.t, tcp: n.openConns(addrs)}
	for _, addr := range addrs {
		c, err := n.client.Open(n.t.Context(), nettest.UDP, addr)
		if err != nil {
			n.t.Fatal(err)
		}
		n.t.Cleanup(func() { _ = c.Close() })
		f.udp = append(f.udp, c)
	}
	f.checkOpen("the first request")
	return f
}

// checkOpen fails the test if a TCP connection has ended, or if a UDP flow loses more than one
// datagram.
func (f *flows) checkOpen(after string) {
	f.t.Helper()
	for _, c := range f.tcp {
		if _, err := c.Ask(f.t.Context()); err != nil {
			f.t.Errorf("after %s: %v", after, err)
		}
	}
	for _, c := range f.udp {
		err := askWithin(f.t.Context(), c, time.Second)
		if errors.Is(err, nettest.ErrTimeout) {
			f.t.Logf("after %s: lost a datagram: %v", after, err)
			err = askWithin(f.t.Context(), c, time.Second)
		}
		if err != nil {
			f.t.Errorf("after %s: %v", after, err)
		}
	}
}

func askWithin(ctx context.Context, c *nettest.Conn, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, err := c.Ask(ctx)
	return err
}

// countOpen returns how many of the connections answer a request within a second.
func (conns connections) countOpen(t *testing.T) int {
	t.Helper()
	open := 0
	for _, c := range conns {
		if askWithin(t.Context(), c, time.Second) == nil {
			open++
		}
	}
	return open
}

func (f *flows) closeTCP() {
	for _, c := range f.tcp {
		_ = c.Close()
	}
	f.tcp = nil
}

// TestMigrateIPVS takes over from kube-proxy where one of the two uses IPVS, and hands back to its
// mode ipvs. No new connection fails, and established ones survive each step.
func TestMigrateIPVS(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ kubeProxy, fairlead string }{
		{"ipvs", "nft"}, {"ipvs", "ipvs"}, {"nftables", "ipvs"}, {"iptables", "ipvs"},
	} {
		t.Run(test.kubeProxy+" to "+test.fairlead, func(t *testing.T) {
			t.Parallel()
			n := newMigrationNode(t, test.kubeProxy, "")
			backend := agenttest.ServiceAddrs(10, 80)
			var all []*flows
			checkOpen := func(after string) {
				t.Helper()
				for _, f := range all {
					f.checkOpen(after)
				}
			}
			n.startKubeProxy()
			n.awaitAnswers(backend, "a", "b")
			stopLoad := n.keepConnecting(backend)
			ofKubeProxy := n.establish(backend)
			all = append(all, ofKubeProxy)

			n.stopKubeProxy()
			n.startFairlead("--mode=" + test.fairlead)
			checkOpen("the take-over")
			all = append(all, n.establish(backend))
			if test.kubeProxy == "ipvs" && test.fairlead == "nft" {
				// Only the connections from before the take-over use kube-proxy's virtual servers.
				const want = "2 TCP connections through kube-proxy's IPVS virtual servers would end"
				if output, err := n.shell("fairlead cleanup --kube-proxy"); err == nil || !strings.Contains(output, want) {
					t.Errorf("cleanup --kube-proxy: error %v, output %q; want a failure with %q", err, output, want)
				}
				checkOpen("the refused cleanup")
				ofKubeProxy.closeTCP()
			}
			agenttest.Eventually(t, func() error {
				output, err := n.shell("fairlead cleanup --kube-proxy")
				if err == nil {
					t.Logf("cleanup --kube-proxy:\n%s", output)
				}
				return err
			})
			checkOpen("cleanup --kube-proxy")
			// KUBE-FIREWALL stays, because kubelet creates it, too.
			if left := n.remains("kube-proxy", "KUBE-SERVICES", "KUBE-SVC-", "KUBE-SEP-", "KUBE-POSTROUTING", "KUBE-NODE", "KUBE-CLUSTER-IP",
				"KUBE-LOOP-BACK", "KUBE-MARK-MASQ", "kube-ipvs0"); len(left) > 0 {
				t.Errorf("after cleanup --kube-proxy: %v", left)
			}
			all = append(all, n.establish(backend))

			if test.kubeProxy != "ipvs" {
				stopLoad()
				return // see TestHandBackFromIPVS
			}
			n.stop()
			n.startKubeProxy()
			checkOpen("the start of kube-proxy")
			all = append(all, n.establish(backend))
			if output, err := n.shell("fairlead cleanup"); err != nil {
				t.Errorf("cleanup: %v\n%s", err, output)
			}
			checkOpen("cleanup")
			n.awaitAnswers(backend, "a", "b")
			if left := n.remains("fairlead"); len(left) > 0 {
				t.Errorf("after cleanup: %v", left)
			}
			stopLoad()
		})
	}
}

// remains returns the words that occur in the node's tables, sets and interfaces.
func (n *migrationNode) remains(words ...string) []string {
	n.t.Helper()
	listing, err := n.shell("nft list ruleset; iptables-legacy-save; ip6tables-legacy-save; ipset list -n; ip link")
	if err != nil {
		n.t.Fatal(err)
	}
	return slices.DeleteFunc(words, func(word string) bool { return !strings.Contains(listing, word) })
}

// TestHandBackFromIPVS hands back from Fairlead's mode ipvs to another mode of kube-proxy, which
// breaks connections.
func TestHandBackFromIPVS(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"nftables", "iptables"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			n := newMigrationNode(t, mode, "")
			backend := agenttest.ServiceAddrs(10, 80)
			n.startFairlead("--mode=ipvs")
			n.awaitAnswers(backend, "a", "b")
			established := n.establish(backend)
			n.stop()
			n.startKubeProxy()
			if mode == "nftables" { // kube-proxy has deleted all virtual servers
				if open := established.tcp.countOpen(t); open != 0 {
					t.Errorf("%d of 2 TCP connections survive the start of kube-proxy", open)
				}
			} else {
				established.checkOpen("the start of kube-proxy")
			}
			if mode == "iptables" {
				const want = "2 TCP connections through Fairlead's IPVS virtual servers would end"
				if output, err := n.shell("fairlead cleanup"); err == nil || !strings.Contains(output, want) {
					t.Errorf("cleanup: error %v, output %q; want a failure with %q", err, output, want)
				}
			}
			if output, err := n.shell("fairlead cleanup --force"); err != nil {
				t.Errorf("cleanup --force: %v\n%s", err, output)
			}
			n.awaitAnswers(backend, "a", "b")
			t.Logf("%d of 2 TCP connections through IPVS survive", established.tcp.countOpen(t))
			if left := n.remains("fairlead", ipvs.LinkName); len(left) > 0 {
				t.Errorf("after cleanup: %v", left)
			}
		})
	}
}
