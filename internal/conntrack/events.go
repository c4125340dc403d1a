package conntrack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nlconn"
)

// EventsOptions configure [OpenEvents].
type EventsOptions struct {
	// NetNS is a file descriptor of the network namespace. 0 means the namespace of the calling
	// thread. OpenEvents does not keep the descriptor.
	NetNS int
	// TranslatedOnly makes the kernel drop events of connections whose destination nftables does
	// not translate, before they take room in the receive buffer. Virtual servers of IPVS
	// translate without nftables.
	TranslatedOnly bool

	receiveBuffer int // overrides the constant in tests
}

// Events receives an event for each new entry of the connection-tracking table.
//
// With the default of the sysctl net.netfilter.nf_conntrack_events, 2, the kernel makes events only
// while a program listens. So an Events costs connections nothing before OpenEvents and after Close.
// Before Linux 6.0, the default was 1: the kernel always makes them.
type Events struct {
	conn *netlink.Conn
}

// eventsReceiveBuffer holds about 30,000 events (net/netlink/af_netlink.c counts the memory of a
// whole socket buffer for each).
const eventsReceiveBuffer = 32 << 20

// ErrEventsOff is returned by [OpenEvents] if the kernel makes no events.
var ErrEventsOff = errors.New("the kernel makes no events for new connections: run sysctl -w net.netfilter.nf_conntrack_events=2 (events only while a program listens) or 1 (always)")

// OpenEvents starts to receive events.
func OpenEvents(o EventsOptions) (*Events, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: o.NetNS})
	if err != nil {
		return nil, fmt.Errorf("open netlink socket for connection-tracking events: %w", explain(err))
	}
	size := eventsReceiveBuffer
	if o.receiveBuffer != 0 {
		size = o.receiveBuffer
	}
	// Without ENOBUFS, the kernel counts the events that find the buffer full; see Lost.
	err = errors.Join(conn.SetReadBuffer(size), conn.SetOption(netlink.NoENOBUFS, true))
	if err == nil && o.TranslatedOnly {
		err = conn.SetBPF(translatedFilter())
	}
	if err == nil {
		err = conn.JoinGroup(unix.NFNLGRP_CONNTRACK_NEW)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for connection-tracking events: %w", explain(err)), conn.Close())
	}
	return &Events{conn: conn}, nil
}

// CheckEvents returns [ErrEventsOff] if the kernel makes no events in the network namespace of the
// calling thread.
func CheckEvents() error {
	value, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_events")
	if err == nil && strings.TrimSpace(string(value)) == "0" {
		return ErrEventsOff
	}
	return nil // an absent sysctl is reported when the socket is opened
}

// Close stops the events, and ends Receive.
func (e *Events) Close() error {
	if err := e.conn.Close(); err != nil {
		return fmt.Errorf("close the socket of connection-tracking events: %w", err)
	}
	return nil
}

// Receive calls visit with each new translated connection until ctx is done. It must not be called
// concurrently.
func (e *Events) Receive(ctx context.Context, visit func(Connection)) error {
	stop := context.AfterFunc(ctx, func() { _ = e.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := e.conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("access the socket of connection-tracking events: %w", err)
	}
	buffer := make([]byte, nlconn.MessageSize)
	var received int
	var failure error
	read := func(fd uintptr) bool {
		for {
			received, failure = unix.Read(int(fd), buffer)
			switch {
			case errors.Is(failure, unix.EINTR):
			case errors.Is(failure, unix.EAGAIN):
				return false
			case failure != nil:
				return true
			default:
				visitConnections(buffer[:received], visit)
				if ctx.Err() != nil {
					return true
				}
			}
		}
	}
	for ctx.Err() == nil {
		if err := errors.Join(raw.Read(read), failure); err != nil && ctx.Err() == nil {
			return fmt.Errorf("receive connection-tracking events: %w", err)
		}
	}
	return ctx.Err()
}

// skMemInfoDrops is the index of SK_MEMINFO_DROPS in the answer of SO_MEMINFO
// (include/uapi/linux/sock_diag.h).
const skMemInfoDrops = 8

// Lost returns how many events the kernel has dropped because the receive buffer was full.
func (e *Events) Lost() (uint64, error) {
	raw, err := e.conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("access the socket of connection-tracking events: %w", err)
	}
	var info [skMemInfoDrops + 1]uint32
	size := uint32(unsafe.Sizeof(info))
	var errno unix.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	}); err != nil {
		return 0, fmt.Errorf("access the socket of connection-tracking events: %w", err)
	}
	if errno != 0 {
		return 0, fmt.Errorf("read the number of lost connection-tracking events: getsockopt SO_MEMINFO: %w", errno)
	}
	return uint64(info[skMemInfoDrops]), nil
}

// statusTranslated is IPS_DST_NAT.
const statusTranslated = 1 << 5

// translatedFilter returns a socket filter that passes entries with IPS_DST_NAT. The attributes begin
// after a struct nlmsghdr and a struct nfgenmsg.
func translatedFilter() []bpf.RawInstruction {
	const attributes = unix.NLMSG_HDRLEN + 4
	program, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegA, Val: attributes},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaStatus},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr}, // the offset of the attribute CTA_STATUS, or 0
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 3},
		bpf.TAX{},
		bpf.LoadIndirect{Off: unix.NLA_HDRLEN, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: statusTranslated, SkipFalse: 1},
		bpf.RetConstant{Val: 1<<32 - 1},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		panic(err) // the program is constant
	}
	return program
}

// visitConnections calls visit with the translated connections in a datagram of the kernel.
func visitConnections(datagram []byte, visit func(Connection)) {
	visitFlows(datagram, func(f flow) {
		if f.endpoint != f.destination {
			visit(Connection{f.protocol, f.destination, f.endpoint})
		}
	})
}
