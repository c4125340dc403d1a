package flowdevices

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// retryDelay is the time between attempts to open the sockets again after an error.
const retryDelay = time.Second

// Options configure [New].
type Options struct {
	// NetNS is a file descriptor of the network namespace, 0 for the namespace in which the process
	// started.
	NetNS  int
	Logger *slog.Logger
}

// Watcher follows the network interfaces. Create one with [New].
type Watcher struct {
	options Options
	log     *slog.Logger

	mu       sync.Mutex
	pods     PodInterfaces
	links    links // nil until they are known
	last     []Device
	known    bool // last was delivered
	deliver  func([]Device)
	delivery sync.Mutex // serializes deliveries, acquired before mu
}

// New returns a Watcher. It calls deliver with the devices that take part, from [Watcher.Run] and from
// [Watcher.SetPodInterfaces], whenever they change. Calls are not concurrent.
func New(o Options, deliver func([]Device)) *Watcher {
	log := o.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Watcher{options: o, log: log, deliver: deliver}
}

// SetPodInterfaces sets how to identify the interfaces of pods.
func (w *Watcher) SetPodInterfaces(pods PodInterfaces) {
	w.update(func() { w.pods = pods })
}

// update changes the state, and delivers the devices if they have changed.
func (w *Watcher) update(change func()) {
	w.delivery.Lock()
	defer w.delivery.Unlock()
	w.mu.Lock()
	change()
	devices := w.links.devices(w.pods)
	changed := w.links != nil && (!w.known || !slices.Equal(devices, w.last))
	if changed {
		w.last, w.known = devices, true
	}
	w.mu.Unlock()
	if changed {
		w.deliver(devices)
	}
}

// Run follows the interfaces until ctx is done. It logs errors and retries.
func (w *Watcher) Run(ctx context.Context) error {
	for {
		err := w.follow(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the end of ctx closes the sockets
		}
		w.log.WarnContext(ctx, "cannot watch the node's interfaces, retrying", "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryDelay):
		}
	}
}

// follow reads all interfaces and applies notifications until an error occurs.
func (w *Watcher) follow(ctx context.Context) (err error) {
	notifications, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: w.options.NetNS, Groups: 1 << (unix.RTNLGRP_LINK - 1)})
	if err != nil {
		return fmt.Errorf("subscribe to the node's interfaces: %w", err)
	}
	defer notifications.Close() //nolint:errcheck // only read
	requests, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: w.options.NetNS})
	if err != nil {
		return fmt.Errorf("open netlink socket to read the node's interfaces: %w", err)
	}
	defer requests.Close() //nolint:errcheck // only read
	stop := context.AfterFunc(ctx, func() { _ = notifications.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for lost := true; ; {
		if lost {
			if err := w.readAll(requests); err != nil {
				return err
			}
		}
		messages, err := notifications.Receive()
		// ENOBUFS means that notifications were lost.
		if lost = errors.Is(err, unix.ENOBUFS); err != nil && !lost {
			return fmt.Errorf("receive notifications of the node's interfaces: %w", err)
		}
		w.update(func() {
			for _, m := range messages {
				w.apply(m)
			}
		})
	}
}

// apply applies a notification. The caller holds mu.
func (w *Watcher) apply(m netlink.Message) {
	i, ok := parseLink(m)
	switch {
	case !ok:
	case m.Header.Type == unix.RTM_NEWLINK:
		w.links[i.Index] = i
	case m.Header.Type == unix.RTM_DELLINK:
		delete(w.links, i.Index)
	}
}

// readAll reads all interfaces. Notifications that arrived meanwhile are applied afterwards. The last
// one about an interface describes its current state, so older ones do no harm.
func (w *Watcher) readAll(requests *netlink.Conn) error {
	messages, err := dumpLinks(requests)
	if err != nil {
		return fmt.Errorf("read the node's interfaces: %w", err)
	}
	all := links{}
	for _, m := range messages {
		if i, ok := parseLink(m); ok {
			all[i.Index] = i
		}
	}
	w.update(func() { w.links = all })
	return nil
}

// dumpLinks returns the messages of a dump. It repeats an interrupted dump.
func dumpLinks(requests *netlink.Conn) ([]netlink.Message, error) {
	for {
		messages, err := requests.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request | netlink.Dump}, Data: make([]byte, unix.SizeofIfInfomsg),
		})
		if err != nil || !slices.ContainsFunc(messages, func(m netlink.Message) bool { return m.Header.Flags&netlink.DumpInterrupted != 0 }) {
			return messages, err
		}
	}
}
