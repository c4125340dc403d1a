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

// probeResult is what comes back of an echo request.
type probeResult string

const (
	answered   probeResult = "answered"
	refused    probeResult = "refused"
	unanswered probeResult = "unanswered"
)

// probe sends an echo request. It waits for long where an answer is wanted.
func probe(t *testing.T, want probeResult, send func(context.Context) error) (probeResult, error) {
	t.Helper()
	patience := 3 * time.Second
	if want == unanswered {
		patience = retransmission / 2
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
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
		t.Errorf("a ping from %s to %s is %q (error %v), want it %s", from.Name, addr, got, err, want)
	}
}

// The addresses of the pings' tests, by who is to be answered.
const (
	pingClusterIP          = iota + 1 // a cluster IP with an endpoint
	pingEmptyClusterIP                // one without
	pingExternalIP                    // an external address with an endpoint
	pingNoLocalEndpoint               // endpoints, none of which is local: the node and its pods
	pingLocalEndpointsOnly            // nothing but local endpoints: other clients
	pingSourceRanges                  // source ranges
	pingShared                        // two Services, of which one has an endpoint
	pingEmptyLoadBalancer             // an external address without endpoints
	pingUnused             = 200      // nobody's
)

func (w *topology) pingServices(pods ...int) []*dataplane.Service {
	w.t.Helper()
	var all []*dataplane.Service
	for _, family := range families() {
		some := w.specOf(w.endpoints(family, pods...))
		inside, outside, ranged := some, some, some
		inside.ExternalTrafficPolicyLocal = true
		outside.ExternalTrafficPolicyLocal, outside.Endpoints, outside.LocalEndpoints = true, nil, some.Endpoints
		ranged.SourceRanges = []netip.Prefix{netip.PrefixFrom(vip(family, 0, 0).Addr(), 0).Masked()}
		add := func(kind dataplane.Kind, name string, p dataplane.Protocol, n byte, treatment dataplane.ServiceSpec) {
			all = append(all, w.serviceOfKind(kind, name, p, vip(family, n, 80), treatment))
		}
		add(dataplane.ClusterIP, "cluster", dataplane.TCP, pingClusterIP, some)
		add(dataplane.ClusterIP, "empty", dataplane.TCP, pingEmptyClusterIP, w.specOf(nil))
		add(dataplane.ExternalIP, "external", dataplane.UDP, pingExternalIP, some)
		add(dataplane.LoadBalancer, "inside", dataplane.TCP, pingNoLocalEndpoint, inside)
		add(dataplane.LoadBalancer, "outside", dataplane.SCTP, pingLocalEndpointsOnly, outside)
		add(dataplane.LoadBalancer, "ranged", dataplane.TCP, pingSourceRanges, ranged)
		add(dataplane.ClusterIP, "shared", dataplane.TCP, pingShared, some)
		add(dataplane.ClusterIP, "shared", dataplane.UDP, pingShared, w.specOf(nil))
		add(dataplane.LoadBalancer, "nothing", dataplane.TCP, pingEmptyLoadBalancer, w.specOf(nil))
	}
	return all
}

// testPingServiceIPs leaves the addresses that are no cluster IPs to the outside host, which
// does not have them: a ping that the node does not answer, nobody does.
func (s suite) testPingServiceIPs(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 1)
	node, outside := w.net.Node, w.net.Outside
	w.node.PrimaryAddrs = node.Addrs()
	for _, family := range families() {
		addr := vip(family, 128, 0).Addr()
		w.node.ServiceCIDRs = append(w.node.ServiceCIDRs, netip.PrefixFrom(addr, addr.BitLen()-7)) // has pingUnused
	}
	clients := []*nettest.Host{w.client, w.pods[0], node, outside}
	type table map[byte]probeResult
	with := func(more table) table { // all of which the rest is not answered
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
				for _, host := range []*nettest.Host{node, w.pods[0]} { // as ever
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

	w.replace(w.pingServices(0)...)
	t.Run("when it is off", func(t *testing.T) { check(t, none, none) })
	w.node.PingServiceIPs = true
	w.replace(w.pingServices(0)...)
	t.Run("when it is on", func(t *testing.T) { check(t, allInside, allOutside) })
	w.warmRestart()
	t.Run("after a restart", func(t *testing.T) { check(t, allInside, allOutside) })
	w.createOrUpdate(w.pingServices()...)
	t.Run("without endpoints", func(t *testing.T) { check(t, none, none) })
	w.createOrUpdate(w.pingServices(0)...)
	t.Run("with endpoints again", func(t *testing.T) { check(t, allInside, allOutside) })

	t.Run("of Services at one address that come and go", func(t *testing.T) {
		want := map[byte]probeResult{}
		step := func(edit func(family dataplane.Family)) {
			t.Helper()
			for _, family := range families() {
				edit(family)
				for n, want := range want {
					expectPing(t, w.client, vip(family, n, 0).Addr(), want)
				}
			}
		}
		udp := func(family dataplane.Family, pods ...int) *dataplane.Service {
			return w.serviceOfKind(dataplane.ClusterIP, "shared", dataplane.UDP, vip(family, pingShared, 80), w.specOf(w.endpoints(family, pods...)))
		}
		tcp := func(family dataplane.Family, pods ...int) *dataplane.Service {
			return w.serviceOfKind(dataplane.ClusterIP, "shared", dataplane.TCP, vip(family, pingShared, 80), w.specOf(w.endpoints(family, pods...)))
		}
		want[pingShared] = answered
		step(func(family dataplane.Family) { w.createOrUpdate(udp(family, 0)) })
		step(func(family dataplane.Family) { w.createOrUpdate(tcp(family)) })
		want[pingShared] = refused
		step(func(family dataplane.Family) { w.createOrUpdate(udp(family)) })
		want[pingShared] = answered
		step(func(family dataplane.Family) { w.createOrUpdate(tcp(family, 0)) })
		want[pingShared] = refused
		step(func(family dataplane.Family) { w.remove(tcp(family)) })
		step(func(family dataplane.Family) { w.createOrUpdate(tcp(family)) })
	})

	t.Run("of one program that goes on", func(t *testing.T) {
		w.createOrUpdate(w.pingServices(0)...)
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
			w.createOrUpdate(w.pingServices(step.pods...)...)
			for i, p := range pingers {
				if got, err := probe(t, step.want, p.Ask); got != step.want {
					t.Errorf("pinger %d, with endpoints %v: %q (error %v), want %s", i, step.pods, got, err, step.want)
				}
			}
		}
	})

	w.node.PrimaryAddrs = nil
	w.replace(w.pingServices(0)...)
	t.Run("of a node without known addresses", func(t *testing.T) { check(t, allInside, allOutside) })
	for _, tt := range []struct {
		name  string
		node  dataplane.Node
		local bool
	}{
		{"pods told by nothing", dataplane.Node{}, false},
		{"pods told by their interface", dataplane.Node{PodInterfacePrefix: "veth"}, true},
		{"pods told by another", dataplane.Node{PodInterface: "cbr0"}, false},
	} {
		t.Run("with "+tt.name, func(t *testing.T) {
			w.node = tt.node
			w.node.PingServiceIPs, w.node.PrimaryAddrs = true, node.Addrs()
			w.replace(w.pingServices(0)...)
			for _, family := range families() {
				inside, others := answered, unanswered
				if !tt.local {
					inside, others = unanswered, answered
				}
				expectPing(t, w.client, vip(family, pingNoLocalEndpoint, 0).Addr(), inside)
				expectPing(t, w.client, vip(family, pingLocalEndpointsOnly, 0).Addr(), others)
				expectPing(t, node, vip(family, pingNoLocalEndpoint, 0).Addr(), answered)
				expectPing(t, outside, vip(family, pingLocalEndpointsOnly, 0).Addr(), answered)
			}
		})
	}

	w.node.PingServiceIPs = false
	w.replace(slices.DeleteFunc(w.pingServices(0), func(s *dataplane.Service) bool { return s.Key.Name == "shared" })...)
	t.Run("when it is off again", func(t *testing.T) {
		for _, family := range families() {
			for _, from := range clients {
				expectPing(t, from, vip(family, pingClusterIP, 0).Addr(), refused)
				expectPing(t, from, vip(family, pingExternalIP, 0).Addr(), unanswered)
			}
		}
	})
}
