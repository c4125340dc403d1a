package ipvs

import (
	"cmp"
	"context"
	"encoding/binary"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"
	"fairlead.io/fairlead/nft"
)

// Kernel is the state that the backend has programmed into the kernel.
type Kernel struct {
	// Tables is the content of the nftables tables.
	Tables *nft.Tables
	// Frontends contains the frontends of Tables with their virtual servers.
	Frontends map[dataplane.Frontend]FrontendState
	// Retiring contains the virtual servers that no frontend refers to, sorted by address: they
	// belonged to deleted Services and keep their connections until these end.
	Retiring []VirtualServer
}

// FrontendState is the state of one frontend in the kernel.
type FrontendState struct {
	// FrontendState contains the complete binding. Its Scheduler is set unless there is no
	// virtual server.
	nft.FrontendState
	// Servers contains the virtual servers for Endpoints (index 0) and LocalEndpoints (index 1).
	// A virtual server that does not exist has no scheduler.
	Servers [2]VirtualServer
}

// VirtualServer is a virtual server in the kernel.
type VirtualServer struct {
	Protocol  dataplane.Protocol
	Addr      netip.AddrPort
	Scheduler string
	Stats     Stats
	// Destinations is sorted by address.
	Destinations []Destination
}

// Destination is a destination of a virtual server. A destination with weight 0 accepts no new
// connections.
type Destination struct {
	Addr   netip.AddrPort
	Weight uint32
	// Active counts the established TCP connections, Inactive all other connections that the
	// kernel has not forgotten yet.
	Active, Inactive uint32
	Stats            Stats
}

// Stats counts what a virtual server or a destination has handled since it was added. The kernel
// updates the counts every two seconds (net/netfilter/ipvs/ip_vs_est.c).
type Stats struct {
	Connections, InPackets, OutPackets, InBytes, OutBytes uint64
}

// ReadKernel returns the state of the backend in the kernel. It needs no Dataplane, writes
// nothing and loads no module. Virtual servers and nftables tables cannot be read at once, so
// the result may mix two states while Services change. The error is as for [Open].
func ReadKernel(ctx context.Context, opts Options) (*Kernel, error) {
	tables, err := nft.ReadTables(ctx, nft.Options{NetNS: opts.NetNS, Table: TableName})
	if err != nil {
		return nil, err
	}
	k := &Kernel{Tables: tables, Frontends: make(map[dataplane.Frontend]FrontendState, len(tables.Frontends))}
	for f, state := range tables.Frontends {
		k.Frontends[f] = FrontendState{FrontendState: state}
	}
	err = inNamespace(opts.NetNS, func() error {
		return withIPVS(func(c *ipvsConn) error { //nolint:contextcheck // its netlink requests take milliseconds
			h, err := openHost(0)
			if err != nil {
				return err
			}
			defer h.close() //nolint:errcheck // nothing was written
			return k.readServers(ctx, c, h)
		})
	})
	if err != nil {
		return nil, explain(err)
	}
	return k, nil
}

// readServers adds the virtual servers.
func (k *Kernel) readServers(ctx context.Context, c *ipvsConn, h *host) error {
	bound, err := readBoundAddrs(h) //nolint:contextcheck // its netlink requests take milliseconds
	if err != nil {
		return err
	}
	reader := serverReader{c, map[serverKey]settings{}, map[serverKey]Stats{}, map[serverKey]VirtualServer{}}
	err = c.forEachServer(func(s serverKey, set settings, attributes []byte) { //nolint:contextcheck // its netlink requests take milliseconds
		reader.servers[s], reader.stats[s] = set, parseStats(attributes)
	})
	if err != nil {
		return err
	}
	for f, state := range k.Frontends {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := reader.addServers(f, &state); err != nil { //nolint:contextcheck // its netlink requests take milliseconds
			return err
		}
		k.Frontends[f] = state
	}
	for s := range reader.servers {
		if _, used := reader.done[s]; used || !isInternal(s.addr.Addr()) && !bound[s.addr.Addr()] {
			continue
		}
		v, err := reader.read(s) //nolint:contextcheck // its netlink requests take milliseconds
		if err != nil {
			return err
		}
		k.Retiring = append(k.Retiring, v)
	}
	slices.SortFunc(k.Retiring, func(a, b VirtualServer) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Protocol, b.Protocol))
	})
	return nil
}

// serverReader reads virtual servers with their destinations, each once.
type serverReader struct {
	conn    *ipvsConn
	servers map[serverKey]settings
	stats   map[serverKey]Stats
	done    map[serverKey]VirtualServer
}

// addServers sets the virtual servers of a frontend, and the rest of its binding.
func (r *serverReader) addServers(f dataplane.Frontend, state *FrontendState) error {
	keys := serverKeys(f, state.VirtualBinding)
	if err := r.conn.addMissing(r.servers, slices.Values(keys[:1])); err != nil {
		return err
	}
	var destinations [endpointLists]map[netip.AddrPort]destination
	for l, s := range keys {
		if !s.addr.IsValid() {
			continue
		}
		v, err := r.read(s)
		if err != nil {
			return err
		}
		state.Servers[l] = v
		destinations[l] = map[netip.AddrPort]destination{}
		for _, d := range v.Destinations {
			destinations[l][d.Addr] = destination{weight: d.Weight}
		}
	}
	state.Binding = bindingOf(state.VirtualBinding, r.servers[keys[clusterEndpoints]], destinations)
	return nil
}

// read returns a virtual server. Its scheduler is empty if it does not exist.
func (r *serverReader) read(s serverKey) (VirtualServer, error) {
	if v, ok := r.done[s]; ok {
		return v, nil
	}
	v := VirtualServer{Protocol: s.protocol, Addr: s.addr, Scheduler: r.servers[s].scheduler, Stats: r.stats[s]}
	err := r.conn.forEachDestination(s, func(attributes []byte) {
		addr, d := parseDestination(attributes, addressFamily(s.addr.Addr()))
		v.Destinations = append(v.Destinations, Destination{
			Addr: addr, Weight: d.weight, Active: d.active, Inactive: d.connections - d.active, Stats: parseStats(attributes),
		})
	})
	if err != nil {
		return VirtualServer{}, err
	}
	slices.SortFunc(v.Destinations, func(a, b Destination) int { return a.Addr.Compare(b.Addr) })
	r.done[s] = v
	return v, nil
}

// Attributes of statistics (linux/ip_vs.h). A service and a destination have stats64 under the
// same number.
const (
	attrStats64 = 12

	statsConnections = 1
	statsInPackets   = 2
	statsOutPackets  = 3
	statsInBytes     = 4
	statsOutBytes    = 5
)

// parseStats decodes the statistics among the attributes of a virtual server or a destination.
func parseStats(attributes []byte) Stats {
	var s Stats
	nested, _ := nlconn.Attribute(attributes, attrStats64)
	for typ, data := range nlconn.Attributes(nested) {
		if len(data) != 8 {
			continue
		}
		count := binary.NativeEndian.Uint64(data)
		switch typ {
		case statsConnections:
			s.Connections = count
		case statsInPackets:
			s.InPackets = count
		case statsOutPackets:
			s.OutPackets = count
		case statsInBytes:
			s.InBytes = count
		case statsOutBytes:
			s.OutBytes = count
		}
	}
	return s
}

// Add returns the sum of two statistics.
func (s Stats) Add(o Stats) Stats {
	return Stats{
		s.Connections + o.Connections, s.InPackets + o.InPackets, s.OutPackets + o.OutPackets, s.InBytes + o.InBytes, s.OutBytes + o.OutBytes,
	}
}
