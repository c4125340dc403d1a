//go:build ipvs

package inspect

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/ipvs"
)

// TestReadIPVS reads the state of a node in mode ipvs: an endpoint drains with a connection, and a
// deleted Service as well.
func TestReadIPVS(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	a, b := network.PodT(t, "a"), network.PodT(t, "b")
	a.ServeT(t, nettest.TCP, 8080)
	b.ServeT(t, nettest.TCP, 8080)
	d, err := ipvs.Open(ipvs.Options{NetNS: network.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	node := dataplane.Node{NodePortAddrs: []netip.Addr{network.Node.IPv4}}
	at := func(pod *nettest.Host) netip.AddrPort { return netip.AddrPortFrom(pod.IPv4, 8080) }
	spec := func(pod *nettest.Host) dataplane.ServiceSpec {
		return dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: at(pod), Local: true}}, Affinity: time.Hour}
	}
	replace := func(services ...*dataplane.Service) {
		t.Helper()
		if err := d.Replace(t.Context(), node, slices.Values(services), nil); err != nil {
			t.Fatal(err)
		}
	}
	web := func(pod *nettest.Host) []*dataplane.Service {
		return []*dataplane.Service{
			newService(t, "web", dataplane.ClusterIP, "10.96.0.10:80", spec(pod)),
			newService(t, "web", dataplane.NodePort, "0.0.0.0:30080", spec(pod)),
			newService(t, "web", dataplane.ExternalIP, "203.0.113.1:80", spec(pod)),
		}
	}
	gone := newService(t, "gone", dataplane.ClusterIP, "10.96.0.11:80", spec(a))
	replace(append(web(a), gone)...)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, addr := range []string{"10.96.0.10:80", "10.96.0.11:80"} {
		conn, err := network.Outside.Dial(ctx, "tcp", netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	replace(web(b)...)

	var k *Kernel
	for {
		if k, err = Read(ctx, Options{NetNS: network.Node.Fd()}); err != nil {
			t.Fatal(err)
		}
		if f := k.Frontends[0]; f.Stats != nil && f.Stats.InPackets > 0 { // the kernel updates statistics every two seconds
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	want, err := d.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := dataplane.State{}
	for _, f := range k.Frontends {
		if f.Binding.Scheduler != ipvs.DefaultScheduler {
			t.Errorf("%s: scheduler %q, want %q", f.Frontend, f.Binding.Scheduler, ipvs.DefaultScheduler)
		}
		binding := f.Binding
		binding.Scheduler = ""
		got[f.Frontend] = binding
		if f.Kind != dataplane.ClusterIP {
			continue
		}
		if len(f.Endpoints) != 2 || f.Stats == nil || f.Stats.Connections != 1 || f.Stats.InPackets == 0 {
			t.Fatalf("%s: endpoints %+v, statistics %+v", f.Frontend, f.Endpoints, f.Stats)
		}
		for _, e := range f.Endpoints {
			if drains := e.Addr == at(a); e.Draining() != drains || drains != (e.Connections == 1) || drains != (e.Stats.Connections == 1) {
				t.Errorf("endpoint %+v, statistics %+v", e, e.Stats)
			}
		}
	}
	if diff := want.Diff(got); diff != "" || len(got) != 3 {
		t.Errorf("%d frontends\n%s", len(got), diff)
	}
	if len(k.Retiring) != 1 || k.Retiring[0].Addr != gone.Frontends[0].Addr || len(k.Retiring[0].Destinations) != 1 || k.Retiring[0].Destinations[0].Active != 1 {
		t.Errorf("retiring virtual servers %+v, want the one of %s with a connection", k.Retiring, gone.Key)
	}
	if k.Mode != "ipvs" || !k.ConnectionsCounted || len(k.Warnings) != 0 {
		t.Errorf("mode %s, connections counted %v, warnings %q", k.Mode, k.ConnectionsCounted, k.Warnings)
	}
	if _, err := Read(t.Context(), Options{NetNS: network.Node.Fd(), Mode: "nft"}); err == nil {
		t.Error("mode nft can be read, although it is not programmed")
	}
}
