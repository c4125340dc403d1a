package nft

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"

	"fairlead/dataplane"

	"github.com/vishvananda/netns"
)

func TestSmoke(t *testing.T) {
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	d, err := Open(Options{NetNS: int(ns)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	mk := func(name, fe string, proto dataplane.Protocol, eps ...string) *dataplane.Service {
		f := netip.MustParseAddrPort(fe)
		var es []dataplane.Endpoint
		for _, e := range eps {
			es = append(es, dataplane.Endpoint{Addr: netip.MustParseAddrPort(e), Local: true})
		}
		s, err := dataplane.NewService(dataplane.Key{Namespace: "default", Name: name, Family: dataplane.FamilyOf(f.Addr())},
			[]dataplane.Frontend{{Protocol: proto, Addr: f}}, es)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	svcs := []*dataplane.Service{
		mk("a", "10.96.0.1:80", dataplane.TCP, "10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"),
		mk("b", "10.96.0.2:53", dataplane.UDP),
		mk("a6", "[fd00:96::1]:80", dataplane.TCP, "[fd00:1::1]:8080", "[fd00:1::2]:8080"),
		mk("b6", "[fd00:96::2]:80", dataplane.SCTP),
	}
	node := dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:1::/64")}}
	ctx := context.Background()
	if err := d.Replace(ctx, node, slices.Values(svcs)); err != nil {
		t.Fatal(err)
	}
	got, err := d.Read(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := dataplane.StateOf(slices.Values(svcs)).Diff(got); diff != "" {
		t.Error(diff)
	}
	g1, _ := d.conn.GetGen()
	if err := d.Replace(ctx, node, slices.Values(svcs)); err != nil {
		t.Fatal(err)
	}
	g2, _ := d.conn.GetGen()
	t.Log(g1.ID, g2.ID)
	if g1.ID != g2.ID {
		t.Error("second replace wrote")
	}
	na := mk("a", "10.96.0.1:80", dataplane.TCP, "10.1.0.2:8080", "10.1.0.3:8080")
	if err := d.Apply(ctx, []dataplane.Change{{Old: svcs[0], New: na}}); err != nil {
		t.Fatal(err)
	}
	nft := os.Getenv("NFT")
	if nft == "" {
		nft = "nft"
	}
	out, err := exec.Command("sh", "-c", nft+" list ruleset").CombinedOutput()
	t.Log(string(out), err)
	exec.Command("nft", "flush", "ruleset").Run()
	<-d.Drift()
}
