// Package nodeip follows the addresses of this node's interfaces.
//
// The kernel announces each change over rtnetlink. An announcement is taken as
// a hint only: the addresses are read anew after it, so that an announcement
// that was lost, or that came between subscribing and reading, does no harm.
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
	"golang.org/x/sys/unix"
)

// retryDelay is the time between attempts to open sockets that have failed.
const retryDelay = time.Second

// Options adjust [Watch]. The zero value watches the process's namespace.
type Options struct {
	// NetNS is the file descriptor of the network namespace to watch; zero is
	// the one that the process started in.
	NetNS int
	// Logger gets a Warn when the kernel can't be asked. Nil means no logging.
	Logger *slog.Logger
}

// Watch calls deliver with all addresses of this node's interfaces: once before
// anything else, and again whenever one has appeared or gone. It blocks until
// ctx is done and then returns nil. It returns an error only if it can't begin;
// later failures are logged, and what they hid is made up for.
//
// The addresses are sorted, unique, without zones, and never nil. IPv6 addresses
// count from when the kernel has found that no other host has them (RFC 4862,
// or at once with optimistic detection, RFC 4429) until they are removed;
// deprecated ones are included, as they still take connections.
//
// Deliver must not block for long: changes are gathered meanwhile.
func Watch(ctx context.Context, options Options, deliver func([]netip.Addr)) error {
	log := options.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	var last []netip.Addr
	for first := true; ; first = false {
		w, err := open(options.NetNS)
		switch {
		case err == nil:
			err = w.run(ctx, func(addrs []netip.Addr) {
				if last == nil || !slices.Equal(last, addrs) {
					last = addrs
					deliver(slices.Clone(addrs))
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
		log.WarnContext(ctx, "the node's addresses can't be followed; trying again", "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryDelay):
		}
	}
}

// watcher has a socket that hears announcements and one that reads addresses.
type watcher struct{ announcements, requests *netlink.Conn }

func open(netns int) (watcher, error) {
	var w watcher
	var err error
	config := &netlink.Config{NetNS: netns, Groups: 1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1)}
	if w.announcements, err = netlink.Dial(unix.NETLINK_ROUTE, config); err != nil {
		return w, fmt.Errorf("subscribe to the node's addresses: %w", err)
	}
	if w.requests, err = netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: netns}); err != nil {
		w.close()
		return w, fmt.Errorf("open netlink to read the node's addresses: %w", err)
	}
	return w, nil
}

// close closes both sockets, of which either may be missing. Closing twice does
// no harm, and there is nothing that an error could tell.
func (w watcher) close() {
	for _, conn := range []*netlink.Conn{w.announcements, w.requests} {
		if conn != nil {
			_ = conn.Close()
		}
	}
}

// run delivers the addresses, at first and after each announcement, until ctx
// is done or something fails. It never returns nil unless ctx is done.
func (w watcher) run(ctx context.Context, deliver func([]netip.Addr)) error {
	stop := context.AfterFunc(ctx, w.close) // ends Receive
	defer stop()
	for {
		addrs, err := w.list()
		if err != nil {
			return err
		}
		deliver(addrs)
		if _, err := w.announcements.Receive(); err != nil && !transient(err) {
			return fmt.Errorf("wait for changes of the node's addresses: %w", err)
		}
	}
}

// transient reports whether the socket is as good as before: after ENOBUFS
// announcements were lost, which is one more reason to read.
func transient(err error) bool {
	return errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN)
}

// list reads all addresses. A reading during which they changed is repeated.
func (w watcher) list() ([]netip.Addr, error) {
	// struct ifaddrmsg with AF_UNSPEC, see linux/if_addr.h.
	request := netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETADDR, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, unix.SizeofIfAddrmsg),
	}
	for {
		messages, err := w.requests.Execute(request)
		switch {
		case err != nil:
			return nil, fmt.Errorf("read the node's addresses: %w", err)
		case slices.ContainsFunc(messages, func(m netlink.Message) bool { return m.Header.Flags&netlink.DumpInterrupted != 0 }):
			continue
		}
		addrs := []netip.Addr{}
		for _, m := range messages {
			addr, ok, err := parse(m)
			if err != nil {
				return nil, fmt.Errorf("read the node's addresses: %w", err)
			}
			if ok {
				addrs = append(addrs, addr)
			}
		}
		slices.SortFunc(addrs, netip.Addr.Compare)
		return slices.Compact(addrs), nil
	}
}

// parse returns the address in a message, and false if it can't be used (yet).
func parse(m netlink.Message) (netip.Addr, bool, error) {
	if m.Header.Type != unix.RTM_NEWADDR {
		return netip.Addr{}, false, nil
	}
	if len(m.Data) < unix.SizeofIfAddrmsg {
		return netip.Addr{}, false, fmt.Errorf("an address message of %d bytes", len(m.Data))
	}
	attributes, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofIfAddrmsg:])
	if err != nil {
		return netip.Addr{}, false, err
	}
	flags := uint32(m.Data[2])
	// IFA_ADDRESS is the peer's address on a point-to-point link, where
	// IFA_LOCAL is ours; IPv6 without a peer has IFA_ADDRESS only.
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
