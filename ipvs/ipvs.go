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

// TableName is the name of the backend's nftables tables.
const TableName = "fairlead-ipvs"

// Defaults of [Options].
const (
	DefaultScheduler  = "rr"
	DefaultDrainLimit = 15 * time.Minute
)

// Options configure [Open]. The zero value is ready to use.
type Options struct {
	// NetNS is a file descriptor of the network namespace to program. 0 means the namespace of
	// the calling thread. The descriptor must stay open until Close.
	NetNS int
	// Logger receives messages for the operator that do not concern a single Service. Nil
	// discards them.
	Logger *slog.Logger
	// Scheduler is the kernel's name of the default scheduler, such as rr or lc (see
	// ipvsadm(8)). Services that select no scheduler use it. Empty means rr.
	Scheduler string
	// ExcludeCIDRs are networks whose virtual servers belong to other programs. The backend
	// neither reads nor changes these. A Service with a cluster IP in one of the networks fails
	// with [dataplane.ErrUnsupported].
	ExcludeCIDRs []netip.Prefix
	// StrictARP makes the node answer ARP requests only for addresses of the receiving
	// interface (sysctls arp_ignore=1 and arp_announce=2 of all interfaces).
	StrictARP bool
	// TCPTimeout, TCPFinTimeout and UDPTimeout set how long the kernel keeps an idle TCP
	// connection, a TCP connection that the client has closed, and a UDP flow. They are whole
	// seconds and apply to all virtual servers of the namespace. 0 keeps the kernel's value.
	TCPTimeout, TCPFinTimeout, UDPTimeout time.Duration
	// DrainLimit limits how long removed endpoints and deleted Services keep their
	// connections. 0 means [DefaultDrainLimit].
	DrainLimit time.Duration
	// OnRebuild is passed to [nft.Options.OnRebuild].
	OnRebuild func(nft.Rebuild)
	// OwnTables is passed to [nft.Options.OwnTables]. It affects only the tables named
	// [TableName]; virtual servers and addresses have no owner.
	OwnTables bool
	// DryRun, if not nil, collects what the Dataplane would write. The Dataplane then writes
	// nothing, loads no modules and reports no drift. After the first Replace or Apply, only a new
	// Dataplane reads the kernel correctly.
	DryRun *dataplane.DryRun
}

// Schedulers returns the names of the schedulers in the kernel's source, sorted. A running
// kernel may lack some of them, which shows only when a scheduler is used.
func Schedulers() []string {
	return []string{"dh", "fo", "lblc", "lblcr", "lc", "mh", "nq", "ovf", "rr", "sed", "sh", "twos", "wlc", "wrr"}
}

// Dataplane programs Services into IPVS and nftables. Its methods must be called from one
// goroutine, except for Drift and the channel it returns.
type Dataplane struct {
	opts         Options
	scheduler    string
	excludeCIDRs []netip.Prefix
	log          *slog.Logger
	rules        nftRules
	loadModules  func(modules ...string) error
	drift, lost  chan struct{}
	stop         chan struct{}
	goroutines   sync.WaitGroup

	// mu protects the fields below, which resync uses as well.
	mu        sync.Mutex
	ipvs      ipvsAPI
	host      hostAPI
	allocator addrAllocator
	// servers holds the programmed virtual servers. serverCount counts them for each family, and
	// boundRefs for each address outside the internal networks; the nftables rules have a
	// [nft.BoundAddressService] for each of these addresses.
	servers     map[serverKey]virtualServer
	serverCount map[dataplane.Family]int
	boundRefs   map[netip.Addr]int
	// bindFailed holds addresses that should be bound but could not be.
	bindFailed map[netip.Addr]bool
	// draining holds the destinations with weight 0 and the time at which each is deleted even
	// if it still has connections. The zero Time means as long as the endpoint serves.
	draining map[serverKey]map[netip.AddrPort]time.Time
	// retiring is the subset of servers that no Service uses any more. Each is deleted when
	// its destinations have drained.
	retiring map[serverKey]bool
	// udpDrainTimer fires when the next UDP destinations have drained.
	udpDrainTimer    *time.Timer
	udpDrainTimerSet bool
	// dirty holds the servers that have changed since verification.beginRead. It is nil while no
	// resync runs.
	dirty map[serverKey]bool
	// otherServers is the number of IPv4 virtual servers of other programs when watchServers last
	// read all virtual servers, or unknownNumber. lastList is the time of that.
	otherServers int
	lastList     time.Time
	// searchedIPv6 is set once a resync has found no IPv6 virtual server of an earlier process.
	// strayIPv6 means that it has found one, which Replace must delete.
	searchedIPv6, strayIPv6 bool
	// unverified holds the virtual servers for which a write failed. Only Replace repairs
	// these; resync ignores them.
	unverified map[serverKey]bool
	// ready is true after the first successful Replace. Before that, resync has no state to
	// compare the kernel with.
	ready bool
}

var (
	_ dataplane.Dataplane    = (*Dataplane)(nil)
	_ dataplane.LossNotifier = (*Dataplane)(nil)
	_ nft.Translator         = (*Dataplane)(nil)
)

// Interfaces to IPVS, the host's network configuration and nftables. Tests replace them to
// inject failures.
type (
	ipvsAPI interface {
		run(requests []request) ([]error, error)
		countServers() (int, error)
		readServers(f dataplane.Family, visit func(serverKey, serverState)) (complete bool, count int, err error)
		readDestinations(s serverKey, expected int) ([]addressedDestination, error)
		dumpServers() (map[serverKey]settings, error)
		addMissing(servers map[serverKey]settings, expected iter.Seq[serverKey]) error
		getServer(s serverKey) (set settings, exists bool, err error)
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

// Open connects to the kernel, loads the modules that it needs, and starts to watch for drift.
// It creates the interface [LinkName] if it does not exist, to check that the kernel supports
// dummy interfaces, and changes nothing else.
//
// The error wraps [ErrNotSupported] on a kernel without IPVS or dummy interfaces, and
// os.ErrPermission if the process lacks CAP_NET_ADMIN.
func Open(opts Options) (*Dataplane, error) {
	d, err := newDataplane(opts)
	if err != nil {
		return nil, err
	}
	if opts.DryRun != nil {
		return openDryRun(d, opts)
	}
	c, err := openIPVS(opts.NetNS)
	if err != nil {
		return nil, err
	}
	h, err := openHost(opts.NetNS)
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	if err := ensureDummyLink(h); err != nil {
		return nil, errors.Join(err, h.close(), c.close())
	}
	r, err := nft.Open(nft.Options{
		NetNS: opts.NetNS, Logger: d.log, Table: TableName, Translator: d, VirtualNetworks: internalNets(), OnRebuild: opts.OnRebuild,
		OwnTables: opts.OwnTables,
	})
	if err != nil {
		return nil, errors.Join(err, h.close(), c.close())
	}
	d.ipvs, d.host, d.rules = c, h, r
	d.goroutines.Go(d.resync)
	d.goroutines.Go(d.watchServers)
	d.goroutines.Go(d.handleEvents)
	return d, nil
}

// newDataplane returns a Dataplane without connections to the kernel.
func newDataplane(opts Options) (*Dataplane, error) {
	d := &Dataplane{
		opts: opts, scheduler: opts.Scheduler, log: opts.Logger, loadModules: kmod.Load,
		drift: make(chan struct{}, 1), lost: make(chan struct{}, 1), udpDrainTimer: time.NewTimer(0), stop: make(chan struct{}),
	}
	<-d.udpDrainTimer.C
	if d.scheduler == "" {
		d.scheduler = DefaultScheduler
	}
	if !slices.Contains(Schedulers(), d.scheduler) {
		return nil, fmt.Errorf("invalid scheduler %q: must be one of %v", d.scheduler, Schedulers())
	}
	if d.opts.DrainLimit == 0 {
		d.opts.DrainLimit = DefaultDrainLimit
	}
	for _, p := range opts.ExcludeCIDRs {
		if i := slices.IndexFunc(internalNets(), p.Overlaps); i >= 0 {
			return nil, fmt.Errorf("invalid excluded network %s: must not overlap %s, which contains the virtual servers of node ports and external addresses", p, internalNets()[i])
		}
		d.excludeCIDRs = append(d.excludeCIDRs, p.Masked())
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	d.reset()
	return d, nil
}

// reset discards the known state of the kernel.
func (d *Dataplane) reset() {
	d.allocator = newAddrAllocator()
	d.servers = map[serverKey]virtualServer{}
	d.serverCount = map[dataplane.Family]int{}
	d.otherServers, d.lastList = unknownNumber, time.Time{}
	d.boundRefs = map[netip.Addr]int{}
	d.bindFailed = map[netip.Addr]bool{}
	d.draining = map[serverKey]map[netip.AddrPort]time.Time{}
	d.retiring = map[serverKey]bool{}
	d.unverified = map[serverKey]bool{}
	d.ready = false
}

// Drift implements [dataplane.Dataplane]. The kernel sends notifications for nftables; IPVS is
// polled: for lost virtual servers several times a second, for other changes every few seconds.
func (d *Dataplane) Drift() <-chan struct{} { return d.drift }

// Lost implements [dataplane.LossNotifier] for the nftables tables and the virtual servers.
func (d *Dataplane) Lost() <-chan struct{} { return d.lost }

// GiveWay ends Node.AheadOfOthers of the last Replace after a delay, see
// [nft.Dataplane.GiveWay].
func (d *Dataplane) GiveWay(after time.Duration) error { return d.rules.GiveWay(after) }

// OwnsTables reports whether the nftables tables have an owner, see
// [nft.Dataplane.OwnsTables].
func (d *Dataplane) OwnsTables() bool { return d.rules.OwnsTables() }

func (d *Dataplane) signalDrift() {
	select {
	case d.drift <- struct{}{}:
	default:
	}
}

// signalLoss signals drift that may have removed something that packets need.
func (d *Dataplane) signalLoss() {
	select {
	case d.lost <- struct{}{}:
	default:
	}
	d.signalDrift()
}

// Close implements [dataplane.Dataplane]. Draining destinations keep weight 0; the next
// Dataplane continues to drain them.
func (d *Dataplane) Close() error {
	close(d.stop)
	d.goroutines.Wait()
	return errors.Join(d.rules.Close(), d.host.close(), d.ipvs.close())
}

// Cleanup removes the managed virtual servers, the interface with its routes, and the nftables
// tables, regardless of which process created them. Connections through Services end. Cleanup
// needs no Dataplane, and a kernel without IPVS is not an error. It does not change
// virtual servers of other programs, including kube-proxy's at the addresses of kube-ipvs0, and
// does not restore sysctls.
func Cleanup(opts Options) error {
	errs := []error{nft.Cleanup(nft.Options{NetNS: opts.NetNS, Logger: opts.Logger, Table: TableName})}
	h, err := openHost(opts.NetNS)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	errs = append(errs, removeServers(h, opts), h.remove(), h.close())
	return errors.Join(errs...)
}

// removeServers deletes the managed virtual servers, identified by their addresses.
func removeServers(h *host, opts Options) error {
	// A request to the IPVS family would make the kernel load the module.
	err := inNamespace(opts.NetNS, func() error {
		_, err := os.Stat("/proc/thread-self/net/ip_vs")
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	c, err := dialIPVS(opts.NetNS)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.close() //nolint:errcheck // the socket has no unwritten data
	servers, err := managedServers(c, h, opts)
	if err != nil {
		return err
	}
	requests := make([]request, len(servers))
	for i, s := range servers {
		requests[i] = request{command: delService, serverKey: s}
	}
	answers, err := c.run(requests)
	for i, answer := range answers {
		if answer != nil && !isNotFound(answer) {
			err = errors.Join(err, fmt.Errorf("%s: %w", requests[i], answer))
		}
	}
	return err
}

// managedServers returns the virtual servers that Cleanup deletes.
func managedServers(c *ipvsConn, h *host, opts Options) ([]serverKey, error) {
	bound, servers, err := readServers(c, h)
	if err != nil {
		return nil, err
	}
	// kube-proxy in its mode ipvs uses the same virtual servers for cluster IPs.
	shared, err := h.kubeProxyAddrs()
	if err != nil {
		return nil, err
	}
	var managed []serverKey
	for s := range servers {
		addr := s.addr.Addr()
		if (isInternal(addr) || bound[addr]) && !shared[addr] && !prefixesContain(opts.ExcludeCIDRs, addr) {
			managed = append(managed, s)
		}
	}
	return managed, nil
}

func prefixesContain(nets []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(nets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// isNotFound reports whether the kernel answered that an object does not exist.
func isNotFound(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) }

// setUp creates everything that does not depend on Services.
func (d *Dataplane) setUp() error {
	if err := d.host.setUp(); err != nil {
		return err
	}
	err := d.host.setSysctls(requiredSysctls(d.opts.StrictARP))
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%w: set it on the host, or run `fairlead run --mode=ipvs --init-only` with more privileges first", err)
	}
	if err != nil {
		return err
	}
	if d.opts.TCPTimeout == 0 && d.opts.TCPFinTimeout == 0 && d.opts.UDPTimeout == 0 {
		return nil
	}
	return d.ipvs.setTimeouts(d.opts.TCPTimeout, d.opts.TCPFinTimeout, d.opts.UDPTimeout)
}
