package inspect

import (
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// BenchmarkRead measures reading Services with 10 endpoints each in mode nft.
func BenchmarkRead(b *testing.B) {
	for _, services := range []int{1_000, 10_000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			ns := programServices(b, services)
			before := processorTime(b)
			for b.Loop() {
				k, err := Read(b.Context(), Options{NetNS: ns.Fd(), Connections: CountIfCheap})
				if err != nil || len(k.Frontends) != services {
					b.Fatalf("error %v, want %d frontends", err, services)
				}
			}
			b.ReportMetric((processorTime(b)-before)*1000/float64(b.N), "cpu-ms/op")
		})
	}
}

// BenchmarkServices measures reading the names of Services, as for each completion in a shell.
func BenchmarkServices(b *testing.B) {
	const services = 10_000
	ns := programServices(b, services)
	for b.Loop() {
		if names, err := Services(b.Context(), Options{NetNS: ns.Fd()}); err != nil || len(names) != services {
			b.Fatalf("%d names, error %v", len(names), err)
		}
	}
}

// processorTime returns the processor time of this process in seconds. On a busy machine, it says
// more than the elapsed time.
func processorTime(b *testing.B) float64 {
	b.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}

// programServices programs Services with 10 endpoints each in a new network namespace.
func programServices(b *testing.B, services int) *nettest.Namespace {
	b.Helper()
	ns, err := nettest.NewNamespace("")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = ns.Close() }) // its content disappears with the process
	d, err := nft.Open(nft.Options{NetNS: ns.Fd()})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	err = d.Replace(b.Context(), dataplane.Node{}, func(yield func(*dataplane.Service) bool) {
		for i := range services {
			var spec dataplane.ServiceSpec
			for e := range 10 {
				addr := netip.AddrFrom4([4]byte{10, 244, byte(e), byte(i)})
				spec.Endpoints = append(spec.Endpoints, dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, 8080)})
			}
			frontend := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), 80)
			if !yield(newService(b, fmt.Sprintf("service-%d", i), dataplane.ClusterIP, frontend.String(), spec)) {
				return
			}
		}
	}, nil)
	if err != nil {
		b.Fatal(err)
	}
	return ns
}
