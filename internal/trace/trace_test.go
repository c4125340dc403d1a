package trace_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/trace"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/kube/kubetest"
	"fairlead.io/fairlead/nft"
)

// TestExplain explains connections to the Services of a node whose kernel holds the desired state,
// and compares the explanation with where the connections go.
func TestExplain(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	client, pod := network.PodT(t, "client"), network.PodT(t, "web")
	pod.ServeT(t, nettest.TCP, 8080)
	tracker := kube.NewTracker(kube.Options{
		NodeName: "here", DetectLocal: kube.DetectLocal{ClusterCIDRs: network.PodCIDRs},
		Balancing: kube.Balancing{Schedulers: map[string]string{"round-robin": dataplane.RoundRobin, "source-hash": dataplane.SourceHash}},
	})
	web := kubetest.Service("shop", "web", netip.MustParseAddr("10.96.0.10"))
	web.Spec.SessionAffinity = "ClientIP"
	slice := kubetest.EndpointSlice("shop", "web", pod.IPv4, time.Unix(0, 0))
	notReady := slice.Endpoints[0].DeepCopy()
	notReady.Addresses, notReady.Conditions.Ready = []string{"10.244.9.9"}, new(false)
	slice.Endpoints = append(slice.Endpoints, *notReady)
	empty := kubetest.Service("shop", "empty", netip.MustParseAddr("10.96.0.11"))
	delta := kube.Delta{Node: kubetest.Node("here", network.Node.IPv4.String()), LocalAddrs: network.Node.Addrs()}
	delta.Services = append(delta.Services, web, empty)
	delta.EndpointSlices = append(delta.EndpointSlices, slice)
	for i, balancing := range []string{"source-hash", "round-robin"} {
		s := kubetest.Service("shop", balancing, netip.AddrFrom4([4]byte{10, 96, 0, byte(20 + i)}))
		s.Annotations = map[string]string{kube.AnnotationBalancing: balancing}
		two := kubetest.EndpointSlice("shop", balancing, pod.IPv4, time.Unix(0, 0))
		other := two.Endpoints[0].DeepCopy()
		other.Addresses = []string{"10.244.9.8"}
		two.Endpoints = append(two.Endpoints, *other)
		delta.Services, delta.EndpointSlices = append(delta.Services, s), append(delta.EndpointSlices, two)
	}
	result := tracker.Apply(delta)
	desired := &trace.Desired{
		Tracker: tracker, Node: *result.Node, Pods: map[netip.Addr]trace.Pod{pod.IPv4: {Name: "shop/web-1", Node: "here"}},
	}
	for _, s := range result.Changes {
		desired.Services = append(desired.Services, s)
	}
	dp, err := nft.Open(nft.Options{NetNS: network.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dp.Close() })
	if err := dp.Replace(t.Context(), desired.Node, slices.Values(desired.Services), nil); err != nil {
		t.Fatal(err)
	}
	host, err := trace.OpenHost(network.Node.Fd(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(host.Close)
	walker, err := nft.NewWalker(nft.Options{NetNS: network.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = walker.Close() })
	explain := func(t *testing.T, to string) *trace.Report {
		t.Helper()
		c := trace.Connection{
			Client: "shop/client", Target: to, Source: client.IPv4, Destination: netip.MustParseAddrPort(to), Protocol: "TCP",
			Interface: client.NodeInterface(),
		}
		r, err := trace.Explain(c, dataplane.TCP, host, walker, desired)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	check := func(t *testing.T, r *trace.Report, want ...string) {
		t.Helper()
		var text strings.Builder
		if err := r.WriteText(&text); err != nil {
			t.Fatal(err)
		}
		rest := text.String()
		for _, part := range want {
			_, after, ok := strings.Cut(rest, part)
			if !ok {
				t.Fatalf("the text does not contain %q in this place:\n%s", part, text.String())
			}
			rest = after
		}
	}
	t.Run("an endpoint, and why another is none", func(t *testing.T) {
		r := explain(t, "10.96.0.10:80")
		check(t, r, "is a frontend of Service shop/web", "spec.clusterIPs, spec.ports[0]", "spec.internalTrafficPolicy",
			"no endpoint is remembered", "1 of 2 can receive", "shop/web-1", "candidate", "no: conditions.ready is false", "No masquerade",
			fmt.Sprintf("Result: source %s, destination %s:8080", client.IPv4, pod.IPv4))
		if len(r.Differences) > 0 {
			t.Errorf("differences %q, want none", r.Differences)
		}
		answer, err := client.Connect(t.Context(), nettest.TCP, netip.MustParseAddrPort("10.96.0.10:80"))
		if err != nil {
			t.Fatal(err)
		}
		if answer.Endpoint != r.Results[0].Destination || answer.Source.Addr() != r.Results[0].Source {
			t.Errorf("the connection reached %s from %s, explained as %+v", answer.Endpoint, answer.Source, r.Results[0])
		}
	})
	t.Run("session affinity remembers the endpoint", func(t *testing.T) {
		check(t, explain(t, "10.96.0.10:80"), "the rules remember "+pod.IPv4.String()+":8080 for the client for another")
	})
	t.Run("no endpoints", func(t *testing.T) {
		check(t, explain(t, "10.96.0.11:80"), "is a frontend of Service shop/empty", "Rejected: the endpoint list", "EndpointSlices", "Result: rejected")
	})
	t.Run("undeclared port", func(t *testing.T) {
		check(t, explain(t, "10.96.0.10:81"), "No frontend", "Rejected: 10.96.0.10 is a cluster IP", "Service shop/web, spec.ports", "Result: rejected")
	})
	t.Run("balancing", func(t *testing.T) {
		const field = "metadata.annotations[fairlead.io/balancing]"
		hashed := explain(t, "10.96.0.20:80")
		check(t, hashed, "2 of 2 can receive", "The hash of the client's address "+client.IPv4.String()+" selects slot ", " of 1024", "Service shop/source-hash, "+field)
		inTurn := explain(t, "10.96.0.21:80")
		check(t, inTurn, "2 of 2 can receive", "in turn", "Service shop/round-robin, "+field, "Result: one of 2, selected in turn")
		if len(hashed.Results) != 1 || len(inTurn.Results) != 2 || len(hashed.Differences)+len(inTurn.Differences) > 0 {
			t.Errorf("results %v and %v, differences %q and %q", hashed.Results, inTurn.Results, hashed.Differences, inTurn.Differences)
		}
	})
	t.Run("the kernel differs", func(t *testing.T) {
		for _, s := range desired.Services {
			if s.Key.Name == "web" {
				if err := dp.Apply(t.Context(), []dataplane.Change{{Old: s}}); err != nil {
					t.Fatal(err)
				}
			}
		}
		check(t, explain(t, "10.96.0.10:80"), "The kernel differs", "no Service in the kernel, and to Service shop/web", "sends no connections to "+pod.IPv4.String())
	})
}

// TestFollow follows one connection of a client that keeps opening connections.
func TestFollow(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	client, pod := network.PodT(t, "client"), network.PodT(t, "web")
	pod.ServeT(t, nettest.TCP, 8080)
	frontend, endpoint := netip.MustParseAddrPort("10.96.0.10:80"), netip.AddrPortFrom(pod.IPv4, 8080)
	service, err := dataplane.NewService(dataplane.Key{Namespace: "shop", Name: "web", Family: dataplane.IPv4},
		[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: frontend}},
		dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: endpoint, Local: true}}})
	if err != nil {
		t.Fatal(err)
	}
	dp, err := nft.Open(nft.Options{NetNS: network.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dp.Close() })
	if err := dp.Replace(t.Context(), dataplane.Node{PodCIDRs: network.PodCIDRs}, slices.Values([]*dataplane.Service{service}), nil); err != nil {
		t.Fatal(err)
	}
	host, err := trace.OpenHost(network.Node.Fd(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(host.Close)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	followed := make(chan struct{})
	var clients sync.WaitGroup
	path, err := trace.Follow(ctx, trace.Connection{Source: client.IPv4, Destination: frontend}, dataplane.TCP, host, func() {
		clients.Go(func() {
			for {
				select {
				case <-followed:
					return
				case <-time.After(50 * time.Millisecond):
					if _, err := client.Connect(ctx, nettest.TCP, frontend); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	})
	close(followed)
	clients.Wait()
	if err != nil || ctx.Err() != nil {
		t.Fatalf("Follow returned %v; context: %v", err, ctx.Err())
	}
	if want := []netip.AddrPort{frontend, endpoint}; !slices.Equal(path.Destinations, want) || path.VirtualServer.IsValid() {
		t.Errorf("destinations %s, virtual server %s; want %s and none", path.Destinations, path.VirtualServer, want)
	}
}

// TestResolve checks how destinations are found.
func TestResolve(t *testing.T) {
	t.Parallel()
	frontend := func(service, port string, p dataplane.Protocol, addr string) trace.NamedFrontend {
		return trace.NamedFrontend{Namespace: "shop", Service: service, Port: port, Frontend: dataplane.Frontend{Protocol: p, Addr: netip.MustParseAddrPort(addr)}}
	}
	frontends := []trace.NamedFrontend{
		frontend("web", "http", dataplane.TCP, "10.96.0.10:80"), frontend("web", "http", dataplane.TCP, "[fd00::10]:80"),
		frontend("dns", "udp", dataplane.UDP, "10.96.0.53:53"), frontend("dns", "tcp", dataplane.TCP, "10.96.0.53:53"),
		frontend("log", "", dataplane.UDP, "10.96.0.14:514"),
	}
	for _, test := range []struct{ text, want, err string }{
		{text: "web", want: "10.96.0.10:80/TCP"},
		{text: "shop/web:http", want: "10.96.0.10:80/TCP"},
		{text: "web.shop.svc.cluster.local:80/tcp", want: "10.96.0.10:80/TCP"},
		{text: "web:81", want: "10.96.0.10:81/TCP"},
		{text: "dns/UDP", want: "10.96.0.53:53/UDP"},
		{text: "dns", err: "use TO:PORT with one of tcp (53/TCP), udp (53/UDP)"},
		{text: "10.96.0.14:514", want: "10.96.0.14:514/UDP"},
		{text: "10.96.0.14", want: "10.96.0.14:514/UDP"},
		{text: "[fd00::10]:80", want: "[fd00::10]:80/TCP"},
		{text: "fd00::10", want: "[fd00::10]:80/TCP"},
		{text: "localhost:30080/UDP", want: "127.0.0.1:30080/UDP"},
		{text: "192.0.2.1", err: "no port is given"},
		{text: "wbe", err: `did you mean "web"?`},
		{text: "web:htp", err: `no port "htp": use one of http (80/TCP)`},
		{text: "[fd00::10", err: "use [ADDRESS]:PORT"},
		{text: ":80", err: "no Service, host name or address"},
	} {
		t.Run(test.text, func(t *testing.T) {
			t.Parallel()
			target, err := trace.ParseTarget(test.text)
			var addr netip.AddrPort
			var p dataplane.Protocol
			if err == nil {
				addr, p, err = target.Resolve(frontends, "shop", dataplane.IPv4)
			}
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("error %v, want %q", err, test.err)
				}
				return
			}
			if got := fmt.Sprintf("%s/%s", addr, p); err != nil || got != test.want {
				t.Errorf("%s, error %v, want %s", got, err, test.want)
			}
		})
	}
}
