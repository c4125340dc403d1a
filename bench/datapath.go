package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/internal/nettest"
)

// path is a path to an endpoint: through a Service, or direct.
type path struct {
	system string
	addr   netip.AddrPort

	connectTimes, connectRates, throughputs []float64
}

// dataPath compares connections through a Service with direct connections for several numbers of
// Services. Measurements of the two paths alternate.
func dataPath(ctx context.Context, o Options, m *measurements) error {
	for _, n := range o.Sizes {
		services := newServices(n, o.Endpoints)
		target := services[n/2]
		target.Endpoints = []netip.Addr{cluster.WatchedAddr(0)}
		err := withLoadedTestbed(ctx, o, services, func(s *pipelineUnderTest, _ *testbed.Probe) error {
			paths := []*path{
				{system: m.system, addr: target.Addr()},
				{system: result.Direct, addr: netip.AddrPortFrom(target.Endpoints[0], cluster.TargetPort)},
			}
			o.Progress(fmt.Sprintf("data path: %d Services, %d connections", n, o.Samples))
			if err := measureConnects(ctx, s.testbed, paths, o.Samples); err != nil {
				return err
			}
			for i := range o.startCount() {
				o.Progress(fmt.Sprintf("data path: %d Services, transfer %d of %d", n, i+1, o.startCount()))
				if err := measureThroughput(ctx, s.testbed, paths, o.ThroughputTime); err != nil {
					return err
				}
			}
			return m.addPaths(result.Scenario{Services: n, Endpoints: o.Endpoints}, paths)
		})
		if err != nil {
			return fmt.Errorf("%d Services: %w", n, err)
		}
	}
	return nil
}

// addPaths adds the measurements of all paths, and the ratios of the first path to the second.
func (m *measurements) addPaths(scenario result.Scenario, paths []*path) error {
	for _, kind := range []struct {
		measure result.Measure
		unit    string
		samples func(*path) []float64
	}{
		{result.Connect, "s", func(p *path) []float64 { return p.connectTimes }},
		{result.ConnectRate, "1/s", func(p *path) []float64 { return p.connectRates }},
		{result.Throughput, "B/s", func(p *path) []float64 { return p.throughputs }},
	} {
		for _, p := range paths {
			m.add(p.system, kind.measure, scenario, kind.unit, kind.samples(p))
		}
		err := m.addPairedRatio(kind.measure, scenario,
			namedSamples{paths[0].system, kind.samples(paths[0])}, namedSamples{paths[1].system, kind.samples(paths[1])})
		if err != nil {
			return err
		}
	}
	return nil
}

// measureConnects makes n connections over each path, one at a time.
func measureConnects(ctx context.Context, r *testbed.Testbed, paths []*path, n int) (err error) {
	stop, err := testbed.AcceptAndClose(r.Endpoints, cluster.TargetPort)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	const warm = 50 // connections until neighbours are resolved and caches are warm
	// Each sample of the connection rate covers batch connections.
	batch := max(n/50, 1)
	return r.Client.Do(func() error {
		each := make([]time.Duration, len(paths))
		for i := range n + warm {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			for j, p := range paths {
				begin := time.Now()
				took, err := testbed.Connect(p.addr)
				if err != nil {
					return fmt.Errorf("connect to %s: %w", p.addr, err)
				}
				if i < warm {
					continue
				}
				p.connectTimes = append(p.connectTimes, took.Seconds())
				each[j] += time.Since(begin)
				if (i-warm+1)%batch == 0 {
					p.connectRates = append(p.connectRates, float64(batch)/each[j].Seconds())
					each[j] = 0
				}
			}
		}
		return nil
	})
}

// measureThroughput sends over one connection on each path for the given duration.
func measureThroughput(ctx context.Context, r *testbed.Testbed, paths []*path, duration time.Duration) error {
	l, err := r.Endpoints.Listen(ctx, nettest.TCP, netip.AddrPortFrom(netip.IPv4Unspecified(), cluster.TargetPort))
	if err != nil {
		return fmt.Errorf("listen on the endpoints: %w", err)
	}
	defer l.Close() //nolint:errcheck // no data is lost
	for _, p := range paths {
		rate, err := transfer(ctx, r, l, p.addr, duration)
		if err != nil {
			return fmt.Errorf("send to %s: %w", p.addr, err)
		}
		p.throughputs = append(p.throughputs, rate)
	}
	return nil
}

const transferBuffer = 256 << 10

// transfer sends over one connection for the given duration and returns the rate in bytes per
// second at which data arrived.
func transfer(ctx context.Context, r *testbed.Testbed, l net.Listener, addr netip.AddrPort, duration time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, duration+10*time.Second)
	defer cancel()
	c, err := r.Client.Dial(ctx, nettest.TCP, addr)
	if err != nil {
		return 0, err
	}
	defer c.Close() //nolint:errcheck // CloseWrite below reports write errors
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	defer stop()
	peer, err := l.Accept()
	if err != nil {
		return 0, err
	}
	received := make(chan int64, 1)
	begin := time.Now()
	go func() {
		var sum int64
		for b := make([]byte, transferBuffer); ; {
			n, err := peer.Read(b)
			sum += int64(n)
			if err != nil {
				_ = peer.Close() // only read from
				received <- sum
				return
			}
		}
	}()
	for b := make([]byte, transferBuffer); err == nil && time.Since(begin) < duration; {
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
