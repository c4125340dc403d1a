package ipvs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/kmod"
	"fairlead.io/fairlead/nft"

	"golang.org/x/sys/unix"
)

// TableName is the name of the backend's tables of nftables.
const TableName = "fairlead-ipvs"

// Defaults of [Options].
const (
	DefaultScheduler  = "rr"
	DefaultDrainLimit = 15 * time.Minute
)

// Options are the options of [Open]. The zero value is ready to use.
type Options struct {
	// NetNS is a file descriptor of the network namespace to program; 0 means
	// the namespace of the calling thread. It must stay open until Close.
	NetNS int
	// Logger gets what is worth an operator's attention but is no failure of a
	// Service. Nil discards it.
	Logger *slog.Logger
	// Scheduler is the kernel's name of the scheduler of Services that want none
	// in particular, such as rr or lc (man ipvsadm). Empty: rr.
	Scheduler string
	// ExcludeCIDRs are networks whose virtual servers are another's: they are
	// neither read nor written. A Service with a cluster IP in one of them is
	// refused.
	ExcludeCIDRs []netip.Prefix
	// StrictARP makes the node answer ARP for the addresses of the interface that
	// was asked, only (sysctls arp_ignore=1 and arp_announce=2 of all interfaces).
	StrictARP bool
	// TCPTimeout, TCPFinTimeout and UDPTimeout are for how long the kernel
	// remembers a connection of TCP that is idle, or whose client has closed it,
	// and a flow of UDP. They are whole seconds and hold for all virtual servers of
	// the namespace. 0 leaves the kernel's.
	TCPTimeout, TCPFinTimeout, UDPTimeout time.Duration
	// DrainLimit is how long an endpoint that has left keeps its connections, and
	// a Service that was deleted. 0: [DefaultDrainLimit].
	DrainLimit time.Duration
	// OnRebuild is the option of this name of package nft.
	OnRebuild func(nft.Rebuild)
	// OwnTables is as [nft.Options.OwnTables], for the tables that are named
	// [TableName]. Virtual servers and addresses have no owner.
	OwnTables bool
}

// Schedulers returns the names of the schedulers that the kernel's sources have,
// in order. Whether a kernel has one is known when it is asked for.
func Schedulers() []string {
	return []string{"dh", "fo", "lblc", "lblcr", "lc", "mh", "nq", "ovf", "rr", "sed", "sh", "twos", "wlc", "wrr"}
}

// Dataplane programs IPVS. Its methods must be called from one goroutine, except
// for Drift and the channel it returns.
type Dataplane struct {
	opts         Options
	scheduler    string
	excludeCIDRs []netip.Prefix
	log          *slog.Logger
	rules        nftRules
	loadModules  func(modules ...string) error
	drift        chan struct{}
	stop         chan struct{}
	goroutines   sync.WaitGroup

	// mu is for what is below, which the patrol looks at as well.
	mu        sync.Mutex
	ipvs      ipvsAPI
	host      hostAPI
	allocator addrAllocator
	// servers are the virtual servers that are programmed, and bound counts those
	// at each address of Services. The rules have a [nft.BoundAddressService] for each of
	// these addresses.
	servers   map[serverKey]virtualServer
	boundRefs map[netip.Addr]int
	// bindFailed are addresses that are to be bound, for which that failed.
	bindFailed map[netip.Addr]bool
	// draining are destinations that take no more connections, and until when they
	// may keep those that they have; the zero Time is for as long as they serve.
	draining map[serverKey]map[netip.AddrPort]time.Time
	// retiring are virtual servers, among those in servers, that no Service has any
	// more. Each is deleted once its destinations have drained.
	retiring map[serverKey]bool
	// udpDrainTimer goes off when some of UDP have drained, if there are any soon.
	udpDrainTimer    *time.Timer
	udpDrainTimerSet bool
	// dirty are the servers that have changed since the patrol set out; nil if
	// it is not under way.
	dirty map[serverKey]bool
	// unverified are virtual servers for which something failed. The next Replace puts
	// them right, which is not to come of a comparison.
	unverified map[serverKey]bool
	// ready says that a Replace has succeeded, so that there is something to
	// compare the kernel with.
	ready bool
}

var (
	_ dataplane.Dataplane    = (*Dataplane)(nil)
	_ dataplane.LossNotifier = (*Dataplane)(nil)
	_ nft.Translator         = (*Dataplane)(nil)
)

// What a Dataplane works with: IPVS, the node besides it, and nftables. Tests put
// others in their places, to make them fail.
type (
	ipvsAPI interface {
		run(requests []request) ([]error, error)
		dumpServers() (map[serverKey]settings, error)
		addMissing(found map[serverKey]settings, expected iter.Seq[serverKey]) error
		dumpDestinations(s serverKey) (map[netip.AddrPort]destination, error)
		setTimeouts(tcp, tcpFin, udp time.Duration) error
		close() error
	}
	hostAPI interface {
		setUp() error
		setSysctls(values map[string]string) error
		changeBindings(typ uint16, addrs []netip.Addr) ([]error, error)
		boundAddrs() (map[netip.Addr]bool, error)
		linkIndex() int
		close() error
	}
	nftRules interface {
		Apply(ctx context.Context, changes []dataplane.Change) error
		Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error
		ReadVirtualBindings(ctx context.Context) (map[dataplane.Frontend]nft.VirtualBinding, error)
		Drift() <-chan struct{}
		Lost() <-chan struct{}
		GiveWay(after time.Duration) error
		OwnsTables() bool
		Close() error
	}
)

// Open connects to the kernel, loading the modules that it needs, and starts to
// watch for drift. It makes the interface [LinkName] if there is none, to see that
// the kernel can, and changes nothing else.
//
// The error wraps [ErrNotSupported] on a kernel without IPVS or dummy interfaces,
// and os.ErrPermission where the process lacks CAP_NET_ADMIN.
func Open(opts Options) (*Dataplane, error) {
	d, err := newDataplane(opts)
	if err != nil {
		return nil, err
	}
	k, err := openIPVS(opts.NetNS)
	if err != nil {
		return nil, err
	}
	h, err := openHost(opts.NetNS)
	if err != nil {
		return nil, errors.Join(err, k.close())
	}
	if err := ensureDummyLink(h); err != nil {
		return nil, errors.Join(err, h.close(), k.close())
	}
	r, err := nft.Open(nft.Options{
		NetNS: opts.NetNS, Logger: d.log, Table: TableName, Translator: d, VirtualNetworks: internalNets(), OnRebuild: opts.OnRebuild,
		OwnTables: opts.OwnTables,
	})
	if err != nil {
		return nil, errors.Join(err, h.close(), k.close())
	}
	d.ipvs, d.host, d.rules = k, h, r
	d.goroutines.Go(d.resync)
	d.goroutines.Go(d.handleEvents)
	return d, nil
}

// newDataplane returns one that is not connected to anything.
func newDataplane(opts Options) (*Dataplane, error) {
	d := &Dataplane{
		opts: opts, scheduler: opts.Scheduler, log: opts.Logger, loadModules: kmod.Load,
		drift: make(chan struct{}, 1), udpDrainTimer: time.NewTimer(0), stop: make(chan struct{}),
	}
	<-d.udpDrainTimer.C
	if d.scheduler == "" {
		d.scheduler = DefaultScheduler
	}
	if !slices.Contains(Schedulers(), d.scheduler) {
		return nil, fmt.Errorf("scheduler %q: want one of %v", d.scheduler, Schedulers())
	}
	if d.opts.DrainLimit == 0 {
		d.opts.DrainLimit = DefaultDrainLimit
	}
	for _, p := range opts.ExcludeCIDRs {
		if i := slices.IndexFunc(internalNets(), p.Overlaps); i >= 0 {
			return nil, fmt.Errorf("excluded network %s: want none of %s, where virtual servers of node ports and others are", p, internalNets()[i])
		}
		d.excludeCIDRs = append(d.excludeCIDRs, p.Masked())
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	d.reset()
	return d, nil
}

// reset drops what is known of the kernel.
func (d *Dataplane) reset() {
	d.allocator = newAddrAllocator()
	d.servers = map[serverKey]virtualServer{}
	d.boundRefs = map[netip.Addr]int{}
	d.bindFailed = map[netip.Addr]bool{}
	d.draining = map[serverKey]map[netip.AddrPort]time.Time{}
	d.retiring = map[serverKey]bool{}
	d.unverified = map[serverKey]bool{}
	d.ready = false
}

// Drift implements [dataplane.Dataplane]. The kernel announces changes of
// nftables; for those of IPVS it is asked every few seconds.
func (d *Dataplane) Drift() <-chan struct{} { return d.drift }

// Lost implements [dataplane.LossNotifier] for the tables of nftables. Lost virtual
// servers are drift.
func (d *Dataplane) Lost() <-chan struct{} { return d.rules.Lost() }

// GiveWay ends Node.AheadOfOthers of the last Replace after a time, see
// [nft.Dataplane.GiveWay].
func (d *Dataplane) GiveWay(after time.Duration) error { return d.rules.GiveWay(after) }

// OwnsTables reports whether the nftables tables get an owner, see
// [nft.Dataplane.OwnsTables].
func (d *Dataplane) OwnsTables() bool { return d.rules.OwnsTables() }

func (d *Dataplane) signalDrift() {
	select {
	case d.drift <- struct{}{}:
	default:
	}
}

// Close implements [dataplane.Dataplane]. Endpoints that have left stay without
// new connections; the next Dataplane goes on to wait for the end of theirs.
func (d *Dataplane) Close() error {
	close(d.stop)
	d.goroutines.Wait()
	return errors.Join(d.rules.Close(), d.host.close(), d.ipvs.close())
}

// Cleanup removes the virtual servers, the interface with its routes, and the
// tables of nftables, whoever made them; connections through Services end. It
// needs no Dataplane and no memory of one, and a kernel without IPVS is no error.
// Virtual servers of others stay, as do settings of the node.
func Cleanup(opts Options) error {
	errs := []error{nft.Cleanup(nft.Options{NetNS: opts.NetNS, Logger: opts.Logger, Table: TableName})}
	h, err := openHost(opts.NetNS)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	errs = append(errs, removeServers(h, opts), h.remove(), h.close())
	return errors.Join(errs...)
}

// removeServers deletes the virtual servers that are ours by their address.
func removeServers(h *host, opts Options) error {
	// To ask IPVS itself would make the kernel load it.
	err := inNamespace(opts.NetNS, func() error {
		_, err := os.Stat("/proc/thread-self/net/ip_vs")
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	k, err := dialIPVS(opts.NetNS)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer k.close() //nolint:errcheck // nothing is lost
	if link, err := h.handle.LinkByName(LinkName); err == nil {
		h.link = link.Attrs().Index
	}
	bound, err := h.boundAddrs()
	if err != nil {
		return err
	}
	found, err := k.dumpServers()
	if err != nil {
		return err
	}
	var requests []request
	for s := range found {
		if excluded := prefixesContain(opts.ExcludeCIDRs, s.addr.Addr()); !excluded && (isInternal(s.addr.Addr()) || bound[s.addr.Addr()]) {
			requests = append(requests, request{command: delService, serverKey: s})
		}
	}
	answers, err := k.run(requests)
	for i, answer := range answers {
		if answer != nil && !isNotFound(answer) {
			err = errors.Join(err, fmt.Errorf("%s: %w", requests[i], answer))
		}
	}
	return err
}

func prefixesContain(nets []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(nets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// isNotFound reports whether an answer says that what is to be deleted is not there.
func isNotFound(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) }

// setUp makes everything that does not depend on Services.
func (d *Dataplane) setUp() error {
	if err := d.host.setUp(); err != nil {
		return err
	}
	err := d.host.setSysctls(requiredSysctls(d.opts.StrictARP))
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%w: set it on the host, or run `fairlead run --mode=ipvs --init-only` with more rights before", err)
	}
	if err != nil {
		return err
	}
	if d.opts.TCPTimeout == 0 && d.opts.TCPFinTimeout == 0 && d.opts.UDPTimeout == 0 {
		return nil
	}
	return d.ipvs.setTimeouts(d.opts.TCPTimeout, d.opts.TCPFinTimeout, d.opts.UDPTimeout)
}
