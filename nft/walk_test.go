package nft_test

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
	"fairlead.io/fairlead/nft"
)

// testHost looks up addresses in a network namespace.
type testHost struct{ handle *netlink.Handle }

func (h testHost) IsLocal(addr netip.Addr) (bool, error) {
	routes, err := h.handle.RouteGet(addr.AsSlice())
	if err != nil {
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EINVAL) {
			return false, nil
		}
		return false, fmt.Errorf("look up the route to %s: %w", addr, err)
	}
	return len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL, nil
}

func (h testHost) Destinations(dataplane.Protocol, netip.AddrPort, netip.Addr) (nft.Balance, bool, error) {
	return nft.Balance{}, false, nil
}

// source returns the address that the node uses towards addr.
func (h testHost) source(addr netip.Addr) netip.Addr {
	if routes, err := h.handle.RouteGet(addr.AsSlice()); err == nil && len(routes) > 0 {
		if source, ok := netip.AddrFromSlice(routes[0].Src); ok {
			return source.Unmap()
		}
	}
	return addr
}

// explain walks through the rules in the kernel.
func explain(t testing.TB, ns int) func(dataplanetest.Connection) ([]dataplanetest.Outcome, error) {
	t.Helper()
	handle, err := netlink.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(handle.Close)
	walker, err := nft.NewWalker(nft.Options{NetNS: ns})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = walker.Close() })
	host := testHost{handle}
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
			switch o.Verdict {
			case nft.Translated:
				outcomes = append(outcomes, dataplanetest.Outcome{Endpoint: o.Endpoint, Masqueraded: o.Masqueraded, Remembered: w.Affinity})
			case nft.Unchanged:
				outcomes = append(outcomes, dataplanetest.Outcome{Endpoint: c.Destination, Masqueraded: o.Masqueraded})
			case nft.Rejected:
				outcomes = append(outcomes, dataplanetest.Outcome{Refused: true, Verdict: dataplane.Reject})
			case nft.Dropped:
				outcomes = append(outcomes, dataplanetest.Outcome{Refused: true, Verdict: dataplane.Drop})
			}
		}
		return outcomes, nil
	}
}
