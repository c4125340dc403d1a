package nft_test

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// TestFollow follows a connection through the rules to its endpoint, and checks that the table
// that marks packets is gone afterwards and is no drift.
func TestFollow(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	client, pod := network.PodT(t, "client"), network.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, 8080)
	frontend, endpoint := netip.MustParseAddrPort("10.96.0.10:80"), netip.AddrPortFrom(pod.IPv4, 8080)
	svc, err := dataplane.NewService(dataplane.Key{Namespace: "default", Name: "web", Family: dataplane.IPv4},
		[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: frontend}},
		dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: endpoint, Local: true}}})
	if err != nil {
		t.Fatal(err)
	}
	dp := open(t, network.Node.Fd())
	t.Cleanup(func() { _ = dp.Close() })
	if err := dp.Replace(t.Context(), dataplane.Node{PodCIDRs: network.PodCIDRs}, slices.Values([]*dataplane.Service{svc}), nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var events []nft.TraceEvent
	connected := make(chan error, 1)
	err = nft.Follow(ctx, nft.FollowOptions{
		NetNS: network.Node.Fd(), Source: client.IPv4, Destination: frontend, Protocol: dataplane.TCP,
		Started: func() {
			go func() {
				_, err := client.Connect(ctx, nettest.TCP, frontend)
				connected <- err
			}()
		},
	}, func(e nft.TraceEvent) bool {
		events = append(events, e)
		return e.Chain != "nat-postrouting" || e.Rule != 0
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-connected; err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"goto class-1", "jump translate"} {
		if !slices.ContainsFunc(events, func(e nft.TraceEvent) bool { return e.Table == nft.TableName && e.Verdict == want && e.Rule > 0 }) {
			t.Errorf("no rule with the verdict %q in %+v", want, events)
		}
	}
	if !slices.ContainsFunc(events, func(e nft.TraceEvent) bool { return e.Destination == endpoint }) {
		t.Errorf("no event with the destination %s in %+v", endpoint, events)
	}
	conn, err := nftables.New(nftables.WithNetNSFd(network.Node.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	// The kernel deletes the table when it closes the socket.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		tables, err := conn.ListTables()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(tables, func(table *nftables.Table) bool { return table.Name == "fairlead-trace" }) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the table that marks packets still exists")
		}
	}
	select {
	case <-dp.Drift():
		t.Error("the table that marks packets counts as drift")
	default:
	}
}
