package dataplanetest

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// probeResult is the response to an echo request or another probe packet.
type probeResult string

const (
	answered   probeResult = "answered"
	refused    probeResult = "refused"
	unanswered probeResult = "unanswered"
)

// probe sends a probe packet and classifies the result. It waits longer if it wants a
// response.
func probe(t *testing.T, want probeResult, send func(context.Context) error) (probeResult, error) {
	t.Helper()
	timeout := 3 * time.Second
	if want == unanswered {
		timeout = retransmission / 2
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	err := send(ctx)
	switch {
	case err == nil:
		return answered, nil
	case errors.Is(err, nettest.ErrRefused):
		return refused, err
	case errors.Is(err, nettest.ErrTimeout):
		return unanswered, err
	}
	return "", err
}

func expectPing(t *testing.T, from *nettest.Host, addr netip.Addr, want probeResult) {
	t.Helper()
	got, err := probe(t, want, func(ctx context.Context) error { return from.Ping(ctx, addr) })
	if got != want {
		t.Errorf("ping from %s to %s is %q (error %v), want %s", from.Name, addr, got, err, want)
	}
}

// The last bytes of the addresses that the ping tests use.
const (
	pingClusterIP          = iota + 1 // a cluster IP with an endpoint
	pingEmptyClusterIP                // a cluster IP without endpoints
	pingExternalIP                    // an external IP with an endpoint
	pingNoLocalEndpoint               // only remote endpoints: answers the node and its pods
	pingLocalEndpointsOnly            // only local endpoints: answers other clients
	pingSourceRanges                  // a Service with source ranges
	pingShared                        // two Services, one with an endpoint
	pingEmptyLoadBalancer             // a load-balancer IP without endpoints
	pingUnused             = 200      // not used by any Service
)

// pingServices returns a Service for each kind of address, with these pods as endpoints.
func (topo *topology) pingServices(pods ...int) []*dataplane.Service {
	topo.t.Helper()
	var all []*dataplane.Service
	for _, family := range families() {
		some := topo.specOf(topo.endpoints(family, pods...))
		inside, outside, ranged := some, some, some
		inside.ExternalTrafficPolicyLocal = true
		outside.ExternalTrafficPolicyLocal, outside.Endpoints, outside.LocalEndpoints = true, nil, some.Endpoints
		ranged.SourceRanges = []netip.Prefix{netip.PrefixFrom(vip(family, 0, 0).Addr(), 0).Masked()}
		add := func(kind dataplane.Kind, name string, p dataplane.Protocol, n byte, spec dataplane.ServiceSpec) {
			all = append(all, topo.serviceOfKind(kind, name, p, vip(family, n, 80), spec))
		}
		add(dataplane.ClusterIP, "cluster", dataplane.TCP, pingClusterIP, some)
		add(dataplane.ClusterIP, "empty", dataplane.TCP, pingEmptyClusterIP, topo.specOf(nil))
		add(dataplane.ExternalIP, "external", dataplane.UDP, pingExternalIP, some)
		add(dataplane.LoadBalancer, "inside", dataplane.TCP, pingNoLocalEndpoint, inside)
		add(dataplane.LoadBalancer, "outside", dataplane.SCTP, pingLocalEndpointsOnly, outside)
		add(dataplane.LoadBalancer, "ranged", dataplane.TCP, pingSourceRanges, ranged)
		add(dataplane.ClusterIP, "shared", dataplane.TCP, pingShared, some)
		add(dataplane.ClusterIP, "shared", dataplane.UDP, pingShared, topo.specOf(nil))
		add(dataplane.LoadBalancer, "nothing", dataplane.TCP, pingEmptyLoadBalancer, topo.specOf(nil))
	}
	return all
}

// testPingServiceIPs routes external addresses to the outside host, which does not have them.
// Only the node can answer a ping to them.
func (s suite) testPingServiceIPs(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	node, outside := topo.net.Node, topo.net.Outside
	topo.node.PrimaryAddrs = node.Addrs()
	for _, family := range families() {
		addr := vip(family, 128, 0).Addr()
		topo.node.ServiceCIDRs = append(topo.node.ServiceCIDRs, netip.PrefixFrom(addr, addr.BitLen()-7)) // contains pingUnused
	}
	clients := []*nettest.Host{topo.client, topo.pods[0], node, outside}
	type table map[byte]probeResult
	with := func(more table) table { // the other results are the defaults
		all := table{
			pingClusterIP: refused, pingEmptyClusterIP: refused, pingShared: refused, pingUnused: unanswered,
			pingExternalIP: unanswered, pingNoLocalEndpoint: unanswered, pingLocalEndpointsOnly: unanswered, pingSourceRanges: unanswered, pingEmptyLoadBalancer: unanswered,
		}
		maps.Copy(all, more)
		return all
	}
	check := func(t *testing.T, inside, others table) {
		t.Helper()
		var checks sync.WaitGroup
		for _, family := range families() {
			for _, from := range clients {
				want := inside
				if from == outside {
					want = others
				}
				for n, want := range want {
					checks.Go(func() { expectPing(t, from, vip(family, n, 0).Addr(), want) })
				}
				for _, host := range []*nettest.Host{node, topo.pods[0]} { // unaffected by Services
					checks.Go(func() { expectPing(t, from, addrOf(host, family), answered) })
				}
			}
		}
		checks.Wait()
	}
	none := with(nil)
	all := table{pingClusterIP: answered, pingShared: answered, pingExternalIP: answered}
	allInside, allOutside := with(all), with(all)
	allInside[pingNoLocalEndpoint], allOutside[pingLocalEndpointsOnly] = answered, answered

	topo.replace(topo.pingServices(0)...)
	t.Run("disabled", func(t *testing.T) { check(t, none, none) })
	topo.node.PingServiceIPs = true
	topo.replace(topo.pingServices(0)...)
	t.Run("enabled", func(t *testing.T) { check(t, allInside, allOutside) })
	topo.warmRestart()
	t.Run("warm restart", func(t *testing.T) { check(t, allInside, allOutside) })
	topo.createOrUpdate(topo.pingServices()...)
	t.Run("no endpoints", func(t *testing.T) { check(t, none, none) })
	topo.createOrUpdate(topo.pingServices(0)...)
	t.Run("endpoints again", func(t *testing.T) { check(t, allInside, allOutside) })

	t.Run("Services that share an address change", func(t *testing.T) {
		want := map[byte]probeResult{}
		step := func(edit func(family dataplane.Family)) {
			t.Helper()
			for _, family := range families() {
				edit(family)
				for n, want := range want {
					expectPing(t, topo.client, vip(family, n, 0).Addr(), want)
				}
			}
		}
		udp := func(family dataplane.Family, pods ...int) *dataplane.Service {
			return topo.serviceOfKind(dataplane.ClusterIP, "shared", dataplane.UDP, vip(family, pingShared, 80), topo.specOf(topo.endpoints(family, pods...)))
		}
		tcp := func(family dataplane.Family, pods ...int) *dataplane.Service {
			return topo.serviceOfKind(dataplane.ClusterIP, "shared", dataplane.TCP, vip(family, pingShared, 80), topo.specOf(topo.endpoints(family, pods...)))
		}
		want[pingShared] = answered
		step(func(family dataplane.Family) { topo.createOrUpdate(udp(family, 0)) })
		step(func(family dataplane.Family) { topo.createOrUpdate(tcp(family)) })
		want[pingShared] = refused
		step(func(family dataplane.Family) { topo.createOrUpdate(udp(family)) })
		want[pingShared] = answered
		step(func(family dataplane.Family) { topo.createOrUpdate(tcp(family, 0)) })
		want[pingShared] = refused
		step(func(family dataplane.Family) { topo.remove(tcp(family)) })
		step(func(family dataplane.Family) { topo.createOrUpdate(tcp(family)) })
	})

	t.Run("one ping process during changes", func(t *testing.T) {
		topo.createOrUpdate(topo.pingServices(0)...)
		var pingers []*nettest.Pinger
		for _, family := range families() {
			for _, from := range clients {
				p, err := from.OpenPinger(vip(family, pingClusterIP, 0).Addr())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := p.Close(); err != nil {
						t.Error(err)
					}
				})
				pingers = append(pingers, p)
			}
		}
		for _, step := range []struct {
			pods []int
			want probeResult
		}{{[]int{0}, answered}, {nil, refused}, {[]int{0}, answered}, {nil, refused}} {
			topo.createOrUpdate(topo.pingServices(step.pods...)...)
			for i, p := range pingers {
				if got, err := probe(t, step.want, p.Ask); got != step.want {
					t.Errorf("pinger %d, with endpoints %v: %q (error %v), want %s", i, step.pods, got, err, step.want)
				}
			}
		}
	})

	topo.node.PrimaryAddrs = nil
	topo.replace(topo.pingServices(0)...)
	t.Run("node without primary addresses", func(t *testing.T) { check(t, allInside, allOutside) })
	for _, tt := range []struct {
		name  string
		node  dataplane.Node
		local bool
	}{
		{"no local traffic detection", dataplane.Node{}, false},
		{"interface name prefix", dataplane.Node{PodInterfacePrefix: "veth"}, true},
		{"other bridge interface", dataplane.Node{PodInterface: "cbr0"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			topo.node = tt.node
			topo.node.PingServiceIPs, topo.node.PrimaryAddrs = true, node.Addrs()
			topo.replace(topo.pingServices(0)...)
			for _, family := range families() {
				inside, others := answered, unanswered
				if !tt.local {
					inside, others = unanswered, answered
				}
				expectPing(t, topo.client, vip(family, pingNoLocalEndpoint, 0).Addr(), inside)
				expectPing(t, topo.client, vip(family, pingLocalEndpointsOnly, 0).Addr(), others)
				expectPing(t, node, vip(family, pingNoLocalEndpoint, 0).Addr(), answered)
				expectPing(t, outside, vip(family, pingLocalEndpointsOnly, 0).Addr(), answered)
			}
		})
	}

	topo.node.PingServiceIPs = false
	topo.replace(slices.DeleteFunc(topo.pingServices(0), func(s *dataplane.Service) bool { return s.Key.Name == "shared" })...)
	t.Run("disabled again", func(t *testing.T) {
		for _, family := range families() {
			for _, from := range clients {
				expectPing(t, from, vip(family, pingClusterIP, 0).Addr(), refused)
				expectPing(t, from, vip(family, pingExternalIP, 0).Addr(), unanswered)
			}
		}
	})
}
