// Package inspect reads from the kernel what Fairlead has programmed, in whichever mode. It
// needs no running agent, takes no lock and writes nothing.
package inspect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/nft"
)

// Options select what to read. The zero value is valid.
type Options struct {
	// NetNS is a file descriptor of the network namespace, 0 for the namespace of the calling
	// thread.
	NetNS int
	// Mode is the mode to read. Empty means the programmed mode.
	Mode string
	// Connections determines whether to count connections by endpoint in mode nft, which shows
	// draining endpoints. IPVS counts connections itself.
	Connections ConnectionCount
}

// ConnectionCount says when to read the connection-tracking table.
type ConnectionCount int

// Values of [Options.Connections].
const (
	CountNever   ConnectionCount = iota
	CountIfCheap                 // if the table has at most CheapConnections entries
	CountAlways
)

// CheapConnections is the number of entries in the connection-tracking table that can be read
// in about 0.1 s.
const CheapConnections = 50_000

// The modes, as in --mode.
const (
	modeNFT  = "nft"
	modeIPVS = "ipvs"
)

// tableNames returns the names of the nftables tables by mode.
func tableNames() map[string]string {
	return map[string]string{modeNFT: nft.TableName, modeIPVS: ipvs.TableName}
}

// Modes returns the names of the modes that can be read.
func Modes() []string { return []string{modeNFT, modeIPVS} }

// Kernel is the programmed state of a network namespace.
type Kernel struct {
	// Mode is the programmed mode: nft or ipvs.
	Mode string
	// Frontends is sorted by Service, kind and address.
	Frontends []Frontend
	// NodePortRanges contains the addresses that accept connections to node ports.
	NodePortRanges []nft.AddrRange
	// Counters contains the counters of refused packets.
	Counters []nft.CounterValue
	// Retiring contains the virtual servers of deleted Services that still have connections, in
	// mode ipvs.
	Retiring []ipvs.VirtualServer
	// ConnectionsCounted reports whether Endpoint.Connections is known.
	ConnectionsCounted bool
	// Warnings contains gaps and doubts about the result.
	Warnings []string
}

// Frontend is a programmed frontend.
type Frontend struct {
	Frontend dataplane.Frontend
	// Kind is valid if KindKnown is true. Tables of earlier versions do not distinguish the
	// kinds of external addresses.
	Kind      dataplane.Kind
	KindKnown bool
	// Binding says how the kernel handles connections. In mode ipvs, its Scheduler is always set.
	Binding dataplane.Binding
	// SharedList reports whether the frontend shares its endpoints in the kernel with other
	// frontends of the Service.
	SharedList bool
	// Class is the service class in the nftables tables; see package nft.
	Class string
	// Endpoints contains the endpoints of both lists and draining endpoints, sorted by address.
	Endpoints []Endpoint
	// Stats counts the connections of the virtual server for all clients, in mode ipvs. It is
	// nil in mode nft.
	Stats *ipvs.Stats
}

// Service returns the namespace, the name and the port of the Service. The port is empty for an
// unnamed port.
func (f *Frontend) Service() (namespace, name, port string) {
	text, port, _ := strings.Cut(f.Binding.Service, ":")
	namespace, name, _ = strings.Cut(text, "/")
	return namespace, name, port
}

// KindName returns the kind of the frontend, for example ClusterIP.
func (f *Frontend) KindName() string {
	if !f.KindKnown {
		return dataplane.ExternalIP.String() + "/" + dataplane.LoadBalancer.String()
	}
	return f.Kind.String()
}

func (f *Frontend) compare(o *Frontend) int {
	return cmp.Or(
		strings.Compare(f.Binding.Service, o.Binding.Service),
		cmp.Compare(f.Kind, o.Kind),
		f.Frontend.Compare(o.Frontend),
	)
}

// Endpoint is a destination of a frontend's connections.
type Endpoint struct {
	Addr netip.AddrPort
	// Local reports that the endpoint may be a pod of this node.
	Local bool
	// ForCluster and ForExternal report whether the endpoint accepts new connections of clients
	// that get the list Endpoints and LocalEndpoints of the binding. An endpoint that accepts
	// none is draining.
	ForCluster, ForExternal bool
	// Connections is the number of connections that have not ended. See
	// Kernel.ConnectionsCounted.
	Connections int
	// Stats counts the connections of the destination in mode ipvs. It is nil in mode nft.
	Stats *ipvs.Stats
}

// Draining reports whether the endpoint accepts no new connections.
func (e *Endpoint) Draining() bool { return !e.ForCluster && !e.ForExternal }

// Mode returns the programmed mode, or checks that Options.Mode is programmed. The error is a
// [*NotProgrammedError] if it is not, and wraps [fs.ErrPermission] if the process lacks
// CAP_NET_ADMIN.
func Mode(ctx context.Context, opts Options) (string, error) {
	if opts.Mode != "" && !slices.Contains(Modes(), opts.Mode) {
		return "", fmt.Errorf("--mode: unknown mode %q: use %s", opts.Mode, strings.Join(Modes(), " or "))
	}
	var programmed []string
	for _, mode := range Modes() {
		exist, err := nft.TablesExist(ctx, nft.Options{NetNS: opts.NetNS, Table: tableNames()[mode]})
		if err != nil {
			return "", explain(err)
		}
		if exist {
			programmed = append(programmed, mode)
		}
	}
	switch {
	case opts.Mode == "" && len(programmed) == 1:
		return programmed[0], nil
	case opts.Mode != "" && slices.Contains(programmed, opts.Mode):
		return opts.Mode, nil
	default:
		return "", &NotProgrammedError{Mode: opts.Mode, Programmed: programmed}
	}
}

// Read returns the programmed state. Its errors are as for [Mode].
func Read(ctx context.Context, opts Options) (*Kernel, error) {
	mode, err := Mode(ctx, opts)
	if err != nil {
		return nil, err
	}
	k := &Kernel{Mode: mode}
	read := k.readNFT
	if mode == modeIPVS {
		read = k.readIPVS
	}
	if err := read(ctx, opts); err != nil {
		return nil, explain(err)
	}
	slices.SortFunc(k.Frontends, func(a, b Frontend) int { return a.compare(&b) })
	counters := nft.NewCounterReader(nft.Options{NetNS: opts.NetNS, Table: tableNames()[mode]})
	k.Counters, err = counters.Read(ctx)
	if err := errors.Join(err, counters.Close()); err != nil {
		return nil, err
	}
	return k, nil
}

// Services returns the sorted names of the programmed Services, without ports. It is faster than
// [Read]. Its errors are as for [Mode].
func Services(ctx context.Context, opts Options) ([]string, error) {
	mode, err := Mode(ctx, opts)
	if err != nil {
		return nil, err
	}
	names, err := nft.ServiceNames(ctx, nft.Options{NetNS: opts.NetNS, Table: tableNames()[mode]})
	if err != nil {
		return nil, err
	}
	services := make([]string, 0, len(names))
	for name := range names {
		service, _, _ := strings.Cut(name, ":")
		services = append(services, service)
	}
	slices.Sort(services)
	return slices.Compact(services), nil
}

// addTables adds what both modes have in their nftables tables.
func (k *Kernel) addTables(t *nft.Tables) {
	k.NodePortRanges = t.NodePortRanges
	for _, unread := range t.Unread {
		k.Warnings = append(k.Warnings, "another version of Fairlead has programmed this node, so that Services may be missing: "+unread)
	}
	if !t.Consistent {
		k.Warnings = append(k.Warnings, "the rules changed while they were read, so that Services may be shown in different states")
	}
}

func newFrontend(f dataplane.Frontend, state nft.FrontendState) Frontend {
	frontend := Frontend{
		Frontend: f, Kind: state.Kind, KindKnown: state.KindKnown, Binding: state.Binding, SharedList: state.SharedList, Class: state.Class,
	}
	if !state.KindKnown {
		frontend.Kind = dataplane.ExternalIP // sorts like the possible kinds
	}
	return frontend
}

func (k *Kernel) readNFT(ctx context.Context, opts Options) error {
	tables, err := nft.ReadTables(ctx, nft.Options{NetNS: opts.NetNS})
	if err != nil {
		return err
	}
	k.addTables(tables)
	counts, err := k.countConnections(ctx, opts)
	if err != nil {
		return err
	}
	for f, state := range tables.Frontends {
		frontend := newFrontend(f, state)
		list := newEndpointList(state.Binding)
		for addr, n := range counts[f] {
			list.at(addr).Connections = n
		}
		frontend.Endpoints = list
		k.Frontends = append(k.Frontends, frontend)
	}
	return nil
}

// countConnections returns the connections by frontend and endpoint, or nil if they are not
// counted.
func (k *Kernel) countConnections(ctx context.Context, opts Options) (map[dataplane.Frontend]map[netip.AddrPort]int, error) {
	if opts.Connections == CountNever {
		return nil, nil
	}
	if opts.Connections == CountIfCheap {
		if n, err := conntrack.Count(ctx, opts.NetNS); err != nil || n > CheapConnections {
			return nil, err
		}
	}
	counts := map[dataplane.Frontend]map[netip.AddrPort]int{}
	err := conntrack.VisitConnections(ctx, opts.NetNS, func(c conntrack.Connection) {
		f := dataplane.Frontend{Protocol: c.Protocol, Addr: c.Destination}
		if k.IsNodePortAddr(c.Destination.Addr()) {
			f.Addr = netip.AddrPortFrom(unspecified(c.Destination.Addr()), c.Destination.Port())
		}
		if counts[f] == nil {
			counts[f] = map[netip.AddrPort]int{}
		}
		counts[f][c.Endpoint]++
	})
	if err != nil {
		return nil, err
	}
	k.ConnectionsCounted = true
	return counts, nil
}

// IsNodePortAddr reports whether an address accepts connections to node ports.
func (k *Kernel) IsNodePortAddr(a netip.Addr) bool {
	return slices.ContainsFunc(k.NodePortRanges, func(r nft.AddrRange) bool { return r.Contains(a) })
}

// unspecified returns the unspecified address of an address's family.
func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func (k *Kernel) readIPVS(ctx context.Context, opts Options) error {
	state, err := ipvs.ReadKernel(ctx, ipvs.Options{NetNS: opts.NetNS})
	if err != nil {
		return err
	}
	k.addTables(state.Tables)
	k.Retiring, k.ConnectionsCounted = state.Retiring, true
	for f, s := range state.Frontends {
		frontend := newFrontend(f, s.FrontendState)
		list := newEndpointList(s.Binding)
		total := ipvs.Stats{}
		for _, server := range s.Servers {
			total = total.Add(server.Stats)
			for _, d := range server.Destinations {
				e := list.at(d.Addr)
				e.Connections += int(d.Active) + inactiveFlows(f.Protocol, d)
				stats := d.Stats
				if e.Stats != nil {
					stats = stats.Add(*e.Stats)
				}
				e.Stats = &stats
			}
		}
		frontend.Stats, frontend.Endpoints = &total, list
		k.Frontends = append(k.Frontends, frontend)
	}
	return nil
}

// inactiveFlows returns the number of inactive connections of a destination that may continue:
// IPVS counts all UDP flows as inactive, and of TCP the connections that have ended.
func inactiveFlows(p dataplane.Protocol, d ipvs.Destination) int {
	if p == dataplane.TCP {
		return 0
	}
	return int(d.Inactive)
}

// endpointList contains the endpoints of a frontend, sorted by address.
type endpointList []Endpoint

// newEndpointList returns the endpoints that accept new connections.
func newEndpointList(b dataplane.Binding) endpointList {
	l := make(endpointList, 0, len(b.Endpoints))
	for _, e := range b.Endpoints { // sorted
		l = append(l, Endpoint{Addr: e.Addr, Local: e.Local, ForCluster: true})
	}
	for _, e := range b.LocalEndpoints {
		at := l.at(e.Addr)
		at.ForExternal, at.Local = true, e.Local
	}
	return l
}

// at returns the endpoint with an address, which it adds if necessary. The result is valid until
// the next call.
func (l *endpointList) at(addr netip.AddrPort) *Endpoint {
	i, found := slices.BinarySearchFunc(*l, addr, func(e Endpoint, addr netip.AddrPort) int { return e.Addr.Compare(addr) })
	if !found {
		*l = slices.Insert(*l, i, Endpoint{Addr: addr})
	}
	return &(*l)[i]
}

// explain adds how to get the missing capability to an error that wraps [fs.ErrPermission].
func explain(err error) error {
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return &PermissionError{err}
}
