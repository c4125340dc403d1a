package nft

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// schedulerNames contains the schedulers by the value of the annotation.
func schedulerNames() map[string]string {
	return map[string]string{"random": "", "round-robin": dataplane.RoundRobin, "source-hash": dataplane.SourceHash}
}

// BenchmarkBalancedApply changes the endpoints of Services with each kind of balancing in turns,
// with other Services in the tables. It reports the median and the fastest time of each change. With new-chains,
// every size of a Service with round robin is new, and the chain of the previous size is removed.
func BenchmarkBalancedApply(b *testing.B) {
	for _, test := range []struct {
		name      string
		others    int
		scheduler string
		newChains bool
	}{
		{"1000 random Services", 1000, "", false},
		{"10000 random Services", 10_000, "", false},
		{"1000 Services with round robin", 1000, dataplane.RoundRobin, false},
		{"1000 random Services, new-chains", 1000, "", true},
		{"1000 Services with round robin, new-chains", 1000, dataplane.RoundRobin, true},
	} {
		b.Run(test.name, func(b *testing.B) {
			ns, err := nettest.NewNamespace("")
			if err != nil {
				b.Fatal(err)
			}
			d, err := Open(Options{NetNS: ns.Fd()})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = d.Close(); _ = ns.Close() })
			list := endpoints(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
			var services []*dataplane.Service
			for n := range test.others {
				services = append(services, balanced(b, test.scheduler, fmt.Sprint(n), frontend(100+n), list))
			}
			current := map[string]*dataplane.Service{}
			number := 0
			for name, scheduler := range schedulerNames() {
				number++
				current[name] = balanced(b, scheduler, name, frontend(number), list)
				services = append(services, current[name])
			}
			if err := d.Replace(b.Context(), nodeWithPodCIDRs(), slices.Values(services), nil); err != nil {
				b.Fatal(err)
			}
			if test.newChains {
				now := time.Now()
				d.now = func() time.Time {
					now = now.Add(2 * unusedClassDelay)
					return now
				}
			}
			took := map[string][]time.Duration{}
			apply := func(name, change string, list []dataplane.Endpoint) {
				s := balanced(b, current[name].Scheduler, name, current[name].Frontends[0], list)
				began := time.Now()
				if err := d.Apply(b.Context(), []dataplane.Change{{Old: current[name], New: s}}); err != nil {
					b.Fatal(err)
				}
				took[name+"-"+change] = append(took[name+"-"+change], time.Since(began))
				current[name] = s
			}
			for spare := 0; b.Loop(); spare++ {
				replaced := slices.Clone(list)
				replaced[9] = endpoint(100 + spare%997)
				for name := range current {
					apply(name, "replace", replaced)
				}
				for name := range current {
					apply(name, "remove", replaced[:9])
				}
				for name := range current {
					apply(name, "add", list)
				}
			}
			reportTimes(b, took)
		})
	}
}

// reportTimes reports the median and the fastest of each series.
func reportTimes(b *testing.B, took map[string][]time.Duration) {
	b.Helper()
	for name, times := range took {
		slices.Sort(times)
		b.ReportMetric(float64(times[len(times)/2].Nanoseconds())/1e3, name+"-p50-µs")
		b.ReportMetric(float64(times[0].Nanoseconds())/1e3, name+"-min-µs")
	}
}

// BenchmarkBalancedFirstPacket opens connections from a pod to Services with each kind of
// balancing in turns. It reports the median and the fastest time of connect(2) for each.
func BenchmarkBalancedFirstPacket(b *testing.B) {
	network := nettest.NewT(b, nettest.Options{})
	client, pod := network.PodT(b, "client"), network.PodT(b, "pod")
	var list []dataplane.Endpoint
	for port := range uint16(10) {
		pod.ServeT(b, "tcp", 8080+port)
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(pod.IPv4, 8080+port)})
	}
	d, err := Open(Options{NetNS: network.Node.Fd()})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = d.Close() })
	services := map[string]*dataplane.Service{}
	var all []*dataplane.Service
	for name, scheduler := range schedulerNames() {
		services[name] = balanced(b, scheduler, name, frontend(16*(1+len(all))), list) // in one shard
		all = append(all, services[name])
	}
	if err := d.Replace(b.Context(), dataplane.Node{}, slices.Values(all), nil); err != nil {
		b.Fatal(err)
	}
	took := map[string][]time.Duration{}
	err = client.Do(func() error {
		for b.Loop() {
			for name, s := range services {
				began := time.Now()
				conn, err := net.DialTimeout("tcp", s.Frontends[0].Addr.String(), 5*time.Second)
				if err != nil {
					return err
				}
				took[name] = append(took[name], time.Since(began))
				_ = conn.Close()
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	reportTimes(b, took)
}
