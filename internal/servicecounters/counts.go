package servicecounters

import (
	"context"
	"net/netip"

	"fairlead.io/fairlead/dataplane"
)

// Series identifies a sum of counters.
type Series struct {
	Namespace, Name, Port string
	Protocol              dataplane.Protocol
	// Kind is the kind of the frontends. It is ClusterIP for an endpoint, which receives connections of
	// all kinds.
	Kind dataplane.Kind
	// Endpoint is the zero AddrPort for the connections of the Service.
	Endpoint netip.AddrPort
}

// seriesOf returns the series of an element. A Service has one for each kind of frontends.
func seriesOf(e element, k dataplane.Key) Series {
	s := Series{Namespace: k.Namespace, Name: k.Name, Port: k.Port, Protocol: e.frontend.Protocol, Kind: k.Kind, Endpoint: e.endpoint}
	if e.endpoint.IsValid() {
		s.Kind = dataplane.ClusterIP
	}
	return s
}

// Counts are the numbers of new connections since the counters exist.
type Counts struct {
	Connections map[Series]uint64
	// Counters is the number of counters in the kernel. Limited is the number of selected Service ports,
	// by family and kind, that are not counted because of [Options.MaxCounters].
	Counters, Limited int
}

// Counts reads the counters. If another program has removed the tables, Counts creates them again. It is
// safe for concurrent use.
func (d *Dataplane) Counts(ctx context.Context) (Counts, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	values, complete, err := d.read(ctx)
	if err == nil && len(d.desired) > 0 && (!complete || !d.intact) {
		if _, err = d.compare(ctx); err == nil {
			values, _, err = d.read(ctx)
		}
	}
	d.report(ctx, err)
	if err != nil {
		return Counts{}, err
	}
	c := Counts{Connections: map[Series]uint64{}, Counters: len(values), Limited: len(d.limited)}
	for e, key := range d.elements {
		if key == (dataplane.Key{}) {
			continue // of another configuration, about to be removed
		}
		s := seriesOf(e, key)
		c.Connections[s] += values[e].packets
	}
	for s, n := range d.removed {
		if _, ok := c.Connections[s]; ok {
			c.Connections[s] += n
		}
	}
	return c, nil
}
