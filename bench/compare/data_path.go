package compare

import (
	"context"
	"errors"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/firstpacket"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
)

// dataPath measures first packets and connect(2) on each node, to Services and to an endpoint without a
// Service, and on an additional node without a Service proxy.
func (c *comparison) dataPath(ctx context.Context, nodes []*node, content *content) (err error) {
	if len(nodes) == 0 {
		return nil
	}
	c.progress("first packets of connections")
	direct := (&cluster.Service{}).WithEndpoint(cluster.WatchedAddr(directAddr)).Target(0)
	bare, err := testbed.New(testbed.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bare.Close()) }()
	var opened []*firstpacket.Node
	defer func() {
		for _, n := range opened {
			err = errors.Join(err, n.Close())
		}
	}()
	for _, n := range nodes {
		if err := n.testbed.SetBackgroundReachable(true); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.testbed.SetBackgroundReachable(false)) }()
		o, err := firstpacket.Open(n.sys.Name(), n.testbed, content.addrs, direct)
		if err != nil {
			return err
		}
		opened = append(opened, o)
	}
	if err := bare.TrackConnections(); err != nil {
		return err
	}
	o, err := firstpacket.Open(result.Direct, bare, nil, direct)
	if err != nil {
		return err
	}
	opened = append(opened, o)
	if err := firstpacket.Measure(ctx, opened, c.Samples); err != nil {
		return err
	}
	for _, n := range opened {
		for _, p := range n.Paths {
			scenario := result.Scenario{Services: len(content.services), Endpoints: c.Endpoints, Destination: p.Destination}
			m := c.measurement(p.System, result.FirstPacket, scenario)
			m.Unit, m.Samples = "s", p.FirstPackets
			m = c.measurement(p.System, result.Connect, scenario)
			m.Unit, m.Samples = "s", p.Connects
		}
	}
	return nil
}
