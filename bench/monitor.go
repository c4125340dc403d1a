package bench

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// notificationCount is what the kernel has announced of changes of nftables: it tells every
// element that comes or goes, so this is what a commit consisted of.
type notificationCount struct {
	Messages, Elements, Bytes int
}

// monitor hears the announcements in a network namespace.
type monitor struct{ conn *netlink.Conn }

// newMonitor starts to listen. The caller closes it.
func newMonitor(netns int) (*monitor, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("listen to changes of nftables: %w", err)
	}
	const buffer = 64 << 20 // all of a large commit
	err = conn.SetReadBuffer(buffer)
	if err == nil {
		err = conn.JoinGroup(unix.NFNLGRP_NFTABLES)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen to changes of nftables: %w", err), conn.Close())
	}
	return &monitor{conn}, nil
}

func (l *monitor) close() error { return l.conn.Close() }

// read returns what was announced since it was last called. The kernel announces
// before it acknowledges, so what is acknowledged is there.
func (l *monitor) read() (notificationCount, error) {
	var sum notificationCount
	for {
		if err := l.conn.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
			return notificationCount{}, err
		}
		messages, err := l.conn.Receive()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return sum, nil
		}
		if err != nil {
			return notificationCount{}, fmt.Errorf("hear what has changed in nftables: %w", err)
		}
		for _, m := range messages {
			if err := sum.add(m); err != nil {
				return notificationCount{}, err
			}
		}
	}
}

func (a *notificationCount) add(m netlink.Message) error {
	const header = 4 // nfgenmsg
	kind := m.Header.Type & 0xff
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < header || kind == unix.NFT_MSG_NEWGEN {
		return nil
	}
	a.Messages++
	a.Bytes += int(m.Header.Length)
	if kind != unix.NFT_MSG_NEWSETELEM && kind != unix.NFT_MSG_DELSETELEM {
		return nil
	}
	attrs, err := netlink.NewAttributeDecoder(m.Data[header:])
	if err != nil {
		return fmt.Errorf("read an announcement of nftables: %w", err)
	}
	for attrs.Next() {
		if attrs.Type() == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			attrs.Nested(func(elements *netlink.AttributeDecoder) error {
				a.Elements += elements.Len()
				for elements.Next() { // as the decoder wants to be read
				}
				return nil
			})
		}
	}
	return attrs.Err()
}
