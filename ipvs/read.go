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
		b, err := d.readBinding(servers, f, rule)
		if err != nil {
			return nil, err
		}
		state[f] = b
	}
	return state, nil
}

// readBinding returns the binding of a frontend. servers contains the virtual servers that a
// dump has returned.
func (d *Dataplane) readBinding(servers map[serverKey]settings, f dataplane.Frontend, rule nft.VirtualBinding) (dataplane.Binding, error) {
	keys := serverKeys(f, rule)
	if err := d.ipvs.addMissing(servers, slices.Values(keys[:1])); err != nil {
		return dataplane.Binding{}, err
	}
	set, exists := servers[keys[clusterEndpoints]]
	var destinations [endpointLists]map[netip.AddrPort]destination
	for l := range endpointLists {
		if !exists || !rule.Served[l] {
			continue
		}
		var err error
		if destinations[l], err = d.ipvs.dumpDestinations(keys[l]); err != nil {
			return dataplane.Binding{}, err
		}
	}
	b := bindingOf(rule, set, destinations)
	if b.Scheduler == d.scheduler {
		b.Scheduler = ""
	}
	return b, nil
}

// serverKeys returns the virtual servers of a frontend's endpoint lists. The second is invalid
// without a local list.
func serverKeys(f dataplane.Frontend, rule nft.VirtualBinding) [endpointLists]serverKey {
	keys := [endpointLists]serverKey{{f.Protocol, f.Addr}, {f.Protocol, rule.Virtual[localEndpoints]}}
	if v := rule.Virtual[clusterEndpoints]; v.IsValid() {
		keys[clusterEndpoints].addr = v
	}
	return keys
}

// bindingOf returns the binding of a frontend whose virtual server has these settings and
// whose lists have these destinations.
func bindingOf(rule nft.VirtualBinding, set settings, destinations [endpointLists]map[netip.AddrPort]destination) dataplane.Binding {
	b := rule.Binding
	b.Scheduler = schedulerOf(set)
	if set.flags&flagPersistent != 0 {
		b.Affinity = time.Duration(set.timeout) * time.Second
	}
	if rule.Served[clusterEndpoints] {
		b.Endpoints = activeEndpoints(destinations[clusterEndpoints], rule.Local)
	}
	if rule.Served[localEndpoints] {
		b.LocalEndpoints = activeEndpoints(destinations[localEndpoints], rule.Local)
	}
	return b
}

// activeEndpoints returns the endpoints that accept new connections.
func activeEndpoints(destinations map[netip.AddrPort]destination, localAddrs []netip.Addr) []dataplane.Endpoint {
	var endpoints []dataplane.Endpoint
	for addr, dest := range destinations {
		if dest.weight > 0 {
			_, local := slices.BinarySearchFunc(localAddrs, addr.Addr(), netip.Addr.Compare)
			endpoints = append(endpoints, dataplane.Endpoint{Addr: addr, Local: local})
		}
	}
	slices.SortFunc(endpoints, func(a, b dataplane.Endpoint) int { return a.Addr.Compare(b.Addr) })
	return endpoints
}
