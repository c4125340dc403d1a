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
	rules, err := d.rules.ReadRules(ctx)
	if err != nil {
		return nil, err
	}
	found, err := d.kernel.servers()
	if err != nil {
		return nil, err
	}
	state := make(dataplane.State, len(rules))
	for f, rule := range rules {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		b := rule.Binding
		cluster := server{f.Protocol, f.Addr}
		if v := rule.Virtual[clusterList]; v.IsValid() {
			cluster.addr = v
		}
		if err := d.kernel.complete(found, slices.Values([]server{cluster})); err != nil {
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
		if rule.Served[clusterList] {
			if b.Endpoints, err = d.reachable(cluster, rule); err != nil {
				return nil, err
			}
		}
		if rule.Served[localList] {
			if b.LocalEndpoints, err = d.reachable(server{f.Protocol, rule.Virtual[localList]}, rule); err != nil {
				return nil, err
			}
		}
		state[f] = b
	}
	return state, nil
}

// reachable returns the endpoints that take new connections of a virtual server.
func (d *Dataplane) reachable(s server, rule nft.Rule) ([]dataplane.Endpoint, error) {
	found, err := d.kernel.destinations(s)
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
