package bench

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// notificationCount counts the nftables notifications of the kernel. The kernel notifies of each
// element that a commit adds or removes, so the counts show the size of the commit.
type notificationCount struct {
	Messages, Elements, Bytes int
}

// monitor receives the nftables notifications of one network namespace.
type monitor struct{ conn *netlink.Conn }

// newMonitor subscribes to nftables notifications in the network namespace. The caller must close
// the monitor.
func newMonitor(netns int) (*monitor, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("subscribe to nftables notifications: %w", err)
	}
	const buffer = 64 << 20 // bytes; holds the notifications of a large commit
	err = conn.SetReadBuffer(buffer)
	if err == nil {
		err = conn.JoinGroup(unix.NFNLGRP_NFTABLES)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("subscribe to nftables notifications: %w", err), conn.Close())
	}
	return &monitor{conn}, nil
}

func (m *monitor) close() error { return m.conn.Close() }

// read returns the counts of the notifications received since the last call. The kernel sends
// notifications before it acknowledges a commit, so read includes every acknowledged commit.
func (m *monitor) read() (notificationCount, error) {
	raw, err := m.conn.SyscallConn()
	if err != nil {
		return notificationCount{}, err
	}
	var sum notificationCount
	buffer := make([]byte, 64<<10)
	for {
		var n int
		var received error
		err := raw.Read(func(fd uintptr) bool {
			n, _, received = unix.Recvfrom(int(fd), buffer, unix.MSG_DONTWAIT)
			return true
		})
		if errors.Is(received, unix.EAGAIN) {
			return sum, nil
		}
		if err := errors.Join(err, received); err != nil {
			return notificationCount{}, fmt.Errorf("receive nftables notifications: %w", err)
		}
		messages, err := syscall.ParseNetlinkMessage(buffer[:n])
		if err != nil {
			return notificationCount{}, fmt.Errorf("decode nftables notifications: %w", err)
		}
		for _, message := range messages {
			if err := sum.add(message); err != nil {
				return notificationCount{}, err
			}
		}
	}
}

func (c *notificationCount) add(m syscall.NetlinkMessage) error {
	const header = 4 // nfgenmsg
	kind := m.Header.Type & 0xff
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < header || kind == unix.NFT_MSG_NEWGEN {
		return nil
	}
	c.Messages++
	c.Bytes += int(m.Header.Len)
	if kind != unix.NFT_MSG_NEWSETELEM && kind != unix.NFT_MSG_DELSETELEM {
		return nil
	}
	attrs, err := netlink.NewAttributeDecoder(m.Data[header:])
	if err != nil {
		return fmt.Errorf("decode an nftables notification: %w", err)
	}
	for attrs.Next() {
		if attrs.Type() == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			attrs.Nested(func(elements *netlink.AttributeDecoder) error {
				c.Elements += elements.Len()
				for elements.Next() { // the decoder reports an error unless all attributes are read
				}
				return nil
			})
		}
	}
	return attrs.Err()
}
