//go:build ipvs

package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// benchServers returns n virtual servers.
func benchServers(n int) []serverKey {
	all := make([]serverKey, n)
	for i := range all {
		all[i] = serverKey{dataplane.TCP, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), 80)} //nolint:gosec // fits
	}
	return all
}

func benchDestination(i, j int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(100 + j), byte(i >> 8), byte(i)}), 8080) //nolint:gosec // fits
}

const benchDestinations = 10

// benchHost returns a namespace with the setup that does not depend on Services.
func benchHost(b *testing.B) (*nettest.Namespace, *host) {
	b.Helper()
	ns, err := nettest.NewNamespace("")
	if err != nil {
		b.Fatal(err)
	}
	h, err := openHost(ns.Fd())
	if err != nil {
		b.Fatal(err)
	}
	if err := h.setUp(); err != nil {
		b.Fatal(err)
	}
	return ns, h
}

// BenchmarkLoad compares many requests per system call (nlconn) with one request at a time
// (github.com/moby/ipvs).
func BenchmarkLoad(b *testing.B) {
	warm, err := dialIPVS(0) // the first request loads the modules
	if err != nil {
		b.Fatal(err)
	}
	s := serverKey{dataplane.TCP, netip.MustParseAddrPort("10.96.0.1:80")}
	_, err = warm.run([]request{{command: newService, serverKey: s, settings: settings{scheduler: "rr"}}, {command: delService, serverKey: s}})
	if err := errors.Join(err, warm.close()); err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{1000, 10_000} {
		servers := benchServers(n)
		run := func(how string, load func(b *testing.B, netns int)) {
			b.Run(fmt.Sprintf("%s/servers=%d", how, n), func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					ns, h := benchHost(b)
					b.StartTimer()
					load(b, ns.Fd())
					b.StopTimer()
					if err := errors.Join(h.close(), ns.Close()); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*n*(1+benchDestinations)), "µs/request")
			})
		}
		run("together", func(b *testing.B, netns int) {
			k, err := dialIPVS(netns)
			if err != nil {
				b.Fatal(err)
			}
			defer k.close() //nolint:errcheck // not measured
			var requests []request
			for i, s := range servers {
				requests = append(requests, request{command: newService, serverKey: s, settings: settings{scheduler: "rr"}})
				for j := range benchDestinations {
					requests = append(requests, request{command: newDest, serverKey: s, dest: benchDestination(i, j), weight: 1})
				}
			}
			answers, err := k.run(requests)
			if err != nil {
				b.Fatal(err)
			}
			if i := slices.IndexFunc(answers, func(err error) bool { return err != nil }); i >= 0 {
				b.Fatalf("%s: %v", requests[i], answers[i])
			}
		})
		run("one by one", func(b *testing.B, netns int) {
			h, err := ipvs.New(fmt.Sprintf("/proc/self/fd/%d", netns))
			if err != nil {
				b.Fatal(err)
			}
			defer h.Close()
			for i, s := range servers {
				service := &ipvs.Service{
					Address: s.addr.Addr().AsSlice(), Protocol: unix.IPPROTO_TCP, Port: 80,
					SchedName: "rr", AddressFamily: unix.AF_INET, Netmask: 0xffffffff,
				}
				if err := h.NewService(service); err != nil {
					b.Fatal(err)
				}
				for j := range benchDestinations {
					d := benchDestination(i, j)
					if err := h.NewDestination(service, &ipvs.Destination{
						Address: d.Addr().AsSlice(), Port: d.Port(), Weight: 1, AddressFamily: unix.AF_INET,
					}); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkBind compares batched local routes with addresses on the interface.
func BenchmarkBind(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		var addrs []netip.Addr
		for _, s := range benchServers(n) {
			addrs = append(addrs, s.addr.Addr())
		}
		run := func(how string, bind func(b *testing.B, h *host)) {
			b.Run(fmt.Sprintf("%s/addresses=%d", how, n), func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					ns, h := benchHost(b)
					b.StartTimer()
					bind(b, h)
					b.StopTimer()
					if err := errors.Join(h.close(), ns.Close()); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*n), "µs/address")
			})
		}
		run("routes", func(b *testing.B, h *host) {
			answers, err := h.changeBindings(unix.RTM_NEWROUTE, addrs)
			if err != nil {
				b.Fatal(err)
			}
			if i := slices.IndexFunc(answers, func(err error) bool { return err != nil }); i >= 0 {
				b.Fatalf("%s: %v", addrs[i], answers[i])
			}
		})
		run("addresses", func(b *testing.B, h *host) {
			link, err := h.handle.LinkByName(LinkName)
			if err != nil {
				b.Fatal(err)
			}
			for _, a := range addrs {
				addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}}
				if err := h.handle.AddrAdd(link, addr); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkResync measures the periodic comparison with the kernel.
func BenchmarkResync(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprintf("Services=%d", n), func(b *testing.B) {
			ns, err := nettest.NewNamespace("")
			if err != nil {
				b.Fatal(err)
			}
			defer ns.Close()
			d, err := Open(Options{NetNS: ns.Fd()})
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			var services []*dataplane.Service
			for i, s := range benchServers(n) {
				var spec dataplane.ServiceSpec
				for j := range benchDestinations {
					spec.Endpoints = append(spec.Endpoints, dataplane.Endpoint{Addr: benchDestination(i, j)})
				}
				service, err := dataplane.NewService(dataplane.Key{Namespace: "default", Name: fmt.Sprintf("s-%d", i), Family: dataplane.IPv4},
					[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: s.addr}}, spec)
				if err != nil {
					b.Fatal(err)
				}
				services = append(services, service)
			}
			if err := d.Replace(context.Background(), dataplane.Node{}, slices.Values(services), nil); err != nil {
				b.Fatal(err)
			}
			round := 0
			for b.Loop() {
				if err := d.verify(round, func() {}); err != nil {
					b.Fatal(err)
				}
				round++
			}
			select {
			case <-d.Drift():
				b.Error("drift")
			default:
			}
		})
	}
}

// BenchmarkCheckForLoss measures a check that finds nothing, beside different numbers of
// virtual servers.
func BenchmarkCheckForLoss(b *testing.B) {
	for _, n := range []int{100, 10_000} {
		b.Run(fmt.Sprintf("servers=%d", n), func(b *testing.B) {
			ns, h := benchHost(b)
			k, err := dialIPVS(ns.Fd())
			if err != nil {
				b.Fatal(err)
			}
			d, err := newDataplane(Options{})
			if err != nil {
				b.Fatal(err)
			}
			d.ipvs, d.ready = k, true
			var requests []request
			for _, s := range benchServers(n) {
				vs := virtualServer{settings: settings{scheduler: "rr"}}
				d.servers[s] = vs
				d.serverCount[s.family()]++
				requests = append(requests, request{command: newService, serverKey: s, settings: vs.settings})
			}
			if _, err := k.run(requests); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				d.checkForLoss()
			}
			b.StopTimer()
			select {
			case <-d.lost:
				b.Error("a loss")
			default:
			}
			if err := errors.Join(k.close(), h.close(), ns.Close()); err != nil {
				b.Fatal(err)
			}
		})
	}
}
