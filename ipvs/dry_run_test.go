//go:build ipvs

package ipvs

import (
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// dryRun returns the result of a dry run of Replace by another Dataplane. It fails the test if the
// kernel's virtual servers change.
func (n *topology) dryRun(services ...*dataplane.Service) dataplane.DryRun {
	n.t.Helper()
	var dryRun dataplane.DryRun
	opts := n.opts
	opts.DryRun = &dryRun
	d, err := Open(opts)
	if err != nil {
		n.t.Fatal(err)
	}
	before := n.dump("10.96.0.1:80")
	node := dataplane.Node{PodCIDRs: n.PodCIDRs, NodePortAddrs: n.Node.Addrs()}
	if err := d.Replace(n.t.Context(), node, slices.Values(services), nil); err != nil {
		n.t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		n.t.Fatal(err)
	}
	n.expectDump("10.96.0.1:80", before)
	return dryRun
}

// TestDryRun checks that a dry run records what Replace would write, and writes nothing.
func TestDryRun(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 2)
	cold := n.dryRun(n.web(dataplane.TCP, 0, 1))
	if cold.Writes[dataplane.Write{Op: dataplane.Add, Object: "destination", Name: "10.96.0.1:80/TCP"}] != 2 {
		t.Errorf("writes without Services: %v, want 2 destinations", cold.Writes)
	}
	n.replace(n.web(dataplane.TCP, 0, 1))
	if warm := n.dryRun(n.web(dataplane.TCP, 0, 1)); len(warm.Writes) > 0 || len(warm.Differences) > 0 {
		t.Errorf("programmed: writes %v, differences %v, want none", warm.Writes, warm.Differences)
	}
	if less := n.dryRun(n.web(dataplane.TCP, 0)); less.Writes[dataplane.Write{Op: dataplane.Modify, Object: "destination", Name: "10.96.0.1:80/TCP"}] != 1 {
		t.Errorf("an endpoint is removed: writes %v, want one changed destination", less.Writes)
	}
}

// TestDryRunCreatesNothing checks a dry run on a node without any state of this package.
func TestDryRunCreatesNothing(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	var dryRun dataplane.DryRun
	d, err := Open(Options{NetNS: network.Node.Fd(), DryRun: &dryRun})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Replace(t.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service{}), nil); err != nil {
		t.Fatal(err)
	}
	var objects []string
	for _, difference := range dryRun.Differences {
		objects = append(objects, difference.Object+": "+difference.Problem)
	}
	for _, want := range []string{"interface fairlead0: missing", "routing rule IPv4 lookup 64029: missing", "table ip fairlead-ipvs: missing", "sysctl net.ipv4.vs.conntrack: "} {
		if !slices.ContainsFunc(objects, func(o string) bool { return strings.HasPrefix(o, want) }) {
			t.Errorf("differences %q lack %q", objects, want)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	h, err := openHost(network.Node.Fd())
	if err != nil {
		t.Fatal(err)
	}
	defer h.close() //nolint:errcheck // only read from
	if _, err := h.handle.LinkByName(LinkName); err == nil {
		t.Errorf("the dry run has created interface %s", LinkName)
	}
}
