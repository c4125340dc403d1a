package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"fairlead.io/fairlead/bench/established"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/flowoffload"
)

// The endpoints of established connections have addresses above all others.
const (
	establishedAddr = 1 << 21
	directAddr      = establishedAddr + 1
)

// establishedConnections compares established connections through a Service, with and without flow
// offload, with a direct connection. The paths alternate. Without flowtables, the report names the reason.
func establishedConnections(ctx context.Context, o Options, m *measurements) error {
	scenario := result.Scenario{Services: o.Services, Endpoints: o.Endpoints}
	services := newServices(o.Services, o.Endpoints)
	tcp, udp := established.Services(len(services), establishedAddr)
	services = append(services, tcp, udp)
	return withLoadedTestbed(ctx, o, services, func(s *pipelineUnderTest, _ *testbed.Probe) (err error) {
		service, err := established.Open(ctx, m.system, s.testbed, tcp, udp)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, service.Flows.Close()) }()
		direct, err := established.OpenDirect(ctx, s.testbed, directAddr)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, direct.Flows.Close()) }()
		measure := func(paths ...*established.Path) error {
			o.Progress(fmt.Sprintf("established: %d rounds", o.Samples))
			if err := established.Measure(ctx, paths, o.Samples); err != nil {
				return err
			}
			return m.addEstablished(scenario, paths)
		}
		if reason := flowOffloadUnavailable(o.Mode, s.testbed); reason != "" {
			for _, name := range []result.Measure{result.PacketTime, result.TransferTime} {
				m.leaveOut(system.NFTFlowOffload, name, reason)
			}
			return measure(direct, service)
		}
		o.flowOffload = true
		return withLoadedTestbed(ctx, o, services, func(s *pipelineUnderTest, _ *testbed.Probe) (err error) {
			offloaded, err := established.Open(ctx, system.NFTFlowOffload, s.testbed, tcp, udp)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, offloaded.Flows.Close()) }()
			if err := offloaded.Flows.WaitOffloaded(ctx); err != nil {
				return fmt.Errorf("%s: %w", system.NFTFlowOffload, err)
			}
			m.systems = append(m.systems, result.System{Name: system.NFTFlowOffload, Version: o.Version})
			return measure(direct, service, offloaded)
		})
	})
}

// flowOffloadUnavailable returns why flow offload cannot be measured, empty if it can.
func flowOffloadUnavailable(mode string, r *testbed.Testbed) string {
	if mode != system.ModeNFT {
		return "flow offload requires the mode " + system.ModeNFT
	}
	if err := flowoffload.Check(r.Endpoints.Fd()); err != nil {
		return fmt.Sprintf("not supported by this kernel: %v", err)
	}
	return ""
}

// addEstablished adds the measurements of all paths, and the ratios of the first path to the others.
func (m *measurements) addEstablished(scenario result.Scenario, paths []*established.Path) error {
	for _, kind := range []struct {
		measure result.Measure
		samples func(*established.Path) []float64
	}{
		{result.PacketTime, func(p *established.Path) []float64 { return p.PacketTimes }},
		{result.TransferTime, func(p *established.Path) []float64 { return p.TransferTimes }},
	} {
		for _, p := range paths {
			m.add(p.System, kind.measure, scenario, "s", kind.samples(p))
		}
		for _, p := range paths[1:] {
			err := m.addPairedRatio(kind.measure, scenario, namedSamples{p.System, kind.samples(p)}, namedSamples{paths[0].System, kind.samples(paths[0])})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// offloading is a Dataplane that offloads connections to the Services of a backend.
type offloading struct {
	*flowoffload.Dataplane

	inner dataplane.Dataplane
	stop  func() error
}

// openOffloading opens the mode nft with flow offload. Close closes inner as well.
func openOffloading(netns int, inner dataplane.Dataplane) (dataplane.Dataplane, error) {
	d, err := flowoffload.New(inner, flowoffload.Options{NetNS: netns, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, errors.Join(err, inner.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	return offloading{d, inner, func() error { cancel(); return <-ended }}, nil
}

// Close implements [dataplane.Dataplane].
func (o offloading) Close() error {
	return errors.Join(o.stop(), o.Dataplane.Close(), o.inner.Close())
}
