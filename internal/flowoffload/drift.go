package flowoffload

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nlconn"
)

// retryDelay is the time before the table is compared after a failure, and between attempts to open
// the socket again.
const retryDelay = 10 * time.Second

// drift reports when another program may have removed a part of the table. The kernel sends a
// notification of each removed object.
type drift struct {
	netns int
	log   *slog.Logger
	// ownPort is the netlink port of the socket that removes devices.
	ownPort uint32

	mu    sync.Mutex
	timer *time.Timer // calls the function of run, nil before run
}

// retry makes run compare the table after a delay.
func (d *drift) retry() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Reset(retryDelay)
	}
}

// run calls compare when the table may have changed, until ctx is done.
func (d *drift) run(ctx context.Context, compare func(context.Context)) {
	d.mu.Lock()
	d.timer = time.AfterFunc(retryDelay, func() {
		if ctx.Err() == nil {
			compare(ctx)
		}
	})
	d.timer.Stop() // until retry
	d.mu.Unlock()
	defer d.timer.Stop()
	for {
		err := d.follow(ctx, compare)
		if ctx.Err() != nil {
			return
		}
		d.log.WarnContext(ctx, "cannot watch for changes of the flowtable, retrying", "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryDelay):
		}
		compare(ctx) // changes may have been missed
	}
}

func (d *drift) follow(ctx context.Context, compare func(context.Context)) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: d.netns})
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	defer conn.Close()               //nolint:errcheck // only read
	_ = conn.SetBPF(removalFilter()) // without it, the kernel sends more than necessary
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("subscribe to changes of nftables: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		messages, err := conn.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS): // notifications were lost
			compare(ctx)
		case err != nil:
			return fmt.Errorf("receive changes of nftables: %w", err)
		case d.concerns(messages):
			compare(ctx)
		}
	}
}

// removals returns the types of notifications of removed objects, except elements of sets, which the
// backend removes all the time.
func removals() []uint16 {
	return []uint16{unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET, unix.NFT_MSG_DELOBJ, unix.NFT_MSG_DELFLOWTABLE}
}

// removalFilter passes notifications of removed objects.
func removalFilter() []bpf.RawInstruction {
	// struct nlmsghdr has the message type at offset 4, in host byte order.
	types := removals()
	instructions := []bpf.Instruction{bpf.LoadAbsolute{Off: 4, Size: 2}}
	for i, t := range types {
		host := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.NFNL_SUBSYS_NFTABLES<<8|t))
		instructions = append(instructions, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(host), SkipTrue: uint8(len(types) - i)}) //nolint:gosec // a small number
	}
	filter, err := bpf.Assemble(append(instructions, bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: 1 << 18}))
	if err != nil {
		panic(err) // the program is constant
	}
	return filter
}

// concerns reports whether messages are about changes of the table by another socket. All objects have
// the table's name in the attribute 1.
func (d *drift) concerns(messages []netlink.Message) bool {
	for _, m := range messages {
		if len(m.Data) < 4 || m.Header.PID == d.ownPort {
			continue
		}
		if name, ok := nlconn.Attribute(m.Data[4:], unix.NFTA_TABLE_NAME); ok && unix.ByteSliceToString(name) == TableName {
			return true
		}
	}
	return false
}
