// Package nodeip watches the addresses of this node: the addresses of its interfaces, and the
// networks that local routes make local to the node.
//
// The kernel sends rtnetlink notifications of changes. The watcher uses a notification only as
// a hint and reads all addresses again. Lost notifications, and notifications sent between
// subscribing and reading, are therefore harmless.
package nodeip

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// retryDelay is the time between attempts to open the sockets again after an error.
const retryDelay = time.Second

// Options configure [Watch]. The zero value watches the process's network namespace.
type Options struct {
	// NetNS is a file descriptor of the network namespace to watch. 0 means the namespace in
	// which the process started.
	NetNS int
	// Logger receives a Warn when the addresses cannot be read. Nil disables logging.
	Logger *slog.Logger
}

// Addresses are the addresses of this node. The lists are sorted, deduplicated, without zones,
// and never nil.
type Addresses struct {
	// All holds the addresses of all interfaces. It includes an IPv6 address as soon as
	// duplicate address detection succeeds (RFC 4862), or immediately for an optimistic
	// address (RFC 4429). It includes deprecated addresses, which still accept connections.
	All []netip.Addr
	// Virtual holds the addresses that only the loopback device or dummy interfaces have.
	// These interfaces do not make an address reachable from a network.
	Virtual []netip.Addr
	// Routes holds the networks that a local route in table local makes local to the node,
	// except for routes that the kernel created.
	Routes []netip.Prefix
}

func (a Addresses) equal(o Addresses) bool {
	return slices.Equal(a.All, o.All) && slices.Equal(a.Virtual, o.Virtual) && slices.Equal(a.Routes, o.Routes)
}

// Watch calls deliver with the addresses of this node, first immediately and then after each
// change. It blocks until ctx is done and then returns nil. It returns an error only if it
// cannot start. It logs later errors and retries, and delivers the changes missed meanwhile.
//
// deliver should return quickly. Changes during a call are delivered together in the next
// call.
func Watch(ctx context.Context, options Options, deliver func(Addresses)) error {
	log := options.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	var last Addresses
	for first := true; ; first = false {
		w, err := openWatcher(options.NetNS)
		switch {
		case err == nil:
			err = w.run(ctx, func(addrs Addresses) {
				if last.All == nil || !last.equal(addrs) {
					last = addrs
					deliver(Addresses{slices.Clone(addrs.All), slices.Clone(addrs.Virtual), slices.Clone(addrs.Routes)})
				}
			})
			w.close()
		case first:
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		default:
		}
		log.WarnContext(ctx, "cannot watch the node's addresses, retrying", "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryDelay):
		}
	}
}

// watcher has one socket for notifications and one for requests.
type watcher struct{ notifications, requests *netlink.Conn }

func openWatcher(netns int) (watcher, error) {
	var w watcher
	var err error
	config := &netlink.Config{NetNS: netns, Groups: groupMask(
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)}
	if w.notifications, err = netlink.Dial(unix.NETLINK_ROUTE, config); err != nil {
		return w, fmt.Errorf("subscribe to the node's addresses: %w", err)
	}
	if w.requests, err = netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: netns}); err != nil {
		w.close()
		return w, fmt.Errorf("open netlink socket to read the node's addresses: %w", err)
	}
	// Both options only reduce work: without them the kernel sends more than necessary.
	_ = w.notifications.SetBPF(localRouteFilter())
	_ = w.requests.SetOption(netlink.GetStrictCheck, true)
	return w, nil
}

// groupMask returns the bit mask of multicast groups.
func groupMask(groups ...uint) (mask uint32) {
	for _, group := range groups {
		mask |= 1 << (group - 1)
	}
	return mask
}

// localRouteFilter returns a filter for notifications. Of route notifications, which may be
// thousands, it passes only the ones about local routes in table local. The mode ipvs binds each
// cluster IP by a local route in another table.
func localRouteFilter() []bpf.RawInstruction {
	// struct nlmsghdr has the message type at offset 4, in host byte order. struct rtmsg
	// follows at offset 16, with the table at offset 4 and the route type at offset 7.
	host := func(t uint16) uint32 {
		return uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, t)))
	}
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: host(unix.RTM_NEWROUTE), SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: host(unix.RTM_DELROUTE), SkipTrue: 4},
		bpf.LoadAbsolute{Off: unix.SizeofNlMsghdr + 4, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.RT_TABLE_LOCAL, SkipTrue: 3},
		bpf.LoadAbsolute{Off: unix.SizeofNlMsghdr + 7, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.RTN_LOCAL, SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 16},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		panic(err) // the program is constant
	}
	return filter
}

// close closes both sockets, either of which may be nil. It may be called twice, and ignores
// errors.
func (w watcher) close() {
	for _, conn := range []*netlink.Conn{w.notifications, w.requests} {
		if conn != nil {
			_ = conn.Close()
		}
	}
}

// run delivers the addresses, first immediately and then after each notification, until ctx is
// done or an error occurs. It returns nil only after ctx is done.
func (w watcher) run(ctx context.Context, deliver func(Addresses)) error {
	stop := context.AfterFunc(ctx, w.close) // unblocks Receive
	defer stop()
	for {
		addrs, err := w.readAddresses()
		if err != nil {
			return err
		}
		deliver(addrs)
		if _, err := w.notifications.Receive(); err != nil && !isTransient(err) {
			return fmt.Errorf("receive notifications of the node's addresses: %w", err)
		}
	}
}

// isTransient reports whether the socket remains usable. ENOBUFS means that notifications were
// lost, so the addresses must be read again.
func isTransient(err error) bool {
	return errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN)
}

// readAddresses reads all addresses and local routes.
func (w watcher) readAddresses() (Addresses, error) {
	virtual, err := w.virtualLinks()
	if err != nil {
		return Addresses{}, fmt.Errorf("read the node's interfaces: %w", err)
	}
	// struct ifaddrmsg with AF_UNSPEC, see linux/if_addr.h.
	messages, err := w.dump(unix.RTM_GETADDR, make([]byte, unix.SizeofIfAddrmsg))
	if err != nil {
		return Addresses{}, fmt.Errorf("read the node's addresses: %w", err)
	}
	addrs := Addresses{All: []netip.Addr{}, Virtual: []netip.Addr{}, Routes: []netip.Prefix{}}
	nonVirtual := map[netip.Addr]struct{}{}
	for _, m := range messages {
		addr, ok, err := parseAddr(m)
		if err != nil {
			return Addresses{}, fmt.Errorf("read the node's addresses: %w", err)
		}
		if !ok {
			continue
		}
		addrs.All = append(addrs.All, addr)
		if _, ok := virtual[binary.NativeEndian.Uint32(m.Data[4:])]; !ok {
			nonVirtual[addr] = struct{}{}
		}
	}
	slices.SortFunc(addrs.All, netip.Addr.Compare)
	addrs.All = slices.Compact(addrs.All)
	for _, addr := range addrs.All {
		if _, ok := nonVirtual[addr]; !ok {
			addrs.Virtual = append(addrs.Virtual, addr)
		}
	}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		// struct rtmsg, see linux/rtnetlink.h.
		messages, err := w.dump(unix.RTM_GETROUTE, []byte{family, 0, 0, 0, unix.RT_TABLE_LOCAL, 0, 0, unix.RTN_LOCAL, 0, 0, 0, 0})
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
			continue // the kernel lacks the family or the table
		}
		if err != nil {
			return Addresses{}, fmt.Errorf("read the node's local routes: %w", err)
		}
		for _, m := range messages {
			if route, ok := parseRoute(m); ok {
				addrs.Routes = append(addrs.Routes, route)
			}
		}
	}
	slices.SortFunc(addrs.Routes, netip.Prefix.Compare)
	addrs.Routes = slices.Compact(addrs.Routes)
	return addrs, nil
}

// dump returns all messages of a dump. It repeats an interrupted dump.
func (w watcher) dump(typ netlink.HeaderType, data []byte) ([]netlink.Message, error) {
	for {
		messages, err := w.requests.Execute(netlink.Message{
			Header: netlink.Header{Type: typ, Flags: netlink.Request | netlink.Dump}, Data: data,
		})
		if err != nil || !slices.ContainsFunc(messages, func(m netlink.Message) bool { return m.Header.Flags&netlink.DumpInterrupted != 0 }) {
			return messages, err
		}
	}
}

// virtualLinks returns the indices of the loopback device and of dummy interfaces.
func (w watcher) virtualLinks() (map[uint32]struct{}, error) {
	// The kernel filters by kind unless it has no dummy interfaces.
	kind := netlink.NewAttributeEncoder()
	kind.Nested(unix.IFLA_LINKINFO, func(info *netlink.AttributeEncoder) error {
		info.String(unix.IFLA_INFO_KIND, dummy)
		return nil
	})
	attributes, err := kind.Encode()
	if err != nil {
		return nil, err
	}
	messages, err := w.dump(unix.RTM_GETLINK, append(make([]byte, unix.SizeofIfInfomsg), attributes...))
	if err != nil {
		return nil, err
	}
	const loopback = 1 // LOOPBACK_IFINDEX, see include/net/flow.h
	links := map[uint32]struct{}{loopback: {}}
	for _, m := range messages {
		if m.Header.Type == unix.RTM_NEWLINK && len(m.Data) >= unix.SizeofIfInfomsg && isDummy(m.Data[unix.SizeofIfInfomsg:]) {
			links[binary.NativeEndian.Uint32(m.Data[4:])] = struct{}{}
		}
	}
	return links, nil
}

// dummy is the kernel's kind of dummy interfaces.
const dummy = "dummy"

// isDummy reports whether the attributes describe a dummy interface.
func isDummy(b []byte) (is bool) {
	attributes, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return false
	}
	for attributes.Next() {
		if attributes.Type() == unix.IFLA_LINKINFO {
			attributes.Nested(func(info *netlink.AttributeDecoder) error {
				for info.Next() {
					if info.Type() == unix.IFLA_INFO_KIND {
						is = info.String() == dummy
					}
				}
				return nil
			})
		}
	}
	return is && attributes.Err() == nil
}

// parseRoute returns the network of a local route. It reports false if the kernel created the
// route for an address of an interface or for the loopback network.
func parseRoute(m netlink.Message) (netip.Prefix, bool) {
	if m.Header.Type != unix.RTM_NEWROUTE || len(m.Data) < unix.SizeofRtMsg {
		return netip.Prefix{}, false
	}
	family, bits, table, protocol, typ := m.Data[0], int(m.Data[1]), m.Data[4], m.Data[5], m.Data[7]
	if typ != unix.RTN_LOCAL || table != unix.RT_TABLE_LOCAL || protocol == unix.RTPROT_KERNEL {
		return netip.Prefix{}, false
	}
	addr := netip.IPv4Unspecified()
	if family == unix.AF_INET6 {
		addr = netip.IPv6Unspecified()
	}
	attributes, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofRtMsg:])
	if err != nil {
		return netip.Prefix{}, false
	}
	for attributes.Next() {
		if attributes.Type() == unix.RTA_DST {
			addr, _ = netip.AddrFromSlice(attributes.Bytes())
		}
	}
	route := netip.PrefixFrom(addr, bits)
	return route.Masked(), attributes.Err() == nil && route.IsValid()
}

// parseAddr returns the address in a message. It reports false if the address is not usable,
// or not yet.
func parseAddr(m netlink.Message) (netip.Addr, bool, error) {
	if m.Header.Type != unix.RTM_NEWADDR {
		return netip.Addr{}, false, nil
	}
	if len(m.Data) < unix.SizeofIfAddrmsg {
		return netip.Addr{}, false, fmt.Errorf("address message of %d bytes", len(m.Data))
	}
	attributes, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofIfAddrmsg:])
	if err != nil {
		return netip.Addr{}, false, err
	}
	flags := uint32(m.Data[2])
	// On a point-to-point link, IFA_LOCAL is the node's address and IFA_ADDRESS the peer's.
	// IPv6 without a peer has IFA_ADDRESS only.
	var local, address netip.Addr
	for attributes.Next() {
		switch attributes.Type() {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(attributes.Bytes())
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(attributes.Bytes())
		case unix.IFA_FLAGS:
			if b := attributes.Bytes(); len(b) == 4 {
				flags = binary.NativeEndian.Uint32(b)
			}
		}
	}
	if err := attributes.Err(); err != nil {
		return netip.Addr{}, false, err
	}
	if !local.IsValid() {
		local = address
	}
	tentative := flags&unix.IFA_F_TENTATIVE != 0 && flags&unix.IFA_F_OPTIMISTIC == 0
	return local, local.IsValid() && !tentative && flags&unix.IFA_F_DADFAILED == 0, nil
}
