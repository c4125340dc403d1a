package bench_test

import (
	"context"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/bench"
	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// workload is a number of Services with a number of endpoints each.
type workload struct{ services, endpoints int }

func (l workload) String() string {
	return fmt.Sprintf("services=%d/endpoints=%d", l.services, l.endpoints)
}

// workloads returns the workloads to measure starts with.
func workloads() []workload {
	var all []workload
	for _, n := range serviceCounts() {
		all = append(all, workload{n, endpointsPerService})
	}
	if testing.Short() {
		return append(all, workload{20, 50})
	}
	return append(all, workload{5000, 50})
}

// BenchmarkColdStart measures the first Replace in an empty kernel, and a second Replace after
// [bench.SettleTime], which only reads. It also reports the share of processor time that the first Replace spends in the
// kernel.
func BenchmarkColdStart(b *testing.B) {
	for _, backend := range backends() {
		for _, size := range workloads() {
			b.Run(fmt.Sprintf("backend=%s/%s", backend.name, size), func(b *testing.B) {
				services := newServices(size.services, size.endpoints)
				var cold, warm time.Duration
				var user, kernel time.Duration
				for b.Loop() {
					b.StopTimer()
					ns, err := nettest.NewNamespace("")
					if err != nil {
						b.Fatal(err)
					}
					d := backend.open(b, ns.Fd())
					runtime.GC()
					b.StartTimer()
					u0, k0 := cpu(b)
					cold += replace(b, d, slices.Values(services))
					u1, k1 := cpu(b)
					b.StopTimer()
					user += u1 - u0
					kernel += k1 - k0
					if !testing.Short() {
						time.Sleep(bench.SettleTime)
					}
					warm += replace(b, d, slices.Values(services))
					if err := d.Close(); err != nil {
						b.Error(err)
					}
					if err := ns.Close(); err != nil {
						b.Error(err)
					}
					b.StartTimer()
				}
				b.ReportMetric(float64(cold.Microseconds())/1e3/float64(b.N), "cold-ms")
				b.ReportMetric(float64(warm.Microseconds())/1e3/float64(b.N), "warm-ms")
				b.ReportMetric(100*float64(kernel)/float64(kernel+user), "%kernel")
			})
		}
	}
}

// BenchmarkOtherTransactions measures how long another user of nftables waits for a transaction of
// one rule, while a backend programs Services and while it removes them. The other user starts a
// transaction every millisecond.
func BenchmarkOtherTransactions(b *testing.B) {
	sizes := []workload{{10_000, endpointsPerService}, {5000, 50}, {1, 50_000}}
	if testing.Short() {
		sizes = []workload{{20, endpointsPerService}}
	}
	for _, backend := range backends() {
		for _, size := range sizes {
			b.Run(fmt.Sprintf("backend=%s/%s", backend.name, size), func(b *testing.B) {
				services := newServices(size.services, size.endpoints)
				var adding, removing, idle []time.Duration
				for b.Loop() {
					ns := newNamespace(b)
					d := backend.open(b, ns.Fd())
					idle = append(idle, transactionLatencies(b, ns, func() { time.Sleep(100 * time.Millisecond) })...)
					adding = append(adding, transactionLatencies(b, ns, func() { replace(b, d, slices.Values(services)) })...)
					removing = append(removing, transactionLatencies(b, ns, func() { replace(b, d, slices.Values(services[:0])) })...)
					if err := d.Close(); err != nil {
						b.Error(err)
					}
				}
				for name, took := range map[string][]time.Duration{"adding": adding, "removing": removing, "idle": idle} {
					b.ReportMetric(bench.Percentile(took, 99).Seconds()*1e3, name+"-p99-ms")
					b.ReportMetric(bench.Percentile(took, 100).Seconds()*1e3, name+"-max-ms")
				}
			})
		}
	}
}

// transactionLatencies returns the durations of another user's transactions while work runs.
func transactionLatencies(b *testing.B, ns *nettest.Namespace, work func()) []time.Duration {
	b.Helper()
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(ns.Fd()))
	if err != nil {
		b.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyIPv4})
	chain := conn.AddChain(&nftables.Chain{Name: "other", Table: table})
	if err := conn.Flush(); err != nil {
		b.Fatal(err)
	}
	var took []time.Duration
	done, ended := make(chan struct{}), make(chan error)
	go func() {
		for {
			select {
			case <-done:
				ended <- nil
				return
			case <-time.After(time.Millisecond):
			}
			conn.FlushChain(chain)
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Counter{}}})
			begin := time.Now()
			if err := conn.Flush(); err != nil {
				<-done
				ended <- err
				return
			}
			took = append(took, time.Since(begin))
		}
	}()
	work()
	close(done)
	if err := <-ended; err != nil {
		b.Error(err)
	}
	if err := conn.CloseLasting(); err != nil {
		b.Error(err)
	}
	return took
}

// BenchmarkMemory reports the memory held for each Service with its endpoints when all Services
// are programmed: by the Service itself, the syncer and the backend.
func BenchmarkMemory(b *testing.B) {
	for _, backend := range backends() {
		for _, n := range serviceCounts() {
			b.Run(fmt.Sprintf("backend=%s/services=%d", backend.name, n), func(b *testing.B) {
				var held uint64
				for b.Loop() {
					before := liveHeap()
					s := start(b, backend.open, newServices(n, endpointsPerService))
					held += liveHeap() - before
					runtime.KeepAlive(s)
				}
				b.ReportMetric(float64(held)/float64(b.N)/float64(n), "B/service")
			})
		}
	}
}

// liveHeap returns the bytes of live heap objects.
func liveHeap() uint64 {
	runtime.GC()
	runtime.GC() // collect objects that finalizers kept alive
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func replace(b *testing.B, d dataplane.Dataplane, services iter.Seq[*dataplane.Service]) time.Duration {
	b.Helper()
	begin := time.Now()
	if err := d.Replace(context.Background(), node(), services, nil); err != nil {
		b.Fatal(err)
	}
	return time.Since(begin)
}

// cpu returns the processor time that this process has spent in user mode and in the kernel.
func cpu(b *testing.B) (user, kernel time.Duration) {
	b.Helper()
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano()), time.Duration(r.Stime.Nano())
}
