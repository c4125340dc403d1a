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
	// Destinations contains the destinations of the packet in their order: the frontend, an IPVS
	// virtual server, and the endpoint.
	Destinations []netip.AddrPort `json:"destinations"`
	// Dropped is set if a rule has dropped or rejected the packet.
	Dropped bool `json:"dropped,omitempty"`
}

// idleTime is the time without an event after which a packet has left the node.
const idleTime = 500 * time.Millisecond

// Follow waits for a new connection and follows its first packet. It returns an empty Path if ctx
// ends before. started is called when the connection can be opened. See [nft.Follow].
func Follow(ctx context.Context, c Connection, p dataplane.Protocol, started func()) (*Path, error) {
	path := &Path{Connection: c}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var idle *time.Timer
	err := nft.Follow(ctx, nft.FollowOptions{Source: c.Source, Destination: c.Destination, Protocol: p, Started: started}, func(e nft.TraceEvent) bool {
		if idle == nil {
			idle = time.AfterFunc(idleTime, cancel)
		}
		idle.Reset(idleTime)
		path.add(e)
		return !path.Dropped
	})
	if idle != nil {
		idle.Stop()
	}
	return path, err
}

// add adds an event of the first packet.
func (p *Path) add(e nft.TraceEvent) {
	if len(p.Events) > 0 && p.Events[0].Packet != e.Packet {
		return
	}
	p.Events = append(p.Events, e)
	p.Dropped = p.Dropped || e.Verdict == "drop"
	if n := len(p.Destinations); e.Destination.IsValid() && (n == 0 || p.Destinations[n-1] != e.Destination) {
		p.Destinations = append(p.Destinations, e.Destination)
	}
}

// WriteText writes the path as numbered lines.
func (p *Path) WriteText(w io.Writer) error {
	var b strings.Builder
	var destination netip.AddrPort
	for i, e := range p.Events {
		if e.Destination.IsValid() && e.Destination != destination {
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
	case n == 2:
		fmt.Fprintf(&b, "endpoint %s\n", p.Destinations[n-1])
	default:
		fmt.Fprintf(&b, "endpoint %s, by the virtual server %s\n", p.Destinations[n-1], p.Destinations[n-2])
	}
	_, err := io.WriteString(w, b.String())
	return err
}
