package nft

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// otherProxies returns, for each rule format of kube-proxy, a function that returns the
// commands to translate a TCP frontend.
func otherProxies() map[string]func(frontend, endpoint netip.AddrPort) []*exec.Cmd {
	iptables := func(flavour string) func(frontend, endpoint netip.AddrPort) []*exec.Cmd {
		return func(frontend, endpoint netip.AddrPort) []*exec.Cmd {
			program := "iptables-" + flavour
			if frontend.Addr().Is6() {
				program = "ip6tables-" + flavour
			}
			var cmds []*exec.Cmd
			for _, hook := range []string{"PREROUTING", "OUTPUT"} {
				cmds = append(cmds, exec.Command(program, "-t", "nat", "-A", hook, "-d", frontend.Addr().String(), //nolint:gosec // a test's own arguments
					"-p", "tcp", "--dport", fmt.Sprint(frontend.Port()), "-j", "DNAT", "--to-destination", endpoint.String()))
			}
			return cmds
		}
	}
	return map[string]func(frontend, endpoint netip.AddrPort) []*exec.Cmd{
		"iptables legacy": iptables("legacy"),
		"iptables nft":    iptables("nft"),
		"nftables": func(frontend, endpoint netip.AddrPort) []*exec.Cmd {
			family := "ip"
			if frontend.Addr().Is6() {
				family = "ip6"
			}
			var cmds []*exec.Cmd
			for _, hook := range []string{"prerouting", "output"} {
				cmds = append(cmds, exec.Command("nft", fmt.Sprintf(`table %[1]s kube-proxy {
					chain nat-%[2]s {
						type nat hook %[2]s priority -100
						%[1]s daddr %[3]s tcp dport %[4]d dnat to %[5]s
					}
				}`, family, hook, frontend.Addr(), frontend.Port(), endpoint))) //nolint:gosec // a test's own arguments
			}
			return cmds
		},
	}
}

// TestAheadOfOthers lets another proxy translate the same frontends, with hooks registered
// before or after ours. Our rules decide while Node.AheadOfOthers is set; the other proxy's
// rules decide as soon as the Dataplane gives way. Open connections keep their endpoints, and
// no connection fails.
func TestAheadOfOthers(t *testing.T) {
	t.Parallel()
	for name, rules := range otherProxies() {
		for order, olderThanOurs := range map[string]bool{"older": true, "newer": false} {
			t.Run(name+"/"+order, func(t *testing.T) {
				t.Parallel()
				network := nettest.NewT(t, nettest.Options{})
				ours, theirs, client := network.PodT(t, "ours"), network.PodT(t, "theirs"), network.PodT(t, "client")
				ours.ServeT(t, nettest.TCP, 8080)
				theirs.ServeT(t, nettest.TCP, 8080)
				var services []*dataplane.Service
				var frontends []netip.AddrPort
				for i, addr := range []string{"10.96.0.1", "fd00:96::1"} {
					frontends = append(frontends, netip.AddrPortFrom(netip.MustParseAddr(addr), 80))
					services = append(services, service(t, "s", []dataplane.Frontend{{Protocol: dataplane.TCP, Addr: frontends[i]}},
						[]dataplane.Endpoint{{Addr: netip.AddrPortFrom(ours.Addrs()[i], 8080)}}))
				}
				addOtherRules := func() {
					for i, frontend := range frontends {
						for _, cmd := range rules(frontend, netip.AddrPortFrom(theirs.Addrs()[i], 8080)) {
							err := network.Node.Do(func() error {
								out, err := cmd.CombinedOutput()
								if err != nil {
									return fmt.Errorf("%s: %w\n%s", cmd, err, out)
								}
								return nil
							})
							if err != nil {
								t.Fatal(err)
							}
						}
					}
				}
				behind, ahead := dataplane.Node{PodCIDRs: network.PodCIDRs}, dataplane.Node{PodCIDRs: network.PodCIDRs, AheadOfOthers: true}
				d := openInNamespace(t, network.Node.Namespace)
				if olderThanOurs {
					addOtherRules()
				}
				mustReplace(t, d, behind, services...)
				if !olderThanOurs {
					addOtherRules()
				}
				var open []*nettest.Conn
				defer func() {
					for _, c := range open {
						_, err := c.Ask(t.Context())
						if err := errors.Join(err, c.Close()); err != nil {
							t.Errorf("open connection: %v", err)
						}
					}
				}()
				checkAnsweredBy := func(by string) error {
					for _, from := range []*nettest.Host{client, network.Node} {
						for _, frontend := range frontends {
							ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
							answer, err := from.Connect(ctx, nettest.TCP, frontend)
							cancel()
							if err != nil {
								t.Fatalf("from %s to %s: %v", from.Name, frontend, err)
							}
							if answer.Host != by {
								return fmt.Errorf("from %s to %s: answered by %s, want %s", from.Name, frontend, answer.Host, by)
							}
						}
					}
					for _, frontend := range frontends {
						c, err := client.Open(t.Context(), nettest.TCP, frontend)
						if err != nil {
							t.Fatal(err)
						}
						open = append(open, c)
					}
					return nil
				}
				giveWay := func(after time.Duration) {
					t.Helper()
					if err := d.GiveWay(after); err != nil {
						t.Fatal(err)
					}
				}
				wantAnsweredBy := func(by string) {
					t.Helper()
					if err := checkAnsweredBy(by); err != nil {
						t.Error(err)
					}
				}
				wantAnsweredBy("theirs")
				giveWay(0) // no effect
				wantAnsweredBy("theirs")
				mustReplace(t, d, ahead, services...)
				wantAnsweredBy("ours")
				giveWay(time.Hour)
				wantAnsweredBy("ours")
				giveWay(0)
				wantAnsweredBy("theirs")
				mustReplace(t, d, ahead, services...)
				wantAnsweredBy("ours")
				giveWay(50 * time.Millisecond)
				for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
					err := checkAnsweredBy("theirs")
					if err == nil {
						break
					}
					if time.Now().After(deadline) {
						t.Fatal(err)
					}
				}
				mustReplace(t, d, behind, services...)
				wantAnsweredBy("theirs")
				mustReplace(t, d, ahead, services...)
				wantAnsweredBy("ours")
			})
		}
	}
}

// TestRestartRevertsGiveWay starts a new instance while GiveWay is in effect, and after
// manual changes of the set. It also calls GiveWay while one of the tables is missing.
func TestRestartRevertsGiveWay(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	binary := nftBinaries(t)["1.1.3"]
	node := dataplane.Node{AheadOfOthers: true}
	ahead := func() string {
		return runNFT(t, ns, binary, "list set ip fairlead ahead") + runNFT(t, ns, binary, "list set ip6 fairlead ahead")
	}
	mustReplace(t, d, node)
	want := ahead()
	for name, disturb := range map[string]func() error{
		"give way":         func() error { return d.GiveWay(time.Hour) },
		"give way at once": func() error { return d.GiveWay(0) },
		"manual edit": func() error {
			runNFT(t, ns, binary, "flush set ip fairlead ahead; add element ip6 fairlead ahead { ipv4 timeout 1h }")
			return nil
		},
	} {
		if err := disturb(); err != nil {
			t.Fatal(err)
		}
		if ahead() == want {
			t.Fatalf("%s: no change", name)
		}
		d = openInNamespace(t, ns)
		mustReplace(t, d, node)
		if got := ahead(); got != want {
			t.Errorf("after %s and a warm restart:\n%s\nwant\n%s", name, got, want)
		}
		before := generation(t, d)
		mustReplace(t, d, node)
		if got := generation(t, d); got != before {
			t.Errorf("%s: an equal Replace made %d commits", name, got-before)
		}
	}
	runNFT(t, ns, binary, "delete table ip fairlead")
	if err := d.GiveWay(time.Hour); err != nil {
		t.Errorf("GiveWay with one table missing: %v", err)
	}
}
