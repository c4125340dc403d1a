package ipvs

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/nft"
)

// Read implements [dataplane.Dataplane]. The nftables rules map a frontend to its virtual
// servers, and the virtual servers hold the endpoints. A Service with the default scheduler
// reads as a Service without a scheduler.
func (d *Dataplane) Read(ctx context.Context) (dataplane.State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	rules, err := d.rules.ReadVirtualBindings(ctx)
	if err != nil {
		return nil, err
	}
	servers, err := d.ipvs.dumpServers()
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
		if err := d.ipvs.addMissing(servers, slices.Values([]serverKey{cluster})); err != nil {
			return nil, err
		}
		set, exists := servers[cluster]
		if !exists {
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

// activeEndpoints returns the endpoints of a virtual server that accept new connections.
func (d *Dataplane) activeEndpoints(s serverKey, rule nft.VirtualBinding) ([]dataplane.Endpoint, error) {
	destinations, err := d.ipvs.dumpDestinations(s)
	if err != nil {
		return nil, err
	}
	var endpoints []dataplane.Endpoint
	for addr, dest := range destinations {
		if dest.weight > 0 {
			_, local := slices.BinarySearchFunc(rule.Local, addr.Addr(), netip.Addr.Compare)
			endpoints = append(endpoints, dataplane.Endpoint{Addr: addr, Local: local})
		}
	}
	slices.SortFunc(endpoints, func(a, b dataplane.Endpoint) int { return a.Addr.Compare(b.Addr) })
	return endpoints, nil
}
