package inspect

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// TestConnections checks that an open connection through a Service is counted, and that a closed
// one and an untranslated one are not.
func TestConnections(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	pod := network.PodT(t, "a")
	pod.ServeT(t, nettest.TCP, 8080)
	endpoint, frontend := netip.AddrPortFrom(pod.IPv4, 8080), netip.MustParseAddrPort("10.96.0.10:80")
	d, err := nft.Open(nft.Options{NetNS: network.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	s, err := dataplane.NewService(
		dataplane.Key{Namespace: "default", Name: "web", Family: dataplane.IPv4},
		[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: frontend}},
		dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: endpoint}}},
	)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Replace(t.Context(), dataplane.Node{}, func(yield func(*dataplane.Service) bool) { yield(s) }, nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, addr := range []netip.AddrPort{frontend, endpoint} { // the second is not translated
		conn, err := network.Outside.Dial(ctx, "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	if _, err := network.Outside.Connect(ctx, nettest.TCP, frontend); err != nil { // closes the connection
		t.Fatal(err)
	}
	want := conntrack.Connection{Protocol: dataplane.TCP, Destination: frontend, Endpoint: endpoint}
	for {
		var got []conntrack.Connection
		err := conntrack.VisitConnections(ctx, network.Node.Fd(), func(c conntrack.Connection) { got = append(got, c) })
		if err != nil {
			t.Fatal(err)
		}
		if len(got) == 1 && got[0] == want {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("connections %+v, want one %+v", got, want)
		}
		time.Sleep(10 * time.Millisecond) // the end of the connection may not have arrived
	}
	if n, err := conntrack.Count(ctx, network.Node.Fd()); err != nil || n != 3 {
		t.Errorf("%d entries, error %v; want 3", n, err)
	}
}
