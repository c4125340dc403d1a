package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"time"

	"fairlead.io/fairlead/internal/nlconn"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// watch receives the kernel's notifications of ruleset changes. It signals drift for
// changes of our tables that were made through another socket.
type watch struct {
	table   string // the name of our tables
	ownPort uint32
	netns   *os.File
	drift   chan struct{}
	lost    chan struct{}
	stop    chan struct{} // closed by close
	done    chan struct{} // closed when run has returned
	log     *slog.Logger

	mu         sync.Mutex
	conn       *netlink.Conn
	subscribed bool // to the kernel's multicast group

	// changes counts the notifications of our tables, and the events that may have lost
	// notifications. generation is the generation of the last notification. When it
	// changes, generationChanged is closed and replaced.
	changes           uint64
	generation        uint32
	generationChanged chan struct{}
}

// The delays before the watch opens its socket again after an unexpected error.
const (
	minReopenDelay = 10 * time.Millisecond
	maxReopenDelay = 10 * time.Second
)

// startWatch starts a goroutine that exits on close.
func startWatch(table string, netns int, ownPort uint32, log *slog.Logger) (*watch, error) {
	ns, err := openNetNS(netns)
	if err != nil {
		return nil, err
	}
	w := &watch{
		table: table, ownPort: ownPort, netns: ns, log: log,
		drift: make(chan struct{}, 1), lost: make(chan struct{}, 1),
		stop: make(chan struct{}), done: make(chan struct{}), generationChanged: make(chan struct{}),
	}
	if w.conn, err = w.dial(); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	if err := w.subscribe(); err != nil {
		return nil, errors.Join(err, w.conn.Close(), ns.Close())
	}
	go w.run(w.conn)
	return w, nil
}

// openNetNS opens the network namespace of a descriptor, or of the calling thread for 0.
// The watch keeps it open in case it needs another socket.
func openNetNS(netns int) (*os.File, error) {
	path := fmt.Sprintf("/proc/thread-self/fd/%d", netns)
	if netns == 0 {
		path = "/proc/thread-self/ns/net"
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
	}
	ns, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the network namespace to watch for changes: %w", err)
	}
	return ns, nil
}

// isCurrentNetNS reports whether the calling thread is in the network namespace.
func isCurrentNetNS(ns *os.File) bool {
	want, err := ns.Stat()
	if err != nil {
		return false
	}
	current, err := os.Stat("/proc/thread-self/ns/net")
	return err == nil && os.SameFile(want, current)
}

// dial opens a socket that does not receive notifications of our own changes. The socket is
// not subscribed yet.
func (w *watch) dial() (*netlink.Conn, error) {
	// Entering a namespace requires CAP_SYS_ADMIN, even the thread's current namespace.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var config netlink.Config
	if !isCurrentNetNS(w.netns) {
		config.NetNS = int(w.netns.Fd()) //nolint:gosec // a descriptor
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &config)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket to watch for changes: %w", err)
	}
	if err := w.configureSocket(conn); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

func (w *watch) configureSocket(conn *netlink.Conn) error {
	// A notification contains the netlink port of the socket that made the change. All
	// messages of a buffer belong to one commit, so a filter on the first message's header
	// discards the notifications of our own changes in the kernel.
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 12, Size: 4}, // nlmsghdr.nlmsg_pid
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: networkOrder(w.ownPort), SkipTrue: 1},
		bpf.RetConstant{Val: 0xffffffff},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return fmt.Errorf("assemble the filter for changes: %w", err)
	}
	if err := conn.SetBPF(filter); err != nil {
		return fmt.Errorf("filter out our own changes: %w", err)
	}
	if err := conn.SetReadBuffer(receiveBuffer); err != nil {
		return fmt.Errorf("set the receive buffer for changes to %d bytes: %w", receiveBuffer, err)
	}
	return nil
}

// subscribe subscribes to notifications, unless the watch is subscribed already.
func (w *watch) subscribe() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.subscribed {
		return nil
	}
	if err := w.conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("subscribe to nftables changes: %w", err)
	}
	w.subscribed = true
	return nil
}

// unsubscribe ends the subscription. Notifications that the kernel has already sent still
// arrive.
func (w *watch) unsubscribe() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.conn.LeaveGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("unsubscribe from nftables changes: %w", err)
	}
	w.subscribed = false
	return nil
}

// networkOrder returns the value of a classic BPF load, which is big-endian, for a number
// that is in memory in host byte order.
func networkOrder(v uint32) uint32 {
	return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, v))
}

// run receives notifications until close. After an unexpected error, it opens another
// socket and signals drift, because notifications may have been lost.
func (w *watch) run(conn *netlink.Conn) {
	defer close(w.done)
	delay := minReopenDelay
	for {
		opened := time.Now()
		err := w.receive(conn)
		if w.stopped() {
			return
		}
		w.log.Warn("reading nftables notifications failed, opening another socket", "error", err)
		if time.Since(opened) > maxReopenDelay {
			delay = minReopenDelay
		}
		for {
			select {
			case <-w.stop:
				return
			case <-time.After(delay):
			}
			delay = min(2*delay, maxReopenDelay)
			if conn, err = w.reopen(); err == nil {
				break
			}
			w.log.Warn("cannot subscribe to nftables notifications", "retry_in", delay, "error", err)
		}
		w.countChange()
		w.signalLoss()
	}
}

// reopen replaces the socket. The new socket is subscribed if the old one was.
func (w *watch) reopen() (*netlink.Conn, error) {
	conn, err := w.dial()
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.subscribed {
		if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
			return nil, errors.Join(fmt.Errorf("subscribe to nftables changes: %w", err), conn.Close())
		}
	}
	if w.stopped() { // close has closed only the old socket
		return conn, conn.Close()
	}
	_ = w.conn.Close() // the socket has failed already
	w.conn = conn
	return conn, nil
}

// receive handles notifications until an unexpected error.
func (w *watch) receive(conn *netlink.Conn) error {
	for {
		messages, err := conn.Receive()
		switch {
		case err == nil:
			w.handle(messages)
		case errors.Is(err, unix.ENOBUFS):
			// Notifications were lost, possibly of our tables.
			w.countChange()
			w.signalLoss()
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		default:
			return err
		}
	}
}

func (w *watch) handle(messages []netlink.Message) {
	ours, lost := false, false
	for _, m := range messages {
		if w.isOurTable(m) {
			ours = true
			lost = lost || mayRemoveRules(m)
		}
	}
	switch {
	case lost:
		w.countChange()
		w.signalLoss()
	case ours:
		w.countChange()
		w.signalDrift()
	}
	// After counting the changes: tablesUnchanged relies on this order.
	for _, m := range messages {
		if m.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN {
			w.recordGeneration(m)
		}
	}
}

// recordGeneration records the generation in a notification. It is the last notification of
// its commit (nf_tables_api.c, nf_tables_commit).
func (w *watch) recordGeneration(m netlink.Message) {
	if len(m.Data) < 4 {
		return
	}
	if v, ok := nlconn.Attribute(m.Data[4:], unix.NFTA_GEN_ID); ok && len(v) == 4 {
		w.mu.Lock()
		w.generation = binary.BigEndian.Uint32(v)
		close(w.generationChanged)
		w.generationChanged = make(chan struct{})
		w.mu.Unlock()
	}
}

// countChange counts a notification of our tables, or an event that may have lost one.
func (w *watch) countChange() {
	w.mu.Lock()
	w.changes++
	w.mu.Unlock()
}

// changeCount returns the number of changes so far; see watch.changes.
func (w *watch) changeCount() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changes
}

// notificationTimeout is how long waitForGeneration waits for a notification.
const notificationTimeout = 100 * time.Millisecond

// waitForGeneration waits for the notification of the commit that started a generation. It
// returns false after notificationTimeout. Another process must have made the commit.
func (w *watch) waitForGeneration(generation uint32) bool {
	deadline := time.NewTimer(notificationTimeout)
	defer deadline.Stop()
	for {
		w.mu.Lock()
		last, announced, member := w.generation, w.generationChanged, w.subscribed
		w.mu.Unlock()
		if !member {
			return false
		}
		if int32(last-generation) >= 0 { //nolint:gosec // the number wraps around
			return true
		}
		select {
		case <-announced:
		case <-deadline.C:
			return false
		}
	}
}

func (w *watch) signalDrift() {
	select {
	case w.drift <- struct{}{}:
	default:
	}
}

// signalLoss signals drift that may have removed something that packets need.
func (w *watch) signalLoss() {
	select {
	case w.lost <- struct{}{}:
	default:
	}
	w.signalDrift()
}

func (w *watch) stopped() bool {
	select {
	case <-w.stop:
		return true
	default:
		return false
	}
}

func (w *watch) close() error {
	close(w.stop)
	w.mu.Lock()
	err := w.conn.Close()
	w.mu.Unlock()
	<-w.done
	return errors.Join(err, w.netns.Close())
}

// isOurTable reports whether a message notifies of a change in one of our tables.
func (w *watch) isOurTable(m netlink.Message) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 {
		return false
	}
	switch family := m.Data[0]; family {
	case unix.NFPROTO_IPV4, unix.NFPROTO_IPV6:
	default:
		return false
	}
	// Attribute 1 of tables, chains, rules, sets, elements and objects is the table's
	// name (linux/netfilter/nf_tables.h).
	name, ok := nlconn.Attribute(m.Data[4:], unix.NFTA_TABLE_NAME)
	return ok && bytes.Equal(name, []byte(w.table+"\x00")) && !isAffinityElement(m)
}

// isAffinityElement reports whether a message notifies of elements of an affinity map, for
// example of clients that an operator has deleted.
func isAffinityElement(m netlink.Message) bool {
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		set, _ := nlconn.Attribute(m.Data[4:], unix.NFTA_SET_ELEM_LIST_SET)
		_, ok := parseAffinityShard(string(bytes.TrimSuffix(set, []byte{0})))
		return ok
	default:
		return false
	}
}

// mayRemoveRules reports whether a message notifies of a deletion, or of a changed table,
// which may now be dormant.
func mayRemoveRules(m netlink.Message) bool {
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE,
		unix.NFT_MSG_DELSET, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_DELOBJ:
		return true
	default:
		return false
	}
}
