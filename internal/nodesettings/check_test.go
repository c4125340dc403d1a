package nodesettings_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/nodesettings"

	"github.com/google/go-cmp/cmp"
)

// TestCheck checks the problems for several settings of a namespace with bridges.
func TestCheck(t *testing.T) {
	t.Parallel()
	ns := nettest.NamespaceT(t)
	do := func(fn func() error) {
		t.Helper()
		if err := ns.Do(fn); err != nil {
			t.Fatal(err)
		}
	}
	ip := func(command string) {
		t.Helper()
		do(func() error {
			if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
				return fmt.Errorf("ip %s: %w: %s", command, err, out)
			}
			return nil
		})
	}
	sysctl := func(file, value string) {
		t.Helper()
		do(func() error { return os.WriteFile(filepath.Join("/proc/sys/net", file), []byte(value), 0) })
	}
	check := func(pods nodesettings.PodNetwork, want ...string) {
		t.Helper()
		got := []string{}
		do(func() error {
			problems, err := nodesettings.Check(pods)
			for _, p := range problems {
				got = append(got, p.Setting+" "+p.Interface)
			}
			return err
		})
		if diff := cmp.Diff(append([]string{}, want...), got); diff != "" {
			t.Errorf("problems (-want +got):\n%s", diff)
		}
	}
	ip("link add cni0 type bridge")
	ip("link add docker0 type bridge")
	for i, br := range []string{"cni0", "cni0", "docker0", "docker0"} {
		if i != 1 { // the second port of cni0 is added later
			ip(fmt.Sprintf("link add p%d type veth peer name q%d", i, i))
			ip(fmt.Sprintf("link set p%d master %s", i, br))
		}
	}
	ip("addr add 10.244.1.1/24 dev cni0")
	ip("addr add 172.17.0.1/16 dev docker0")
	sysctl("bridge/bridge-nf-call-iptables", "0")
	sysctl("bridge/bridge-nf-call-ip6tables", "0")
	for _, conf := range []string{"all", "cni0", "docker0", "p0"} {
		sysctl("ipv4/conf/"+conf+"/route_localnet", "0")
	}
	sysctl("ipv4/ip_forward", "1")
	pods := nodesettings.PodNetwork{CIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10::/64")}}
	check(pods) // a single pod has no connections over the bridge
	ip("link add p1 type veth peer name q1")
	ip("link set p1 master cni0")
	check(pods, "net.bridge.bridge-nf-call-iptables cni0")
	check(nodesettings.PodNetwork{Bridge: "docker0"}, "net.bridge.bridge-nf-call-iptables docker0")
	check(nodesettings.PodNetwork{}, "net.bridge.bridge-nf-call-iptables cni0", "net.bridge.bridge-nf-call-iptables docker0")
	check(nodesettings.PodNetwork{CIDRs: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}})
	ip("addr add fd00:10::1/64 dev cni0 nodad")
	check(pods, "net.bridge.bridge-nf-call-ip6tables cni0", "net.bridge.bridge-nf-call-iptables cni0")
	sysctl("bridge/bridge-nf-call-iptables", "1")
	check(pods, "net.bridge.bridge-nf-call-ip6tables cni0")
	sysctl("bridge/bridge-nf-call-ip6tables", "1")
	check(pods)
	sysctl("ipv4/ip_forward", "0")
	check(pods, "net.ipv4.ip_forward all")
	sysctl("ipv4/ip_forward", "1")
	for program, chain := range map[string]string{
		"iptables-nft": "chain ip filter FORWARD", "ip6tables-nft": "chain ip6 filter FORWARD", "iptables-legacy": "chain FORWARD of iptables-legacy",
	} {
		for _, policy := range []string{"DROP", "ACCEPT"} {
			do(func() error {
				if out, err := exec.Command(program, "-P", "FORWARD", policy).CombinedOutput(); err != nil {
					return fmt.Errorf("%s: %w: %s", program, err, out)
				}
				return nil
			})
			if policy == "DROP" {
				check(pods, chain+" all")
			}
		}
		check(pods)
	}
	sysctl("ipv4/conf/p0/route_localnet", "1")
	check(pods, "net.ipv4.conf.p0.route_localnet p0")
	sysctl("ipv4/conf/all/route_localnet", "1")
	check(pods, "net.ipv4.conf.all.route_localnet all")
}

// TestWatcher checks the log messages and problems while a setting changes.
func TestWatcher(t *testing.T) {
	t.Parallel()
	ns := nettest.NamespaceT(t)
	if err := ns.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) }); err != nil {
		t.Fatal(err)
	}
	set := func(value string) error {
		return os.WriteFile("/proc/sys/net/ipv4/conf/all/route_localnet", []byte(value), 0)
	}
	var log bytes.Buffer
	w := nodesettings.New(nodesettings.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	err := ns.Do(func() error {
		for _, step := range []struct {
			value          string
			warned, fixed  int
			wantedProblems int
		}{{"1", 1, 0, 1}, {"1", 1, 0, 1}, {"0", 1, 1, 0}, {"1", 2, 1, 1}} {
			if err := set(step.value); err != nil {
				return err
			}
			w.Update(t.Context())
			warned, fixed := strings.Count(log.String(), "level=WARN"), strings.Count(log.String(), "no longer a problem")
			if warned != step.warned || fixed != step.fixed || len(w.Problems()) != step.wantedProblems {
				t.Errorf("after route_localnet=%s: problems %v, log:\n%s", step.value, w.Problems(), &log)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"net.ipv4.conf.all.route_localnet", "fix="} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not contain %q:\n%s", want, &log)
		}
	}
}
