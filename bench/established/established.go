// Package established measures established connections over several paths: through Services of several
// systems, and direct.
package established

import (
	"context"
	"errors"
	"fmt"
	"time"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
)

const (
	// warmExchanges is more than the packets after which Fairlead offloads a connection.
	warmExchanges = 50
	// packets is the number of packets of one try, and packetTries the number of tries of one sample.
	packets, packetTries = 200, 10
	// transferSize is the number of bytes of one try. A transfer time is scaled to transferUnit.
	transferSize, transferTries = 8 << 20, 5
	transferUnit                = 1 << 30
	// rounds without samples warm the caches up.
	warmRounds = 2
)

// Path is a path of packets from the client to an endpoint. The caller must close its Flows.
type Path struct {
	System string
	Flows  *testbed.Flows
	// PacketTimes and TransferTimes are the samples of [result.PacketTime] and [result.TransferTime] in
	// seconds.
	PacketTimes, TransferTimes []float64
}

// Services returns a TCP and a UDP Service with one endpoint, for [Open]. Their indices are first and
// first+1.
func Services(first int, addr int) (tcp, udp *cluster.Service) {
	tcp, udp = cluster.NewService(first, 1), cluster.NewUDPService(first+1, 1)
	tcp.Endpoints[0] = cluster.WatchedAddr(addr)
	udp.Endpoints[0] = tcp.Endpoints[0]
	return tcp, udp
}

// Open opens a path through Services from [Services].
func Open(ctx context.Context, system string, r *testbed.Testbed, tcp, udp *cluster.Service) (*Path, error) {
	f, err := r.OpenFlows(ctx, tcp.Target(0), tcp.Addr(), udp.Addr())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", system, err)
	}
	return warmUp(&Path{System: system, Flows: f})
}

// OpenDirect opens a path to an endpoint without a Service.
func OpenDirect(ctx context.Context, r *testbed.Testbed, addr int) (*Path, error) {
	service := &cluster.Service{}
	service = service.WithEndpoint(cluster.WatchedAddr(addr))
	endpoint := service.Target(0)
	f, err := r.OpenFlows(ctx, endpoint, endpoint, endpoint)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", result.Direct, err)
	}
	return warmUp(&Path{System: result.Direct, Flows: f})
}

func warmUp(p *Path) (*Path, error) {
	for range warmExchanges {
		if err := p.Flows.Exchange(); err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", p.System, err), p.Flows.Close())
		}
	}
	return p, nil
}

// Measure takes samples on all paths in turns. A sample is the fastest of several short tries, so that
// other activity on the machine affects it less.
func Measure(ctx context.Context, paths []*Path, samples int) error {
	for round := range samples + warmRounds {
		packetTimes, err := fastest(ctx, paths, round, packetTries, func(f *testbed.Flows) (time.Duration, error) { return f.SendPackets(packets) })
		if err != nil {
			return err
		}
		transferTimes, err := fastest(ctx, paths, round, transferTries, func(f *testbed.Flows) (time.Duration, error) { return f.Transfer(transferSize) })
		if err != nil {
			return err
		}
		if round < warmRounds {
			continue
		}
		for i, p := range paths {
			p.PacketTimes = append(p.PacketTimes, packetTimes[i].Seconds())
			p.TransferTimes = append(p.TransferTimes, transferTimes[i].Seconds()*transferUnit/transferSize)
		}
	}
	return nil
}

// fastest returns the fastest of several tries on each path. The paths alternate, in an order that depends
// on the round.
func fastest(ctx context.Context, paths []*Path, round, tries int, try func(*testbed.Flows) (time.Duration, error)) ([]time.Duration, error) {
	times := make([]time.Duration, len(paths))
	for i := range tries {
		for j := range paths {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			path := (round + i + j) % len(paths)
			took, err := try(paths[path].Flows)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", paths[path].System, err)
			}
			if i == 0 || took < times[path] {
				times[path] = took
			}
		}
	}
	return times, nil
}
