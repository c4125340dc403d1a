package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// watch listens to the kernel's announcements of ruleset changes and signals
// those of our tables that were made through another socket than ours.
type watch struct {
	table string // the name of ours
	conn  *netlink.Conn
	drift chan struct{}
	done  chan struct{}
	log   *slog.Logger

	closing atomic.Bool // an error is that of the closed socket, by whatever name
	member  bool        // of the kernel's multicast group; for who calls join and leave
}

// startWatch starts a goroutine that ends with close.
func startWatch(table string, netns int, ownPort uint32, log *slog.Logger) (*watch, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("open netlink socket to watch for changes: %w", err)
	}
	w := &watch{table: table, conn: conn, drift: make(chan struct{}, 1), done: make(chan struct{}), log: log}
	if err := w.subscribe(ownPort); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	go w.run()
	return w, nil
}

func (w *watch) subscribe(ownPort uint32) error {
	// An announcement carries the port of the socket through which the change
	// came. All messages of one buffer are of one commit, so the first one's
	// header tells, and a filter in the kernel spares us the echo of our own.
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 12, Size: 4}, // nlmsghdr.nlmsg_pid
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: networkOrder(ownPort), SkipTrue: 1},
		bpf.RetConstant{Val: 0xffffffff},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return fmt.Errorf("assemble the filter for changes: %w", err)
	}
	if err := w.conn.SetBPF(filter); err != nil {
		return fmt.Errorf("filter out our own changes: %w", err)
	}
	if err := w.conn.SetReadBuffer(receiveBuffer); err != nil {
		return fmt.Errorf("set the receive buffer for changes to %d bytes: %w", receiveBuffer, err)
	}
	return w.join()
}

// join subscribes to announcements, unless the watch is subscribed.
func (w *watch) join() error {
	if w.member {
		return nil
	}
	if err := w.conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("subscribe to nftables changes: %w", err)
	}
	w.member = true
	return nil
}

// leave ends the subscription until join. What was announced before arrives.
func (w *watch) leave() error {
	if err := w.conn.LeaveGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("unsubscribe from nftables changes: %w", err)
	}
	w.member = false
	return nil
}

// networkOrder returns what a classic BPF load, which is big-endian, makes of
// a number that is in memory in the host's order.
func networkOrder(v uint32) uint32 {
	return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, v))
}

func (w *watch) run() {
	defer close(w.done)
	for {
		messages, err := w.conn.Receive()
		switch {
		case err == nil:
			if slices.ContainsFunc(messages, w.concernsUs) {
				w.signal()
			}
		case errors.Is(err, unix.ENOBUFS):
			// Announcements were lost: some may have been about us.
			w.signal()
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		default:
			// Closed, or beyond help. A caller that wants to be sure replaces now
			// and then without being told.
			if !w.closing.Load() {
				w.log.Error("no longer notified of nftables changes", "error", err)
			}
			return
		}
	}
}

func (w *watch) signal() {
	select {
	case w.drift <- struct{}{}:
	default:
	}
}

func (w *watch) close() error {
	w.closing.Store(true)
	err := w.conn.Close()
	<-w.done
	return err
}

// concernsUs reports whether a message announces a change in one of our tables.
func (w *watch) concernsUs(m netlink.Message) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 {
		return false
	}
	switch family := m.Data[0]; family {
	case unix.NFPROTO_IPV4, unix.NFPROTO_IPV6:
	default:
		return false
	}
	if m.Header.Type&0xff == unix.NFT_MSG_NEWGEN {
		return false
	}
	attrs, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return false
	}
	for attrs.Next() {
		// The table's name is attribute 1 of tables, chains, rules, sets,
		// elements and objects alike (linux/netfilter/nf_tables.h).
		if attrs.Type() == unix.NFTA_TABLE_NAME {
			return bytes.Equal(attrs.Bytes(), []byte(w.table+"\x00"))
		}
	}
	return false
}
