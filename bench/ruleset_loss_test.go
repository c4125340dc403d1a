package bench_test

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	stdsync "sync"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
	"fairlead.io/fairlead/sync"
)

// BenchmarkRulesetLoss repeatedly deletes all rules of a node for a while. It measures the time
// from the last deletion until connections to the first and to the last Service reach their
// endpoints. Each Service has 10 endpoints.
func BenchmarkRulesetLoss(b *testing.B) {
	sizes := []int{10, 1000, 10_000}
	if testing.Short() {
		sizes = []int{10}
	}
	for _, n := range sizes {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			network := nettest.NewT(b, nettest.Options{})
			client, pod := network.PodT(b, "client"), network.PodT(b, "endpoint")
			pod.ServeT(b, nettest.TCP, 8080)
			services := map[dataplane.Key]*dataplane.Service{}
			var addrs []netip.AddrPort
			for i := range n {
				endpoints := []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.IPv4, 8080), Local: true}}
				if i > 0 && i < n-1 {
					endpoints = nil
					for e := range 10 {
						addr := netip.AddrFrom4([4]byte{10, 245, byte(e), byte(i)})
						endpoints = append(endpoints, dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, 8080)})
					}
				}
				addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), 80)
				s, err := dataplane.NewService(
					dataplane.Key{Namespace: "default", Name: fmt.Sprintf("s-%06d", i), Family: dataplane.IPv4},
					[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: addr}}, dataplane.ServiceSpec{Endpoints: endpoints},
				)
				if err != nil {
					b.Fatal(err)
				}
				services[s.Key] = s
				if i == 0 || i == n-1 {
					addrs = append(addrs, addr)
				}
			}
			d, err := nft.Open(nft.Options{NetNS: network.Node.Fd()})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = d.Close() }()
			ctx, stop := context.WithCancel(b.Context())
			syncer := sync.New(d, sync.Options{})
			var running stdsync.WaitGroup
			running.Go(func() { _ = syncer.Run(ctx) })
			defer running.Wait()
			defer stop()
			syncer.Update(services)
			syncer.FinishInitialList()
			if err := syncer.WaitSynced(ctx); err != nil {
				b.Fatal(err)
			}
			var took [2][]time.Duration
			for b.Loop() {
				for range 10 {
					flushRuleset(b, network.Node)
					time.Sleep(20 * time.Millisecond)
				}
				flushRuleset(b, network.Node)
				flushed := time.Now()
				var clients stdsync.WaitGroup
				for i, addr := range addrs {
					clients.Go(func() {
						if !waitReachable(b, client, addr, "endpoint") {
							return
						}
						took[i] = append(took[i], time.Since(flushed))
					})
				}
				clients.Wait()
				time.Sleep(200 * time.Millisecond) // until the last Replace has returned
			}
			for i, name := range []string{"first", "last"} {
				slices.Sort(took[i])
				if len(took[i]) == 0 {
					b.Fatalf("no connection reached the %s Service", name)
				}
				b.ReportMetric(float64(took[i][len(took[i])/2].Milliseconds()), name+"-p50-ms")
				b.ReportMetric(float64(took[i][len(took[i])-1].Milliseconds()), name+"-max-ms")
			}
		})
	}
}

// flushRuleset deletes all nftables rules of the node.
func flushRuleset(b *testing.B, node *nettest.Host) {
	b.Helper()
	err := node.Do(func() error {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader("flush ruleset")
		return cmd.Run()
	})
	if err != nil {
		b.Fatal(err)
	}
}

// waitReachable waits until a connection to addr reaches the pod.
func waitReachable(b *testing.B, client *nettest.Host, addr netip.AddrPort, pod string) bool {
	b.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		ctx, cancel := context.WithTimeout(b.Context(), 30*time.Millisecond)
		answer, err := client.Connect(ctx, nettest.TCP, addr)
		cancel()
		if err == nil && answer.Host == pod {
			return true
		}
	}
	b.Errorf("no connection to %s reached the pod within 30s", addr)
	return false
}
