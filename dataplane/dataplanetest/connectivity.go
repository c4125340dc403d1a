package dataplanetest

import (
	"fmt"
	"math"
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

func (s suite) testConnectivity(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	var services []*dataplane.Service
	for _, family := range families() {
		for _, p := range protocols() {
			services = append(services, topo.service("web", p, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0, 1, 2)))
		}
	}
	topo.replace(services...)
	for _, family := range families() {
		for _, p := range protocols() {
			for _, from := range []*nettest.Host{topo.client, topo.net.Node, topo.net.Outside} {
				t.Run(fmt.Sprintf("%s/%s/from %s", p, family, from.Name), func(t *testing.T) {
					t.Parallel()
					expectEndpoints(t, from, p, vip(family, 1, 80), topo.endpoints(family, 0, 1, 2))
				})
			}
		}
	}
}

func (s suite) testDistribution(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	var services []*dataplane.Service
	for _, family := range families() {
		services = append(services, topo.service("web", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0, 1, 2)))
	}
	topo.replace(services...)
	for _, family := range families() {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			const connections = 300
			hits := map[netip.AddrPort]int{}
			for range connections {
				answer, err := connect(t, topo.client, dataplane.TCP, vip(family, 1, 80))
				if err != nil {
					t.Fatal(err)
				}
				hits[answer.Endpoint]++
			}
			const probability = 1.0 / 3
			sigma := math.Sqrt(connections * probability * (1 - probability))
			for _, e := range topo.endpoints(family, 0, 1, 2) {
				if deviation := float64(hits[e]) - connections*probability; math.Abs(deviation) > 5*sigma {
					t.Errorf("%s got %d of %d connections, %.1f sigma from the expected share: %v", e, hits[e], connections, deviation/sigma, hits)
				}
			}
		})
	}
}

func (s suite) testMasqueradeOffCluster(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	var services []*dataplane.Service
	for _, family := range families() {
		for _, p := range protocols() {
			services = append(services, topo.service("web", p, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0)))
		}
	}
	v4, v6 := topo.net.PodCIDRs[0], topo.net.PodCIDRs[1]
	other4, other6 := netip.MustParsePrefix("10.200.0.0/16"), netip.MustParsePrefix("fd00:200::/64")
	// The subtests share one node, so they do not run in parallel.
	for _, tt := range []struct {
		name     string
		podCIDRs []netip.Prefix
		// Whether connections from a pod, and from other clients, are masqueraded.
		pod4, pod6, others4, others6 bool
	}{
		{name: "no pod CIDRs"},
		{name: "pod CIDRs of both families", podCIDRs: []netip.Prefix{v4, v6}, others4: true, others6: true},
		{name: "IPv4 pod CIDR", podCIDRs: []netip.Prefix{v4}, others4: true},
		{name: "IPv6 pod CIDR", podCIDRs: []netip.Prefix{v6}, others6: true},
		{name: "several pod CIDRs", podCIDRs: []netip.Prefix{other4, v4, other6, v6}, others4: true, others6: true},
		{
			name: "other pod CIDRs", podCIDRs: []netip.Prefix{other4, other6},
			pod4: true, pod6: true, others4: true, others6: true,
		},
		{name: "no pod CIDRs again"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			topo.node.PodCIDRs = tt.podCIDRs
			topo.replace(services...)
			for _, family := range families() {
				for _, p := range protocols() {
					for _, from := range []*nettest.Host{topo.client, topo.net.Node, topo.net.Outside} {
						masqueraded := tt.others4
						switch {
						case from == topo.client && family == dataplane.IPv4:
							masqueraded = tt.pod4
						case from == topo.client:
							masqueraded = tt.pod6
						case family == dataplane.IPv6:
							masqueraded = tt.others6
						}
						want := from
						if masqueraded {
							want = topo.net.Node
						}
						answer, err := connect(t, from, p, vip(family, 1, 80))
						if err != nil {
							t.Error(err)
							continue
						}
						if answer.Source.Addr() != addrOf(want, family) {
							t.Errorf("%s, %s from %s: endpoint sees source %s, want %s of %s",
								p, family, from.Name, answer.Source, addrOf(want, family), want.Name)
						}
					}
				}
			}
		})
	}
}

func (s suite) testNoEndpoints(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	services := func(pods ...int) []*dataplane.Service {
		var services []*dataplane.Service
		for _, family := range families() {
			for _, p := range protocols() {
				services = append(services, topo.service("web", p, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, pods...)))
			}
		}
		return services
	}
	check := func(t *testing.T, pods ...int) {
		t.Helper()
		for _, family := range families() {
			for _, p := range protocols() {
				for _, from := range []*nettest.Host{topo.client, topo.pods[0], topo.net.Node, topo.net.Outside} {
					t.Run(fmt.Sprintf("%s/%s/from %s", p, family, from.Name), func(t *testing.T) {
						t.Parallel()
						expectEndpoints(t, from, p, vip(family, 1, 80), topo.endpoints(family, pods...))
					})
				}
			}
		}
	}
	topo.replace(services()...)
	t.Run("no endpoint yet", func(t *testing.T) { check(t) })
	topo.createOrUpdate(services(0)...)
	t.Run("first endpoint added", func(t *testing.T) { check(t, 0) })
	topo.createOrUpdate(services()...)
	t.Run("last endpoint removed", func(t *testing.T) { check(t) })
	topo.warmRestart()
	t.Run("warm restart", func(t *testing.T) { check(t) })
}

func (s suite) testHairpin(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	var services []*dataplane.Service
	for _, family := range families() {
		for _, p := range protocols() {
			services = append(services,
				topo.service("single", p, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0)),
				topo.service("several", p, []netip.AddrPort{vip(family, 2, 80)}, topo.endpoints(family, 0, 1, 2)))
		}
	}
	podCIDRs := topo.net.PodCIDRs
	for _, tt := range []struct {
		name     string
		podCIDRs []netip.Prefix
	}{
		{"with pod CIDRs", podCIDRs},
		{"without pod CIDRs", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			topo.node.PodCIDRs = tt.podCIDRs
			topo.replace(services...)
			for _, family := range families() {
				for _, p := range protocols() {
					for _, s := range []struct {
						name      string
						frontend  netip.AddrPort
						endpoints []netip.AddrPort
					}{
						{"single endpoint", vip(family, 1, 80), topo.endpoints(family, 0)},
						{"one of several", vip(family, 2, 80), topo.endpoints(family, 0, 1, 2)},
					} {
						t.Run(fmt.Sprintf("%s/%s/%s", p, family, s.name), func(t *testing.T) {
							t.Parallel()
							pod := topo.pods[0]
							own := addrOf(pod, family)
							for _, answer := range expectEndpoints(t, pod, p, s.frontend, s.endpoints) {
								itself := answer.Host == pod.Name
								if unchanged := answer.Source.Addr() == own; unchanged == itself {
									t.Fatalf("%s connected to %s and reached %s, which saw source %s; "+
										"want the pod's own address, but a different one if the pod reached itself", pod.Name, s.frontend, answer.Host, answer.Source)
								}
							}
						})
					}
				}
			}
		})
	}
}

// testOtherTraffic gives the outside host the addresses of the Services. Connections that the
// node does not translate end there.
func (s suite) testOtherTraffic(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 2)
	outside := topo.net.Outside
	var services []*dataplane.Service
	for _, family := range families() {
		for n := range byte(4) {
			if err := outside.AddAddr(vip(family, n, 0).Addr()); err != nil {
				t.Fatal(err)
			}
		}
		services = append(services,
			topo.serviceOfKind(dataplane.ExternalIP, "web", dataplane.TCP, vip(family, 1, 80), topo.specOf(topo.endpoints(family, 0))),
			topo.serviceOfKind(dataplane.ExternalIP, "dns", dataplane.UDP, vip(family, 1, 53), topo.specOf(topo.endpoints(family, 0))),
			topo.serviceOfKind(dataplane.ExternalIP, "sig", dataplane.SCTP, vip(family, 1, 99), topo.specOf(topo.endpoints(family, 0))),
			topo.serviceOfKind(dataplane.ExternalIP, "none", dataplane.TCP, vip(family, 2, 80), topo.specOf(nil)),
			topo.serviceOfKind(dataplane.ExternalIP, "gone", dataplane.TCP, vip(family, 3, 80), topo.specOf(topo.endpoints(family, 0))))
	}
	for _, p := range protocols() {
		outside.ServeT(t, networkName(p), 53, 80, 81, 99, endpointPort)
		topo.net.Node.ServeT(t, networkName(p), 80)
	}
	topo.replace(services...)
	for _, family := range families() {
		topo.remove(topo.programmed[dataplane.Key{Namespace: "default", Name: "gone", Port: "tcp", Family: family, Kind: dataplane.ExternalIP}])
	}

	hostAddr := func(h *nettest.Host, family dataplane.Family, port uint16) netip.AddrPort {
		return netip.AddrPortFrom(addrOf(h, family), port)
	}
	for _, family := range families() {
		for _, tt := range []struct {
			name      string
			protocols []dataplane.Protocol
			addr      netip.AddrPort
		}{
			{"a pod", protocols(), hostAddr(topo.pods[1], family, endpointPort)},
			{"a pod that is an endpoint", protocols(), hostAddr(topo.pods[0], family, endpointPort)},
			{"the node", protocols(), hostAddr(topo.net.Node, family, 80)},
			{"the outside host", protocols(), hostAddr(outside, family, 80)},
			{"unused address of the Service network", protocols(), vip(family, 0, 80)},
			{"another port of a frontend", protocols(), vip(family, 1, 81)},
			{"the endpoints' port at a frontend's address", protocols(), vip(family, 1, endpointPort)},
			{"another port of a Service without endpoints", protocols(), vip(family, 2, 81)},
			{"other protocols of a TCP frontend", []dataplane.Protocol{dataplane.UDP, dataplane.SCTP}, vip(family, 1, 80)},
			{"other protocols of a UDP frontend", []dataplane.Protocol{dataplane.TCP, dataplane.SCTP}, vip(family, 1, 53)},
			{"other protocols of an SCTP frontend", []dataplane.Protocol{dataplane.TCP, dataplane.UDP}, vip(family, 1, 99)},
			{"other protocols of a Service without endpoints", []dataplane.Protocol{dataplane.UDP, dataplane.SCTP}, vip(family, 2, 80)},
			{"the frontend of a deleted Service", protocols(), vip(family, 3, 80)},
		} {
			for _, p := range tt.protocols {
				for _, from := range []*nettest.Host{topo.client, topo.pods[0], topo.net.Node} {
					t.Run(fmt.Sprintf("%s/%s/%s/from %s", family, tt.name, p, from.Name), func(t *testing.T) {
						t.Parallel()
						answer, err := connect(t, from, p, tt.addr)
						if err != nil {
							t.Fatal(err)
						}
						if answer.Endpoint != tt.addr || answer.Source.Addr() != addrOf(from, family) {
							t.Errorf("answer %+v, want untranslated endpoint %s and source %s", answer, tt.addr, addrOf(from, family))
						}
					})
				}
			}
		}
	}
}

// testManyEndpoints does not run in parallel: its servers use 2,000 file descriptors, and
// netlink libraries that call select(2) cannot use sockets above 1,023.
func (s suite) testManyEndpoints(t *testing.T) {
	const pods, endpoints, connections = 4, 1000, 300
	topo := newTopology(t, s, pods)
	ports := make([]uint16, 0, endpoints/pods)
	for i := range uint16(endpoints / pods) {
		ports = append(ports, 10_000+i)
	}
	for _, pod := range topo.pods {
		pod.ServeT(t, nettest.TCP, ports...)
	}
	var services []*dataplane.Service
	for _, family := range families() {
		var addrs []netip.AddrPort
		for _, pod := range topo.pods {
			for _, p := range ports {
				addrs = append(addrs, netip.AddrPortFrom(addrOf(pod, family), p))
			}
		}
		services = append(services, topo.service("many", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, addrs))
	}
	topo.replace(services...)
	for _, s := range services {
		t.Run(s.Key.Family.String(), func(t *testing.T) {
			t.Parallel()
			valid := map[netip.AddrPort]bool{}
			for _, e := range s.Endpoints {
				valid[e.Addr] = true
			}
			reached := map[netip.AddrPort]bool{}
			for range connections {
				answer, err := connect(t, topo.client, dataplane.TCP, s.Frontends[0].Addr)
				if err != nil {
					t.Fatal(err)
				}
				if !valid[answer.Endpoint] {
					t.Fatalf("connection reached %s, which is not an endpoint", answer.Endpoint)
				}
				reached[answer.Endpoint] = true
			}
			// 300 random choices out of 1000 reach 259 different endpoints on average, sigma 6.
			if len(reached) < 220 {
				t.Errorf("%d connections reached %d different endpoints of %d, want at least 220", connections, len(reached), endpoints)
			}
		})
	}
}

func (s suite) testLongNames(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 2)
	long := func(n int) string { return fmt.Sprintf("%0*d", n, 7) }
	key := dataplane.Key{Namespace: "n" + long(62), Name: "s" + long(62), Port: "p" + long(14)}
	topo.replace()
	for _, family := range families() {
		var frontends []netip.AddrPort
		for n := range byte(8) { // like a Service with many external IPs
			frontends = append(frontends, vip(family, n, 65535))
		}
		topo.createOrUpdate(topo.serviceWithKey(key, dataplane.TCP, frontends, topo.endpoints(family, 0)))
		topo.createOrUpdate(topo.serviceWithKey(key, dataplane.TCP, frontends, topo.endpoints(family, 0, 1)))
	}
	topo.warmRestart()
	for _, family := range families() {
		for n := range byte(8) {
			expectEndpoints(t, topo.client, dataplane.TCP, vip(family, n, 65535), topo.endpoints(family, 0, 1))
		}
	}
}
