package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"fairlead.io/fairlead/internal/nlconn"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// changeRoutes adds or deletes local routes through the interface, many in one system call. It
// returns the kernel's answer to each.
func (h *host) changeRoutes(typ uint16, table uint32, to []netip.Prefix) ([]error, error) {
	requests := make([]netlink.Message, len(to))
	for i, p := range to {
		b := append(make([]byte, 0, 64), routeHeader(addressFamily(p.Addr()), p.Bits(), unix.RTN_LOCAL)...)
		b = nlconn.AppendBytes(b, unix.RTA_DST, p.Addr().AsSlice())
		b = nlconn.AppendUint32(b, unix.RTA_OIF, uint32(h.link)) //nolint:gosec // an interface's index
		b = nlconn.AppendUint32(b, unix.RTA_TABLE, table)
		requests[i] = netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(typ)}, Data: b}
		if typ == unix.RTM_NEWROUTE {
			requests[i].Header.Flags = netlink.Create | netlink.Excl
		}
	}
	return h.routes.Batch(context.Background(), requests)
}

// routeHeaderLen is the size of struct rtmsg.
const routeHeaderLen = unix.SizeofRtMsg

// routeHeader returns a struct rtmsg (linux/rtnetlink.h).
func routeHeader(family uint16, bits int, typ byte) []byte {
	const compat = 252 // RT_TABLE_COMPAT: the table is in an attribute
	return []byte{byte(family), byte(bits), 0, 0, compat, routeProtocol, unix.RT_SCOPE_HOST, typ, 0, 0, 0, 0}
}

// changeBindings binds addresses to the node (RTM_NEWROUTE) or unbinds them (RTM_DELROUTE). It
// returns the kernel's answer to each. It is not an error to bind a bound address or to unbind
// an unbound one.
func (h *host) changeBindings(typ uint16, addrs []netip.Addr) ([]error, error) {
	to := make([]netip.Prefix, len(addrs))
	for i, a := range addrs {
		to[i] = netip.PrefixFrom(a, a.BitLen())
	}
	answers, err := h.changeRoutes(typ, RouteTable, to)
	for i, answer := range answers {
		if errors.Is(answer, unix.EEXIST) || errors.Is(answer, unix.ESRCH) {
			answers[i] = nil
		}
	}
	return answers, err
}

// boundAddrs returns the addresses that are bound to the node.
func (h *host) boundAddrs() (map[netip.Addr]bool, error) {
	addrs := map[netip.Addr]bool{}
	_, err := h.readBindings(func(addr netip.Addr) { addrs[addr] = true })
	return addrs, err
}

// readBindings calls visit for each address that is bound to the node. interrupted reports that
// routes changed meanwhile; then it may have missed some.
func (h *host) readBindings(visit func(netip.Addr)) (interrupted bool, err error) {
	for _, f := range families() {
		family := addressFamily(internalNet(f).Addr())
		// With strict checks the kernel dumps this table only, and accepts no scope or
		// protocol in the request.
		request := netlink.Message{
			Header: netlink.Header{Type: unix.RTM_GETROUTE},
			Data:   nlconn.AppendUint32([]byte{byte(family), routeHeaderLen - 1: 0}, unix.RTA_TABLE, RouteTable),
		}
		changed, err := h.routes.Dump(context.Background(), request, func(data []byte) error {
			if addr, ok := h.parseRoute(data); ok {
				visit(addr)
			}
			return nil
		})
		interrupted = interrupted || changed
		// ENOENT: the table does not exist until it has a route.
		if err != nil && !errors.Is(err, unix.ENOENT) && !isFamilyUnsupported(f, err) {
			return interrupted, fmt.Errorf("dump %s routes of table %d: %w", f, RouteTable, err)
		}
	}
	return interrupted, nil
}

// parseRoute returns the address that a route binds, and reports whether it is the backend's
// route.
func (h *host) parseRoute(b []byte) (netip.Addr, bool) {
	if len(b) < routeHeaderLen || b[7] != unix.RTN_LOCAL {
		return netip.Addr{}, false
	}
	var addr netip.Addr
	var link, table uint32
	for typ, data := range nlconn.Attributes(b[routeHeaderLen:]) {
		switch typ {
		case unix.RTA_DST:
			addr, _ = netip.AddrFromSlice(data)
		case unix.RTA_OIF:
			link = nlconn.Uint32(data)
		case unix.RTA_TABLE:
			table = nlconn.Uint32(data)
		}
	}
	return addr, table == RouteTable && addr.IsValid() && int(b[1]) == addr.BitLen() && int(link) == h.link
}
