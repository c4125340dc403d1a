// Package firstpacket measures the first packets of connections, and connect(2), over several paths: through
// Services of several systems, and to endpoints without a Service on the same nodes.
package firstpacket

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
)

const (
	// packets is the number of packets of one try. A sample is the fastest of several tries, so that other
	// activity on the machine affects it less.
	packets, packetTries, connectTries = 100, 10, 10
	// rounds without samples warm the caches up.
	warmRounds = 2
)

// Path is a kind of connections on one node. The caller must close it.
type Path struct {
	System      string
	Destination result.Destination
	// FirstPackets and Connects are the samples of [result.FirstPacket] and [result.Connect] in seconds.
	FirstPackets, Connects []float64

	packets *testbed.FirstPackets
	testbed *testbed.Testbed
	addrs   []netip.AddrPort // to select from
}

// Node is a node with several paths.
type Node struct {
	Paths   []*Path
	packets *testbed.FirstPackets
	testbed *testbed.Testbed
	stop    func() error
}

// Open opens the paths of a node: to one Service, to random Services, and to an endpoint without a Service,
// which is direct. Without Services, the last path is the only one. All endpoints must be reachable, see
// [testbed.Testbed.SetBackgroundReachable].
func Open(system string, r *testbed.Testbed, services []netip.AddrPort, direct netip.AddrPort) (*Node, error) {
	f, err := r.OpenFirstPackets()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", system, err)
	}
	stop, err := testbed.AcceptAndClose(r.Endpoints, cluster.TargetPort)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", system, err), f.Close())
	}
	n := &Node{packets: f, testbed: r, stop: stop}
	add := func(d result.Destination, addrs ...netip.AddrPort) {
		n.Paths = append(n.Paths, &Path{System: system, Destination: d, packets: f, testbed: r, addrs: addrs})
	}
	if len(services) > 0 {
		add(result.OneService, services[len(services)/2])
		add(result.RandomServices, services...)
	}
	add(result.NoService, direct)
	return n, nil
}

// Close closes the paths of the node.
func (n *Node) Close() error { return errors.Join(n.stop(), n.packets.Close()) }

// Measure takes samples on all paths in turns.
func Measure(ctx context.Context, nodes []*Node, samples int) error {
	var paths []*Path
	for _, n := range nodes {
		paths = append(paths, n.Paths...)
	}
	for round := range samples + warmRounds {
		firstPackets, err := fastest(ctx, paths, round, packetTries, packets, (*Path).sendPackets)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			if err := n.packets.ForgetConnections(); err != nil {
				return err
			}
		}
		connects, err := fastest(ctx, paths, round, connectTries, 1, (*Path).connect)
		if err != nil {
			return err
		}
		if round < warmRounds {
			continue
		}
		for i, p := range paths {
			p.FirstPackets = append(p.FirstPackets, firstPackets[i].Seconds())
			p.Connects = append(p.Connects, connects[i].Seconds())
		}
	}
	for _, n := range nodes {
		if err := n.packets.CheckArrived(); err != nil {
			return fmt.Errorf("%s: %w", n.Paths[0].System, err)
		}
	}
	return nil
}

func (p *Path) sendPackets(to []netip.AddrPort) (time.Duration, error) { return p.packets.Send(to) }

func (p *Path) connect(to []netip.AddrPort) (took time.Duration, err error) {
	err = p.testbed.Client.Do(func() error {
		took, err = testbed.Connect(to[0])
		return err
	})
	return took, err
}

// fastest returns the fastest of several tries on each path, each of which goes to n addresses of the path.
// The paths alternate, in an order that depends on the round. Paths with equal addresses get the same ones.
func fastest(
	ctx context.Context, paths []*Path, round, tries, n int, try func(*Path, []netip.AddrPort) (time.Duration, error),
) ([]time.Duration, error) {
	times := make([]time.Duration, len(paths))
	to := make([]netip.AddrPort, n)
	for i := range tries {
		for j := range paths {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			path := (round + i + j) % len(paths)
			p := paths[path]
			random := rand.New(rand.NewPCG(uint64(round), uint64(i))) //nolint:gosec // no secret
			for k := range to {
				to[k] = p.addrs[random.IntN(len(p.addrs))]
			}
			took, err := try(p, to)
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", p.System, p.Destination, err)
			}
			if i == 0 || took < times[path] {
				times[path] = took
			}
		}
	}
	return times, nil
}
