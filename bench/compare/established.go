package compare

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"fairlead.io/fairlead/bench/established"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
)

// The endpoints of established connections have addresses above all others.
const (
	establishedAddr = 1 << 21
	directAddr      = establishedAddr + 1
)

// established measures established connections through a Service on each node, on an additional node with
// flow offload, and without a Service. If the kernel has no flowtables, the report says so.
func (c *comparison) established(ctx context.Context, nodes []*node, s *serverPool) (err error) {
	if len(nodes) == 0 {
		return nil
	}
	c.progress("established connections")
	var paths []*established.Path
	defer func() {
		for _, p := range paths {
			err = errors.Join(err, p.Flows.Close())
		}
	}()
	open := func(n *node) (*established.Path, error) {
		tcp, udp := established.Services(c.onlyEndpointIndex(n)+1, establishedAddr)
		if err := n.server.create(ctx, tcp.Object(), tcp.Slice(), udp.Object(), udp.Slice()).wait(); err != nil {
			return nil, err
		}
		return established.Open(ctx, n.sys.Name(), n.testbed, tcp, udp)
	}
	for _, n := range nodes {
		p, err := open(n)
		if err != nil {
			return err
		}
		paths = append(paths, p)
	}
	direct, err := established.OpenDirect(ctx, nodes[0].testbed, directAddr)
	if err != nil {
		return err
	}
	paths = append(paths, direct)
	offload, err := c.startFlowOffload(ctx, nodes, s)
	if offload != nil {
		defer func() { err = errors.Join(err, offload.close()) }()
	}
	if err == nil && offload != nil {
		var p *established.Path
		if p, err = open(offload); err == nil {
			paths = append(paths, p)
			err = p.Flows.WaitOffloaded(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", system.NFTFlowOffload, err)
	}
	if err := established.Measure(ctx, paths, c.Samples); err != nil {
		return err
	}
	scenario := result.Scenario{Services: len(s.services), Endpoints: c.Endpoints}
	for _, p := range paths {
		m := c.measurement(p.System, result.PacketTime, scenario)
		m.Unit, m.Samples = "s", p.PacketTimes
		m = c.measurement(p.System, result.TransferTime, scenario)
		m.Unit, m.Samples = "s", p.TransferTimes
	}
	return nil
}

// startFlowOffload starts the first of the systems that supports flow offload with it, on a node of its
// own. It returns no node if no system supports it, or if the kernel does not; the report has the reason.
func (c *comparison) startFlowOffload(ctx context.Context, nodes []*node, s *serverPool) (*node, error) {
	sys := withFlowOffload(nodes)
	if sys == nil {
		return nil, nil
	}
	if checker, ok := sys.(system.Checker); ok {
		err := checker.Check(ctx, nodes[0].testbed.Node.Namespace)
		if unavailable, ok := errors.AsType[*system.UnavailableError](err); ok {
			c.leaveOutFlowOffload(sys.Name(), unavailable.Reason)
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
	server, err := s.serverFor(ctx, sys)
	if err != nil {
		return nil, err
	}
	c.flowOffload = sys
	n, _, _, err := c.startNode(ctx, sys, server, s.content)
	return n, err
}

func withFlowOffload(nodes []*node) system.System {
	for _, n := range nodes {
		if f, ok := n.sys.(interface{ WithFlowOffload() (system.System, bool) }); ok {
			if sys, ok := f.WithFlowOffload(); ok {
				return sys
			}
		}
	}
	return nil
}

// leaveOutFlowOffload records once that established connections are not measured with flow offload.
func (c *comparison) leaveOutFlowOffload(name, reason string) {
	for _, measure := range []result.Measure{result.PacketTime, result.TransferTime} {
		l := result.LeftOut{System: name, Measure: measure, Environment: c.Environment.Name, Reason: reason}
		if slices.Contains(c.report.LeftOut, l) {
			return
		}
		c.report.LeftOut = append(c.report.LeftOut, l)
	}
	c.progress("%s is left out: %s", name, reason)
}
