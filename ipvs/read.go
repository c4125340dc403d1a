package ipvs

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/nft"
)

// Read implements [dataplane.Dataplane]. The rules say which virtual servers the
// connections to a frontend go to, and the virtual servers where from there. A
// Service that names the scheduler of all others reads as one that names none.
func (d *Dataplane) Read(ctx context.Context) (dataplane.State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	rules, err := d.rules.ReadVirtualBindings(ctx)
	if err != nil {
		return nil, err
	}
	found, err := d.ipvs.dumpServers()
	if err != nil {
		return nil, err
	}
	state := make(dataplane.State, len(rules))
	for f, rule := range rules {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		b := rule.Binding
		cluster := serverKey{f.Protocol, f.Addr}
		if v := rule.Virtual[clusterEndpoints]; v.IsValid() {
			cluster.addr = v
		}
		if err := d.ipvs.addMissing(found, slices.Values([]serverKey{cluster})); err != nil {
			return nil, err
		}
		set, there := found[cluster]
		if !there {
			state[f] = b
			continue
		}
		if set.flags&flagPersistent != 0 {
			b.Affinity = time.Duration(set.timeout) * time.Second
		}
		if set.scheduler != d.scheduler {
			b.Scheduler = set.scheduler
		}
		if rule.Served[clusterEndpoints] {
			if b.Endpoints, err = d.activeEndpoints(cluster, rule); err != nil {
				return nil, err
			}
		}
		if rule.Served[localEndpoints] {
			if b.LocalEndpoints, err = d.activeEndpoints(serverKey{f.Protocol, rule.Virtual[localEndpoints]}, rule); err != nil {
				return nil, err
			}
		}
		state[f] = b
	}
	return state, nil
}

// activeEndpoints returns the endpoints that take new connections of a virtual server.
func (d *Dataplane) activeEndpoints(s serverKey, rule nft.VirtualBinding) ([]dataplane.Endpoint, error) {
	found, err := d.ipvs.dumpDestinations(s)
	if err != nil {
		return nil, err
	}
	var endpoints []dataplane.Endpoint
	for addr, dest := range found {
		if dest.weight > 0 {
			_, local := slices.BinarySearchFunc(rule.Local, addr.Addr(), netip.Addr.Compare)
			endpoints = append(endpoints, dataplane.Endpoint{Addr: addr, Local: local})
		}
	}
	slices.SortFunc(endpoints, func(a, b dataplane.Endpoint) int { return a.Addr.Compare(b.Addr) })
	return endpoints, nil
}
