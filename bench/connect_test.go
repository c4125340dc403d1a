package bench_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"fairlead/bench"
	"fairlead/dataplane"
	"fairlead/internal/nettest"

	"golang.org/x/sys/unix"
)

// BenchmarkConnect is the price of the first packet: one client pod connects to
// another pod through a Service, and directly, in turns. An operation is one
// connection each. It reports the percentiles of connect(2), and how many
// connections a second that makes when each waits for the one before to be closed.
func BenchmarkConnect(b *testing.B) {
	sizes := []int{1, 1000, 100_000}
	if testing.Short() {
		sizes = []int{1, 100}
	}
	for _, backend := range backends() {
		for _, n := range sizes {
			b.Run(fmt.Sprintf("backend=%s/services=%d", backend.name, n), func(b *testing.B) { connect(b, backend.open, n) })
		}
	}
}

func connect(b *testing.B, open func(*testing.B, int) dataplane.Dataplane, n int) {
	b.Helper()
	network := nettest.NewT(b, nettest.Options{})
	client, pod := network.PodT(b, "client"), network.PodT(b, "pod")
	dp := open(b, network.Node.Fd())
	services := some(n, endpointsPerService)
	services[n/2] = bench.WithEndpoints(services[n/2], []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.IPv4, 8000), Local: true}})
	replace(b, dp, slices.Values(services))
	accept(b, pod, netip.AddrPortFrom(pod.IPv4, 8000))

	paths := [2]struct {
		name          string
		addr          netip.AddrPort
		connect, each []time.Duration
	}{
		{name: "direct", addr: netip.AddrPortFrom(pod.IPv4, 8000)},
		{name: "service", addr: services[n/2].Frontends[0].Addr},
	}
	err := client.Do(func() error {
		for range 50 { // until neighbours are known and caches are warm
			for _, p := range paths {
				if _, err := connectOnce(p.addr); err != nil {
					return fmt.Errorf("%s: %w", p.name, err)
				}
			}
		}
		for b.Loop() {
			for i := range paths {
				p := &paths[i]
				begin := time.Now()
				took, err := connectOnce(p.addr)
				if err != nil {
					return fmt.Errorf("%s: %w", p.name, err)
				}
				p.connect, p.each = append(p.connect, took), append(p.each, time.Since(begin))
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := dp.Close(); err != nil {
		b.Error(err)
	}
	var rate [2]float64
	for i, p := range paths {
		var sum time.Duration
		for _, d := range p.each {
			sum += d
		}
		rate[i] = float64(len(p.each)) / sum.Seconds()
		b.ReportMetric(rate[i], p.name+"-conn/s")
		for _, percent := range []int{50, 99} {
			b.ReportMetric(bench.Percentile(p.connect, percent).Seconds()*1e6, fmt.Sprintf("%s-p%d-µs", p.name, percent))
		}
	}
	b.ReportMetric(rate[1]/rate[0], "conn/s-ratio")
	for _, percent := range []int{50, 99} {
		ratio := bench.Percentile(paths[1].connect, percent).Seconds() / bench.Percentile(paths[0].connect, percent).Seconds()
		b.ReportMetric(ratio, fmt.Sprintf("p%d-ratio", percent))
	}
}

// accept has a pod accept connections, and close them, until the benchmark ends.
func accept(b *testing.B, pod *nettest.Host, addr netip.AddrPort) {
	b.Helper()
	var fd int
	err := pod.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}); err != nil {
			return os.NewSyscallError("bind", err)
		}
		return os.NewSyscallError("listen", unix.Listen(fd, 16))
	})
	if err != nil {
		b.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
			switch {
			case err == nil:
				_ = unix.Close(c)
			case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ECONNABORTED):
				return
			}
		}
	}()
	b.Cleanup(func() {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // ends accept
		<-ended
		_ = unix.Close(fd)
	})
}

// connectOnce connects from the thread's namespace, waits until the other side has
// closed the connection, and resets it, so that its port can be used again at once.
// It returns how long connect(2) took.
func connectOnce(addr netip.AddrPort) (took time.Duration, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, os.NewSyscallError("setsockopt", err)
	}
	begin := time.Now()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}); err != nil {
		return 0, os.NewSyscallError("connect", err)
	}
	took = time.Since(begin)
	for {
		if _, err = unix.Read(fd, make([]byte, 1)); !errors.Is(err, unix.EINTR) {
			return took, os.NewSyscallError("read", err)
		}
	}
}
