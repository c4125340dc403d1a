package nfhooks

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/nettest"
)

// TestTranslators lists what translates connections, whether or not the kernel lists the
// functions of hooks. IPVS is expected if the kernel has it and lists functions.
func TestTranslators(t *testing.T) {
	t.Parallel()
	ns, err := nettest.NewNamespace("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
	})
	run := func(commands string) error {
		return ns.Do(func() error {
			out, err := exec.Command("sh", "-ec", commands).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", commands, err, out)
			}
			return nil
		})
	}
	if err := run(`
		nft 'table ip other { chain late { type nat hook prerouting priority 10; }; chain out { type nat hook output priority -100; }; chain in { type nat hook input priority 100; }; }'
		nft 'table inet both { chain early { type nat hook prerouting priority -110; }; chain filter { type filter hook prerouting priority -200; }; }'
		iptables-nft -t nat -A POSTROUTING -j ACCEPT
		ip6tables-nft -t nat -A PREROUTING -j ACCEPT
		iptables-legacy -t nat -A PREROUTING -j ACCEPT`); err != nil {
		t.Fatal(err)
	}
	hasIPVS := run("ipvsadm -A -t 10.0.0.1:80; ipvsadm -A -t [fd00::1]:80") == nil
	list := func(family string, hook Hook) (names []string) {
		t.Helper()
		err := ns.Do(func() error {
			c, err := Dial()
			if err != nil {
				return err
			}
			defer c.Close()
			chains, err := c.Chains()
			if err != nil {
				return err
			}
			if _, err := c.Functions(family, hook); err != nil {
				t.Logf("functions at %s %s: %v", family, hook, err)
				hasIPVS = false
			}
			functions, err := c.Translators(chains, family, hook)
			for _, f := range functions {
				names = append(names, fmt.Sprintf("%d %s", f.Priority, f.Name))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	for _, test := range []struct {
		family string
		hook   Hook
		want   []string
	}{
		{"ip", Prerouting, []string{"-110 chain inet both early", "-100 table nat of iptables-legacy", "10 chain ip other late"}},
		{"ip", Input, []string{"99 ip_vs_in_hook of module ip_vs"}},
		{"ip", Output, []string{"-100 chain ip other out", "-100 table nat of iptables-legacy", "-98 ip_vs_in_hook of module ip_vs"}},
		{"ip6", Prerouting, []string{"-110 chain inet both early", "-100 chain ip6 nat PREROUTING"}},
		{"ip6", Input, []string{"99 ip_vs_in_hook of module ip_vs"}},
		{"ip6", Output, []string{"-98 ip_vs_in_hook of module ip_vs"}},
	} {
		got := list(test.family, test.hook)
		var want []string
		for _, name := range test.want {
			if hasIPVS || !strings.Contains(name, "ip_vs") {
				want = append(want, name)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s %s (-want +got):\n%s", test.family, test.hook, diff)
		}
	}
}

// TestFunctions lists all functions at a hook, in their order.
func TestFunctions(t *testing.T) {
	t.Parallel()
	ns, err := nettest.NewNamespace("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
	})
	err = ns.Do(func() error {
		const chains = "table ip x { chain z { type filter hook forward priority 7; }; }; table inet x { chain y { type filter hook forward priority -7; }; chain n { type nat hook output priority 0; }; }"
		if out, err := exec.Command("nft", chains).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		c, err := Dial()
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Functions("ip", Forward); errors.Is(err, ErrUnsupported) {
			return err
		}
		for _, test := range []struct {
			family string
			hook   Hook
			want   []Function
		}{
			{"ip", Forward, []Function{{-7, "chain inet x y"}, {7, "chain ip x z"}}},
			{"ip6", Forward, []Function{{-7, "chain inet x y"}}},
			{"ip", Output, []Function{{-100, "nf_nat_ipv4_local_fn of module nf_nat"}}},
		} {
			got, err := c.Functions(test.family, test.hook)
			if err != nil {
				return err
			}
			// Connection tracking and security modules have functions, too.
			var known []Function
			for _, f := range got {
				if strings.Contains(f.Name, "chain") || strings.Contains(f.Name, "nf_nat") {
					known = append(known, f)
				}
			}
			if diff := cmp.Diff(test.want, known); diff != "" {
				t.Errorf("%s %s (-want +got):\n%s", test.family, test.hook, diff)
			}
		}
		return nil
	})
	if errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}
