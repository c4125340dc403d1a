package flowoffload

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
)

// TestPacketCost limits the expressions that the table evaluates for a packet on the normal path. Offloaded
// packets do not pass the chains. Every forwarded packet pays the first two rows while the option is set.
func TestPacketCost(t *testing.T) {
	t.Parallel()
	table := newTable(DefaultThreshold, false, true)
	// conditions returns after how many expressions each condition of the rule can end it.
	conditions := func(exprs []expr.Any) (ends []int) {
		for i, e := range exprs {
			switch e.(type) {
			case *expr.Cmp, *expr.Lookup:
				ends = append(ends, i+1)
			}
		}
		return ends
	}
	forward := conditions(table.forwardRule())
	offload := table.offloadRule(table.frontends4, false)
	for i, row := range []struct {
		packet string
		got    int
		want   int
	}{
		{"not translated", forward[0], 3},
		{"translated, first of the connection", forward[1], 6},
		{"translated, through other interfaces", forward[2], 8},
		{"translated, below the threshold", forward[len(forward)-1], 13},
		{"offloads the connection", len(table.forwardRule()) + len(offload), 14 + 9},
	} {
		if row.got != row.want {
			t.Errorf("row %d, a packet that is %s: %d expressions, want %d", i, row.packet, row.got, row.want)
		}
	}
	if i := slices.IndexFunc(offload, func(e expr.Any) bool { _, ok := e.(*expr.FlowOffload); return ok }); i < 0 {
		t.Error("no rule offloads connections")
	}
}

// TestDeviceChangeCost checks that a device that comes or goes costs at most two commits, one for the
// flowtable and one for the set of devices, whatever the number of Services. Changes of endpoints cost none.
func TestDeviceChangeCost(t *testing.T) {
	n := newTestNode(t)
	const count = 1000
	services := make([]*dataplane.Service, count)
	service := func(i, pod int) *dataplane.Service {
		return dataplanetest.NewService(t, fmt.Sprintf("web%d", i), dataplane.ClusterIP,
			dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, pod)}, fmt.Sprintf("tcp 10.96.%d.%d:80", 1+i/250, 1+i%250))
	}
	for i := range services {
		services[i] = service(i, 1)
	}
	n.replace(services...)
	conn, err := nftables.New(nftables.WithNetNSFd(n.Node.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	generation := func() uint32 {
		t.Helper()
		g, err := conn.GetGen()
		if err != nil {
			t.Fatal(err)
		}
		return g.ID
	}
	for _, step := range []struct {
		name     string
		min, max uint32 // commits
		change   func()
	}{
		{"a device comes", 2, 2, func() { n.addPod("new"); n.awaitDevices() }},
		// Some kernels remove the device from the flowtable themselves.
		{"a device goes", 1, 2, func() {
			if err := n.pods[len(n.pods)-1].Close(); err != nil {
				t.Fatal(err)
			}
			n.awaitDevices()
		}},
		// The commit is the backend's.
		{"an endpoint changes", 1, 1, func() { n.apply(dataplane.Change{Old: services[0], New: service(0, 2)}) }},
	} {
		before := generation()
		step.change()
		if commits := generation() - before; commits < step.min || commits > step.max {
			t.Errorf("%s: %d commits, want %d to %d", step.name, commits, step.min, step.max)
		}
	}
}
