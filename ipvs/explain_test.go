//go:build ipvs

package ipvs

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
	"fairlead.io/fairlead/nft"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// explainHost implements nft.Host for a network namespace.
type explainHost struct {
	netns  int
	handle *netlink.Handle
}

func (h explainHost) IsLocal(addr netip.Addr) (bool, error) {
	routes, err := h.handle.RouteGet(addr.AsSlice())
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EINVAL):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look up the route to %s: %w", addr, err)
	}
	return len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL, nil
}

func (h explainHost) Destinations(p dataplane.Protocol, server netip.AddrPort, client netip.Addr) (nft.Balance, bool, error) {
	return Destinations(h.netns, p, server, client)
}

// source returns the address that the node uses towards addr.
func (h explainHost) source(addr netip.Addr) netip.Addr {
	if routes, err := h.handle.RouteGet(addr.AsSlice()); err == nil && len(routes) > 0 {
		if source, ok := netip.AddrFromSlice(routes[0].Src); ok {
			return source.Unmap()
		}
	}
	return addr
}

// explainFlows evaluates the rules in the kernel and the virtual servers.
func explainFlows(t testing.TB, ns int) func(dataplanetest.Connection) ([]dataplanetest.Outcome, error) {
	t.Helper()
	handle, err := netlink.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(handle.Close)
	walker, err := nft.NewWalker(nft.Options{NetNS: ns, Table: TableName})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = walker.Close() })
	host := explainHost{ns, handle}
	return func(c dataplanetest.Connection) ([]dataplanetest.Outcome, error) {
		if !c.Source.IsValid() {
			c.Source = host.source(c.Destination.Addr())
		}
		w, err := walker.Walk(host, nft.Packet{
			Protocol: c.Protocol, Source: netip.AddrPortFrom(c.Source, 50_000), Destination: c.Destination, InInterface: c.InInterface,
		})
		if err != nil {
			return nil, err
		}
		var outcomes []dataplanetest.Outcome
		for _, o := range w.Outcomes {
			outcome := dataplanetest.Outcome{Endpoint: o.Endpoint, Masqueraded: o.Masqueraded, Remembered: w.Affinity}
			switch o.Verdict {
			case nft.Translated:
			case nft.Unchanged:
				outcome.Endpoint = c.Destination
			case nft.Rejected:
				outcome = dataplanetest.Outcome{Refused: true, Verdict: dataplane.Reject}
			case nft.Dropped:
				outcome = dataplanetest.Outcome{Refused: true, Verdict: dataplane.Drop}
			}
			outcomes = append(outcomes, outcome)
		}
		return outcomes, nil
	}
}
