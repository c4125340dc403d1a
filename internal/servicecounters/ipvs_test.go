//go:build ipvs

package servicecounters

import (
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
	"fairlead.io/fairlead/ipvs"
)

// TestCountsIPVS compares the counters with the answers of endpoints that IPVS has selected.
func TestCountsIPVS(t *testing.T) {
	n := newTestNode(t)
	inner, err := ipvs.Open(ipvs.Options{NetNS: n.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	_ = n.dp.Close()
	if n.dp, err = New(inner, Options{NetNS: n.Node.Fd(), Services: []Selector{{Namespace: "default"}}}); err != nil {
		t.Fatal(err)
	}
	spec := dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, 0, 1)}
	external := spec
	external.Masquerade = dataplane.MasqueradeAlways
	n.replace(t,
		dataplanetest.NewService(t, "web", dataplane.ClusterIP, spec, "tcp 10.96.0.10:80"),
		dataplanetest.NewService(t, "web", dataplane.NodePort, external, "tcp 0.0.0.0:30080"),
		dataplanetest.NewService(t, "web6", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv6, 0, 1)}, "tcp [fd00:96::10]:80"),
		dataplanetest.NewService(t, "dns", dataplane.ClusterIP, spec, "udp 10.96.0.53:53"),
	)
	want := map[string]uint64{}
	n.connect(t, want, "web", dataplane.ClusterIP, 5, "tcp 10.96.0.10:80")
	n.connect(t, want, "web", dataplane.NodePort, 4, "tcp 192.0.2.1:30080")
	n.connect(t, want, "web6", dataplane.ClusterIP, 3, "tcp [fd00:96::10]:80")
	n.connect(t, want, "dns", dataplane.ClusterIP, 3, "udp 10.96.0.53:53")
	n.check(t, "start", want)
}
