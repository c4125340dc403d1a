package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Definitions of include/uapi/linux/netfilter/nfnetlink_conntrack.h that x/sys/unix lacks.
const (
	conntrackNew    = unix.NFNL_SUBSYS_CTNETLINK << 8   // IPCTNL_MSG_CT_NEW
	conntrackDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaTimeout    = 7
	ctaMark       = 8
	ctaMarkMask   = 21

	ctaTupleIP      = 1
	ctaTupleProto   = 2
	ctaIPv4Src      = 1
	ctaIPv4Dst      = 2
	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	// The kernel does not evict entries with IPS_SEEN_REPLY, IPS_ASSURED and IPS_CONFIRMED
	// from a full table.
	statusAssured = 1<<1 | 1<<2 | 1<<3
)

// fillerMark is the mark of entries that a [conntrackFiller] adds.
const fillerMark = 0xc4a05

// conntrackFiller fills the connection-tracking table of the node with entries of unused
// addresses. The limit applies to the machine, but each network namespace counts its own
// entries, so other namespaces lose nothing.
type conntrackFiller struct {
	fd        int
	nextEntry uint32 // number of the next entry
}

// newConntrackFiller returns a filler for the network namespace of the calling thread.
func newConntrackFiller() (*conntrackFiller, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	f := &conntrackFiller{fd: fd}
	// Acknowledgements need not repeat the request.
	if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1); err != nil {
		return nil, errors.Join(fmt.Errorf("set NETLINK_CAP_ACK: %w", err), f.close())
	}
	return f, nil
}

func (f *conntrackFiller) close() error { return unix.Close(f.fd) }

// addEntries adds up to n entries and reports whether the table is full. The kernel handles
// messages during the system call that sends them, and acknowledges only failures.
func (f *conntrackFiller) addEntries(n int) (full bool, err error) {
	const batch = 128
	for ; n > 0 && !full; n -= batch {
		var messages []byte
		for range min(n, batch) {
			messages = append(messages, newMessage(conntrackNew, unix.NLM_F_CREATE|unix.NLM_F_EXCL, fillerEntry(f.nextEntry))...)
			f.nextEntry++
		}
		if err := f.send(messages); err != nil {
			return false, err
		}
		for {
			err := f.readAck(unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			// With a full table every message fails, which may overflow the socket's buffer.
			full = full || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOBUFS)
			if err != nil && !full {
				return false, err
			}
		}
	}
	return full, nil
}

func (f *conntrackFiller) send(messages []byte) error {
	if err := unix.Sendto(f.fd, messages, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to connection tracking: %w", err)
	}
	return nil
}

// readAck returns the error in the next acknowledgement, or nil.
func (f *conntrackFiller) readAck(flags int) error {
	var b [4096]byte
	n, _, err := unix.Recvfrom(f.fd, b[:], flags)
	if err != nil {
		return fmt.Errorf("receive from connection tracking: %w", err)
	}
	if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return errors.New("connection tracking sent an unexpected message")
	}
	if errno := -int32(binary.NativeEndian.Uint32(b[unix.NLMSG_HDRLEN:])); errno != 0 { //nolint:gosec // a negative number
		return fmt.Errorf("connection tracking: %w", unix.Errno(errno)) //nolint:gosec // a small number
	}
	return nil
}

// deleteEntries deletes all entries that addEntries has added.
func (f *conntrackFiller) deleteEntries() error {
	mark := binary.BigEndian.AppendUint32(nil, fillerMark)
	request := newMessage(conntrackDelete, unix.NLM_F_ACK,
		slices.Concat(conntrackHeader(unix.AF_UNSPEC), attribute(ctaMark, mark), attribute(ctaMarkMask, []byte{0xff, 0xff, 0xff, 0xff})))
	if err := f.send(request); err != nil {
		return err
	}
	return f.readAck(0)
}

// newMessage returns a netlink request.
func newMessage(kind, flags uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(data))) //nolint:gosec // small
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	return slices.Concat(b, make([]byte, 8), data)
}

// conntrackHeader returns a struct nfgenmsg. The kernel ignores the family if the version is
// 0 (ctnetlink_del_conntrack).
func conntrackHeader(family byte) []byte { return []byte{family, unix.NFNETLINK_V0, 0, 0} }

// fillerEntry returns the nth entry: UDP between addresses of the benchmark network (RFC
// 2544).
func fillerEntry(n uint32) []byte {
	const (
		perAddress = 50_000 // ports
		seconds    = 600
	)
	client := binary.BigEndian.AppendUint32(nil, 198<<24|18<<16|n/perAddress)
	server := []byte{198, 19, 0, 1}
	clientPort := binary.BigEndian.AppendUint16(nil, uint16(10_000+n%perAddress)) //nolint:gosec // fits
	serverPort := []byte{0, 9}
	tuple := func(kind uint16, source, destination, sourcePort, destinationPort []byte) []byte {
		return nested(kind, nested(ctaTupleIP, attribute(ctaIPv4Src, source), attribute(ctaIPv4Dst, destination)),
			nested(ctaTupleProto, attribute(ctaProtoNum, []byte{unix.IPPROTO_UDP}),
				attribute(ctaProtoSrcPort, sourcePort), attribute(ctaProtoDstPort, destinationPort)))
	}
	return slices.Concat(conntrackHeader(unix.AF_INET),
		tuple(ctaTupleOrig, client, server, clientPort, serverPort),
		tuple(ctaTupleReply, server, client, serverPort, clientPort),
		attribute(ctaStatus, binary.BigEndian.AppendUint32(nil, statusAssured)),
		attribute(ctaTimeout, binary.BigEndian.AppendUint32(nil, seconds)),
		attribute(ctaMark, binary.BigEndian.AppendUint32(nil, fillerMark)))
}

func nested(kind uint16, attributes ...[]byte) []byte {
	return attribute(unix.NLA_F_NESTED|kind, slices.Concat(attributes...))
}

// attribute returns a netlink attribute (man 7 netlink, "nlattr").
func attribute(kind uint16, value []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.NLA_HDRLEN+len(value))) //nolint:gosec // small
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	for len(b)%unix.NLA_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

// readConntrackSysctl reads a file of the node under /proc/sys/net/netfilter.
func (t *testbed) readConntrackSysctl(name string) (value int, err error) {
	err = t.net.Node.Do(func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/" + name)
		if err != nil {
			return fmt.Errorf("read a sysctl: %w", err)
		}
		value, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return err
	})
	return value, err
}

// maxConntrackEntries is the size of the largest table that the fault fills; it uses 300 MB
// of memory.
const maxConntrackEntries = 1 << 20

// requireConntrackLimit returns why the fault is unavailable, or "".
func (t *testbed) requireConntrackLimit() string {
	limit, err := t.readConntrackSysctl("nf_conntrack_max")
	switch {
	case err != nil:
		return err.Error()
	case limit == 0 || limit > maxConntrackEntries:
		return fmt.Sprintf("net.netfilter.nf_conntrack_max is %d, more than the maximum of %d", limit, maxConntrackEntries)
	}
	return ""
}

// fillConntrack keeps the connection-tracking table of the node nearly full, and for two
// seconds at a time full. Every other time Fairlead restarts while it is full. With a full
// table the node drops new connections; open ones continue.
func (t *testbed) fillConntrack(ctx context.Context) (err error) {
	var filler *conntrackFiller
	err = t.net.Node.Do(func() error {
		filler, err = newConntrackFiller()
		return err
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, filler.deleteEntries(), filler.close()) }()
	limit, err := t.readConntrackSysctl("nf_conntrack_max")
	if err != nil {
		return err
	}
	for round := 0; round == 0 || ctx.Err() == nil; round++ {
		if _, err := filler.addEntries(limit * 3 / 4); err != nil {
			return err
		}
		err := t.recorder.disturb(func() (err error) {
			defer func() { err = errors.Join(err, filler.deleteEntries()) }()
			full, err := filler.addEntries(limit)
			if err == nil && !full {
				err = fmt.Errorf("connection tracking accepts more than nf_conntrack_max, %d entries", limit)
			}
			if err == nil && round%2 == 1 {
				err = t.killAgent(ctx)
			}
			if err == nil {
				err = filler.keepFull(2 * time.Second)
			}
			return err
		})
		if err != nil {
			return err
		}
		sleep(ctx, 3*time.Second)
	}
	return nil
}

// keepFull replaces entries that leave the table.
func (f *conntrackFiller) keepFull(d time.Duration) error {
	const some = 256
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := f.addEntries(some); err != nil {
			return err
		}
	}
	return nil
}
