package trace

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/nft"
)

// Path is the path of the first packet of a connection through the rules of all tables.
type Path struct {
	Connection Connection       `json:"connection"`
	Events     []nft.TraceEvent `json:"events"`
	// Destinations contains the destinations of the packet in their order: the frontend, the
	// internal address of an IPVS virtual server, and the endpoint.
	Destinations []netip.AddrPort `json:"destinations"`
	// VirtualServer is the IPVS virtual server that selected the endpoint, or zero. It is one of
	// Destinations.
	VirtualServer netip.AddrPort `json:"virtualServer,omitzero"`
	// Dropped is set if a rule has dropped or rejected the packet.
	Dropped bool `json:"dropped,omitempty"`
}

// idleTime is the time without an event after which a packet has left the node.
const idleTime = 500 * time.Millisecond

// Follow waits for a new connection and follows its first packet. It returns an empty Path if ctx
// ends before. started is called when the connection can be opened. See [nft.Follow].
func Follow(ctx context.Context, c Connection, p dataplane.Protocol, host *Host, started func()) (*Path, error) {
	path := &Path{Connection: c}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var idle *time.Timer
	o := nft.FollowOptions{NetNS: host.netns, Source: c.Source, Destination: c.Destination, Protocol: p, Started: started}
	err := nft.Follow(ctx, o, func(e nft.TraceEvent) bool {
		if !path.add(e) {
			return true // a client that keeps connecting does not delay the end
		}
		if idle == nil {
			idle = time.AfterFunc(idleTime, cancel)
		}
		idle.Reset(idleTime)
		return !path.Dropped
	})
	if idle != nil {
		idle.Stop()
	}
	if err != nil {
		return nil, err
	}
	return path, path.findVirtualServer(p, host) //nolint:contextcheck // the kernel answers at once
}

// add adds an event of the first packet. It returns false for an event of another packet.
func (p *Path) add(e nft.TraceEvent) bool {
	if len(p.Events) > 0 && p.Events[0].Packet != e.Packet {
		return false
	}
	p.Events = append(p.Events, e)
	p.Dropped = p.Dropped || e.Verdict == "drop"
	if n := len(p.Destinations); e.Destination.IsValid() && (n == 0 || p.Destinations[n-1] != e.Destination) {
		p.Destinations = append(p.Destinations, e.Destination)
	}
	return true
}

// findVirtualServer sets VirtualServer if IPVS selected the endpoint.
func (p *Path) findVirtualServer(protocol dataplane.Protocol, host *Host) error {
	n := len(p.Destinations)
	if n < 2 {
		return nil
	}
	server := p.Destinations[n-2]
	_, ok, err := host.Destinations(protocol, server, p.Connection.Source)
	if ok {
		p.VirtualServer = server
	}
	return err
}

// WriteText writes the path as numbered lines.
func (p *Path) WriteText(w io.Writer) error {
	var b strings.Builder
	var destination netip.AddrPort
	for i, e := range p.Events {
		if e.Destination.IsValid() && e.Destination != destination {
			if destination.IsValid() && destination == p.VirtualServer {
				fmt.Fprintf(&b, "    IPVS: the virtual server %s selects %s\n", destination, e.Destination)
			}
			destination = e.Destination
			fmt.Fprintf(&b, "    packet from %s to %s\n", e.Source, e.Destination)
		}
		fmt.Fprintf(&b, "%2d. table %s, chain %s", i+1, e.Table, e.Chain)
		if e.Rule > 0 {
			fmt.Fprintf(&b, ", rule %d", e.Rule)
		}
		fmt.Fprintf(&b, ": %s", e.Verdict)
		if e.Comment != "" {
			fmt.Fprintf(&b, "   (%s)", e.Comment)
		}
		b.WriteString("\n")
	}
	b.WriteString("\nResult: ")
	switch n := len(p.Destinations); {
	case p.Dropped:
		b.WriteString("dropped or rejected by the last rule\n")
	case n < 2:
		b.WriteString("not translated\n")
	case p.VirtualServer.IsValid():
		fmt.Fprintf(&b, "endpoint %s, by the virtual server %s\n", p.Destinations[n-1], p.VirtualServer)
	default:
		fmt.Fprintf(&b, "endpoint %s\n", p.Destinations[n-1])
	}
	_, err := io.WriteString(w, b.String())
	return err
}
