package conntrack

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"
)

// flowEvents receives the flows of new UDP and SCTP entries.
type flowEvents interface {
	// receive calls visit with the flow of each entry in the default zone that the kernel has
	// added since the last call. It does not wait for entries. After an error, flows may be
	// missing.
	receive(visit func(flow)) error
	close() error
}

// netlinkFlowEvents receives the events of a network namespace.
type netlinkFlowEvents struct {
	conn    *netlink.Conn
	buffer  []byte
	setting *os.File // the sysctl nf_conntrack_events of the namespace
}

// flowEventsBuffer holds about 15,000 events, see eventsReceiveBuffer.
const flowEventsBuffer = 16 << 20

func (t *netlinkTable) listen() (flowEvents, error) { return openFlowEvents(t.netns, flowEventsBuffer) }

// openFlowEvents starts to receive events for new UDP and SCTP entries.
func openFlowEvents(netns, receiveBuffer int) (flowEvents, error) {
	setting, err := openEventsSetting(netns)
	if err != nil {
		return nil, err
	}
	e := &netlinkFlowEvents{buffer: make([]byte, nlconn.MessageSize), setting: setting}
	if err := e.checkSetting(); err != nil {
		return nil, errors.Join(err, setting.Close())
	}
	if e.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns}); err != nil {
		return nil, errors.Join(fmt.Errorf("open netlink socket for connection-tracking events: %w", explain(err)), setting.Close())
	}
	filter, err := bpf.Assemble(flowFilter())
	if err == nil {
		// Without NETLINK_NO_ENOBUFS, the socket reports a full buffer.
		err = errors.Join(e.conn.SetReadBuffer(receiveBuffer), e.conn.SetBPF(filter))
	}
	if err == nil {
		err = e.conn.JoinGroup(unix.NFNLGRP_CONNTRACK_NEW)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for connection-tracking events: %w", explain(err)), e.close())
	}
	return e, nil
}

// openEventsSetting opens the sysctl nf_conntrack_events of a network namespace. The file stays with
// the namespace. The kernel has the sysctl if it can make events (CONFIG_NF_CONNTRACK_EVENTS).
func openEventsSetting(netns int) (setting *os.File, err error) {
	open := func() {
		if setting, err = os.Open("/proc/sys/net/netfilter/nf_conntrack_events"); err != nil {
			err = fmt.Errorf("read whether the kernel makes connection-tracking events: %w", err)
		}
	}
	if netns == 0 {
		open()
		return setting, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the thread ends with the goroutine
		if err = unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("enter network namespace: %w", err)
			return
		}
		open()
	}()
	<-done
	return setting, err
}

// checkSetting returns [ErrEventsOff] if the kernel makes no events.
func (e *netlinkFlowEvents) checkSetting() error {
	var value [8]byte
	n, err := e.setting.ReadAt(value[:], 0)
	if n == 0 {
		return fmt.Errorf("read %s: %w", e.setting.Name(), err)
	}
	if strings.TrimSpace(string(value[:n])) == "0" {
		return ErrEventsOff
	}
	return nil
}

func (e *netlinkFlowEvents) close() error { return errors.Join(e.conn.Close(), e.setting.Close()) }

func (e *netlinkFlowEvents) receive(visit func(flow)) error {
	if err := e.checkSetting(); err != nil {
		return err
	}
	raw, err := e.conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("access the socket of connection-tracking events: %w", err)
	}
	var failure error
	err = raw.Read(func(fd uintptr) (done bool) {
		for {
			n, err := unix.Read(int(fd), e.buffer) //nolint:gosec // a descriptor
			switch {
			case errors.Is(err, unix.EINTR):
			case errors.Is(err, unix.EAGAIN):
				return true
			case err != nil: // ENOBUFS: the buffer was full
				failure = err
				return true
			default:
				visitFlows(e.buffer[:n], visit)
			}
		}
	})
	if err = errors.Join(err, failure); err != nil {
		return fmt.Errorf("receive connection-tracking events: %w", err)
	}
	return nil
}

// visitFlows calls visit with the flows of the entries in a datagram of the kernel.
func visitFlows(datagram []byte, visit func(flow)) {
	for data := range nlconn.Messages(datagram) {
		if len(data) < nfHeaderLen {
			continue
		}
		family := dataplane.IPv4
		if data[0] == unix.AF_INET6 {
			family = dataplane.IPv6
		}
		if e, ok := parseEntry(data[nfHeaderLen:], family); ok {
			visit(e.flow)
		}
	}
}

// flowFilter returns a socket filter that passes UDP and SCTP entries. It finds CTA_PROTO_NUM in
// CTA_TUPLE_PROTO in CTA_TUPLE_ORIG. The attributes begin after a struct nlmsghdr and a struct nfgenmsg.
func flowFilter() []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegA, Val: unix.NLMSG_HDRLEN + nfHeaderLen},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaTupleOrig},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaTupleProto},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttrNested},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaProtoNum},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttrNested},
		bpf.TAX{},
		bpf.LoadIndirect{Off: unix.NLA_HDRLEN, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_UDP, SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_SCTP, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: 1<<32 - 1},
	}
}
