package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/statistics"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/internal/nettest"
)

// path is a way to an endpoint: through a Service, or direct.
type path struct {
	system string
	addr   netip.AddrPort

	connectTimes, connectRates, throughputs []float64
}

// dataPath compares connections through a Service with direct ones, for different
// numbers of Services. The two take turns.
func dataPath(ctx context.Context, o Options, m *measurements) error {
	for _, n := range o.Sizes {
		services := newServices(n, o.Endpoints)
		one := services[n/2]
		one.Endpoints = []netip.Addr{cluster.WatchedAddr(0)}
		err := withLoadedTestbed(ctx, o, services, func(s *pipelineUnderTest, _ *testbed.Probe) error {
			ways := []*path{
				{system: m.system, addr: one.Addr()},
				{system: result.Direct, addr: netip.AddrPortFrom(one.Endpoints[0], cluster.TargetPort)},
			}
			o.Progress(fmt.Sprintf("data path: %d Services, %d connections", n, o.Samples))
			if err := measureConnects(ctx, s.testbed, ways, o.Samples); err != nil {
				return err
			}
			for i := range o.startCount() {
				o.Progress(fmt.Sprintf("data path: %d Services, transfer %d of %d", n, i+1, o.startCount()))
				if err := measureThroughput(ctx, s.testbed, ways, o.ThroughputTime); err != nil {
					return err
				}
			}
			return m.addPaths(result.Scenario{Services: n, Endpoints: o.Endpoints}, ways)
		})
		if err != nil {
			return fmt.Errorf("%d Services: %w", n, err)
		}
	}
	return nil
}

// addPaths adds what was measured of the ways, and how the first compares with the
// second.
func (m *measurements) addPaths(scenario result.Scenario, ways []*path) error {
	for _, kind := range []struct {
		measure result.Measure
		unit    string
		of      func(*path) []float64
	}{
		{result.Connect, "s", func(w *path) []float64 { return w.connectTimes }},
		{result.ConnectRate, "1/s", func(w *path) []float64 { return w.connectRates }},
		{result.Throughput, "B/s", func(w *path) []float64 { return w.throughputs }},
	} {
		for _, w := range ways {
			m.add(w.system, kind.measure, scenario, kind.unit, kind.of(w))
		}
		numerator, denominator := kind.of(ways[0]), kind.of(ways[1])
		interval, err := statistics.PairedRatio(numerator, denominator)
		if err != nil {
			return fmt.Errorf("compare %s: %w", kind.measure, err)
		}
		m.ratios = append(m.ratios, result.Ratio{
			Measure: kind.measure, Statistic: "paired-p50", Environment: m.environment, Scenario: scenario,
			Numerator: ways[0].system, Denominator: ways[1].system, Interval: interval,
			NumeratorSamples: len(numerator), DenominatorSamples: len(denominator), Method: statistics.Method,
		})
	}
	return nil
}

// measureConnects makes connections, one after another.
func measureConnects(ctx context.Context, r *testbed.Testbed, ways []*path, n int) (err error) {
	stop, err := acceptAndClose(r.Endpoints)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	const warm = 50 // until neighbours are known and caches are warm
	// How many connections make one sample of their rate.
	batch := max(n/50, 1)
	return r.Client.Do(func() error {
		each := make([]time.Duration, len(ways))
		for i := range n + warm {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			for j, w := range ways {
				begin := time.Now()
				took, err := connectOnce(w.addr)
				if err != nil {
					return fmt.Errorf("connect to %s: %w", w.addr, err)
				}
				if i < warm {
					continue
				}
				w.connectTimes = append(w.connectTimes, took.Seconds())
				each[j] += time.Since(begin)
				if (i-warm+1)%batch == 0 {
					w.connectRates = append(w.connectRates, float64(batch)/each[j].Seconds())
					each[j] = 0
				}
			}
		}
		return nil
	})
}

// acceptAndClose has a host accept connections, and close them, until stop is called. It
// makes system calls itself, as the times of connections are some microseconds.
func acceptAndClose(host *nettest.Host) (stop func() error, err error) {
	fd := -1
	err = host.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: cluster.TargetPort}); err != nil {
			return errors.Join(os.NewSyscallError("bind", err), unix.Close(fd))
		}
		const backlog = 128
		if err := unix.Listen(fd, backlog); err != nil {
			return errors.Join(os.NewSyscallError("listen", err), unix.Close(fd))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listen on the endpoints: %w", err)
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
	return func() error {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // ends accept
		<-ended
		return os.NewSyscallError("close", unix.Close(fd))
	}, nil
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
	// Nobody answers a connection that is lost.
	timeout := unix.NsecToTimeval(int64(10 * time.Second))
	for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &timeout); err != nil {
			return 0, os.NewSyscallError("setsockopt", err)
		}
	}
	begin := time.Now()
	// With a timeout the kernel does not restart a call that a signal has interrupted
	// (signal(7)). The next call waits for the same connection.
	for {
		err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()})
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return 0, os.NewSyscallError("connect", err)
		}
	}
	took = time.Since(begin)
	for {
		if _, err = unix.Read(fd, make([]byte, 1)); !errors.Is(err, unix.EINTR) {
			return took, os.NewSyscallError("read", err)
		}
	}
}

// measureThroughput sends over one connection each for some time.
func measureThroughput(ctx context.Context, r *testbed.Testbed, ways []*path, lasts time.Duration) error {
	l, err := r.Endpoints.Listen(ctx, nettest.TCP, netip.AddrPortFrom(netip.IPv4Unspecified(), cluster.TargetPort))
	if err != nil {
		return fmt.Errorf("listen on the endpoints: %w", err)
	}
	defer l.Close() //nolint:errcheck // nothing depends on it
	for _, w := range ways {
		rate, err := transfer(ctx, r, l, w.addr, lasts)
		if err != nil {
			return fmt.Errorf("send to %s: %w", w.addr, err)
		}
		w.throughputs = append(w.throughputs, rate)
	}
	return nil
}

const transferBuffer = 256 << 10

// transfer returns how many bytes a second have arrived.
func transfer(ctx context.Context, r *testbed.Testbed, l net.Listener, addr netip.AddrPort, lasts time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, lasts+10*time.Second)
	defer cancel()
	c, err := r.Client.Dial(ctx, nettest.TCP, addr)
	if err != nil {
		return 0, err
	}
	defer c.Close() //nolint:errcheck // it is closed for writing below
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	defer stop()
	other, err := l.Accept()
	if err != nil {
		return 0, err
	}
	received := make(chan int64, 1)
	begin := time.Now()
	go func() {
		var sum int64
		for b := make([]byte, transferBuffer); ; {
			n, err := other.Read(b)
			sum += int64(n)
			if err != nil {
				_ = other.Close() // It was only read from.
				received <- sum
				return
			}
		}
	}()
	for b := make([]byte, transferBuffer); err == nil && time.Since(begin) < lasts; {
		_, err = c.Write(b)
	}
	err = errors.Join(err, c.(*net.TCPConn).CloseWrite())
	sum := <-received
	took := time.Since(begin)
	if err = errors.Join(ctx.Err(), err); err != nil {
		return 0, err
	}
	return float64(sum) / took.Seconds(), nil
}
