package nft

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoNFTables is returned by [Open] if the kernel does not support nf_tables.
var ErrNoNFTables = errors.New("the kernel has no nf_tables (CONFIG_NF_TABLES, module nf_tables)")

// Options contains the options of [Open]. The zero value is valid.
type Options struct {
	// NetNS is a file descriptor of the network namespace to program. 0 means the namespace
	// of the calling thread. Open does not keep the descriptor.
	NetNS int
	// Logger receives messages for the operator that are not failures of a Service. Nil
	// discards them.
	Logger *slog.Logger
	// Table is the name of both tables. The default is [TableName].
	Table string
	// Translator selects the endpoints. If it is nil, the tables select them.
	Translator Translator
	// VirtualNetworks are the networks of the Translator's virtual servers, except for
	// servers at the address of a frontend. Clients reach them through frontends only: the
	// rules drop direct connections to these networks.
	VirtualNetworks []netip.Prefix
	// OnRebuild, if not nil, is called by Replace before it rebuilds a table that it cannot
	// repair in place, and before it removes and re-creates a table. It must not block.
	OnRebuild func(Rebuild)
	// OwnTables makes the Dataplane the owner of the tables until Close: the kernel rejects
	// changes by other processes, and `nft flush ruleset` skips the tables. OwnTables has
	// no effect before Linux 6.9; see [Dataplane.OwnsTables].
	OwnTables bool
	// DryRun, if not nil, collects what the Dataplane would write. The Dataplane then writes
	// nothing to the kernel, and OwnTables has no effect. After the first Replace or Apply,
	// only a new Dataplane reads the kernel correctly.
	DryRun *dataplane.DryRun

	affinityMapSize int // overrides the constant in tests
}

// Rebuild describes the rebuild of a table.
type Rebuild struct {
	Family dataplane.Family
	// Table is the table's name in nft syntax, such as "ip fairlead". Reason says why it
	// cannot be repaired in place.
	Table, Reason string
}

func (o Options) tableName() string { return cmp.Or(o.Table, TableName) }

// newTables returns the descriptions of both tables with this name.
func (o Options) newTables(name string) [2]*table {
	tables := [2]*table{newTable(dataplane.IPv4), newTable(dataplane.IPv6)}
	r := o.renderer()
	for _, t := range tables {
		t.nf.Name, t.renderer = name, r
		t.virtualNetworks = t.mergeNetworks(o.VirtualNetworks)
		t.affinityMapSize = cmp.Or(o.affinityMapSize, affinityMapSize)
	}
	return tables
}

// Dataplane programs nftables. Its methods must be called from a single goroutine, except
// for Drift and the channel that it returns.
type Dataplane struct {
	// mu excludes an [AffinityLimiter] during a call. The AffinityLimiter makes all changes
	// through the Dataplane's socket, because the socket may own the tables.
	mu        sync.Mutex
	conn      ruleset
	socket    *netlink.Conn // of conn
	portID    uint32        // of socket
	ownTables bool          // whether the tables have an owner
	dump      *dumpConn
	flush     func() error // conn.Flush; tests inject failures
	log       *slog.Logger
	tables    [2]*table
	// dryRun is Options.DryRun, or nil.
	dryRun *dataplane.DryRun
	// newTables is Options.newTables. Tests replace it.
	newTables func(name string) [2]*table
	// onRebuild is Options.OnRebuild, or nil.
	onRebuild func(Rebuild)
	// schema is the constant. Tests change it.
	schema int
	// generation is the kernel's generation if only this Dataplane has committed since the
	// tables were read.
	generation uint32
	watch      *watch
	prefetch   prefetchState
	// pause is nil while the watch is subscribed.
	pause *notificationPause

	// renderer is the renderer that Open selected. The tables have the same one.
	renderer renderer

	// node is the Node of the last Replace.
	node dataplane.Node
	// slotAssignments contains the assignments of programmed Services that differ from the
	// initial assignment; see renderer.initialAssignment.
	slotAssignments map[dataplane.Key]slotAssignment
	// verdictElements counts, by table, the programmed frontends that need each existing
	// verdict element. unusedSince is the time since which no frontend needs an element.
	verdictElements [2]map[verdictElement]int
	unusedSince     [2]map[verdictElement]time.Time
	// addrs and ports count, by table, the programmed users of shared set elements.
	addrs [2]addrCounts
	ports [2]portCounts
	// rangePrefixLengths contains, by table, the sorted prefix lengths that have a source
	// range set.
	rangePrefixLengths [2][]int
	// listIDs contains, by table, the IDs of shared lists by Service.
	listIDs [2]listIDAllocator
	now     func() time.Time
	// spareBatch is an empty batch, or nil.
	spareBatch *batch
	// transactionSize and minSharedFrontends are the constants. Tests reduce them.
	transactionSize, minSharedFrontends int
}

var _ dataplane.Dataplane = (*Dataplane)(nil)

// Open connects to the kernel and starts to watch for drift. It changes nothing in the
// kernel.
//
// The error wraps [ErrNoNFTables] if the kernel does not support nf_tables, and
// os.ErrPermission if the process lacks CAP_NET_ADMIN.
func Open(opts Options) (*Dataplane, error) {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	var socket *netlink.Conn
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(opts.NetNS), nftables.WithSockOptions(socketOptions,
		func(conn *netlink.Conn) error { socket = conn; return nil }))
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", explainError(err))
	}
	if err := probe(conn); err != nil {
		return nil, errors.Join(err, conn.CloseLasting())
	}
	portID, err := conn.GetPortID()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read the netlink socket's port: %w", err), conn.CloseLasting())
	}
	own := opts.OwnTables && opts.DryRun == nil
	if own {
		if own, err = supportsOwner(socket, opts.newTables(opts.tableName())[0]); err != nil {
			return nil, errors.Join(err, conn.CloseLasting())
		}
	}
	dump, err := dialParallelDump(opts.NetNS)
	if err != nil {
		return nil, errors.Join(err, conn.CloseLasting())
	}
	watch, err := startWatch(opts.tableName(), opts.NetNS, portID, log)
	if err != nil {
		return nil, errors.Join(err, dump.Close(), conn.CloseLasting())
	}
	d := &Dataplane{
		conn:      &bulkConn{Conn: conn, socket: socket},
		socket:    socket,
		portID:    portID,
		ownTables: own,
		dump:      dump,
		log:       log,
		tables:    opts.newTables(opts.tableName()),
		watch:     watch,
		now:       time.Now,

		newTables:          opts.newTables,
		onRebuild:          opts.OnRebuild,
		schema:             schema,
		renderer:           opts.renderer(),
		transactionSize:    transactionSize,
		minSharedFrontends: minSharedFrontends,
	}
	d.flush = d.conn.Flush
	d.resetState()
	if opts.DryRun != nil {
		d.startDryRun(conn, opts.DryRun)
	}
	return d, nil
}

// resetState discards the cached state of the kernel.
func (d *Dataplane) resetState() {
	d.slotAssignments = map[dataplane.Key]slotAssignment{}
	for i := range d.tables {
		d.resetTableState(i)
	}
}

// resetTableState discards the cached state of the i-th table, except for slot assignments.
func (d *Dataplane) resetTableState(i int) {
	d.verdictElements[i] = map[verdictElement]int{}
	d.unusedSince[i] = map[verdictElement]time.Time{}
	d.addrs[i], d.ports[i] = newAddrCounts(), portCounts{}
	d.rangePrefixLengths[i] = nil
	d.listIDs[i] = newListIDAllocator()
}

// probe sends a request that only nf_tables can answer and that requires CAP_NET_ADMIN.
func probe(conn *nftables.Conn) error {
	_, err := conn.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return fmt.Errorf("list nftables tables: %w", explainError(err))
	}
	return nil
}

// explainError adds the meaning of an error that the kernel returns for the first requests.
func explainError(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		// nfnetlink returns EINVAL for an unknown subsystem
		// (net/netfilter/nfnetlink.c, nfnetlink_rcv_msg).
		return fmt.Errorf("%w: %w", ErrNoNFTables, err)
	}
	return err
}

// Socket buffers. A batch is one sendmsg call, which fails with EMSGSIZE unless the send
// buffer can hold the whole batch; see transactionSize for the size of batches. The kernel
// allocates only the memory that it uses.
const (
	sendBuffer    = 16 << 20
	receiveBuffer = 16 << 20
)

func socketOptions(conn *netlink.Conn) error {
	if err := checkDescriptor(conn); err != nil {
		return err
	}
	// Extended acknowledgements contain the kernel's error message. CapAcknowledge must
	// stay off: the library expects the message after the copy of the whole request.
	if err := conn.SetOption(netlink.ExtendedAcknowledge, true); err != nil {
		return fmt.Errorf("enable extended netlink acknowledgements: %w", err)
	}
	if err := conn.SetWriteBuffer(sendBuffer); err != nil {
		return fmt.Errorf("set the netlink send buffer to %d bytes: %w", sendBuffer, err)
	}
	if err := conn.SetReadBuffer(receiveBuffer); err != nil {
		return fmt.Errorf("set the netlink receive buffer to %d bytes: %w", receiveBuffer, err)
	}
	return nil
}

// checkDescriptor returns an error for a socket on which the library would panic, because
// it uses select(2).
func checkDescriptor(conn *netlink.Conn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("get the netlink socket's file descriptor: %w", err)
	}
	var descriptor uintptr
	if err := raw.Control(func(fd uintptr) { descriptor = fd }); err != nil {
		return fmt.Errorf("get the netlink socket's file descriptor: %w", err)
	}
	if descriptor >= unix.FD_SETSIZE {
		return fmt.Errorf("the netlink socket has file descriptor %d, must be below %d: open the dataplane before %d other files are open",
			descriptor, unix.FD_SETSIZE, unix.FD_SETSIZE)
	}
	return nil
}

// Lost implements [dataplane.LossNotifier].
func (d *Dataplane) Lost() <-chan struct{} { return d.watch.lost }

// Drift implements [dataplane.Dataplane]. The kernel sends a notification for every ruleset
// change, and the Dataplane signals changes of its tables by other processes immediately.
// While a Replace creates both tables, notifications are paused. At its end, Replace
// signals drift if another process has changed anything, even in other tables.
func (d *Dataplane) Drift() <-chan struct{} { return d.watch.drift }

// Close implements [dataplane.Dataplane].
func (d *Dataplane) Close() error {
	return errors.Join(d.watch.close(), d.dump.Close(), d.conn.CloseLasting())
}

// Cleanup removes both tables with all their contents, whichever process has created them.
// It needs no Dataplane. Established connections to Services survive only if other rules
// make the kernel translate addresses. The kernel stops translating with the
// last NAT chain of a family, and with the last rule that needs connection tracking.
//
// The error wraps [ErrOwned] and names the owner if another process owns a table.
func Cleanup(opts Options) error {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(opts.NetNS), nftables.WithSockOptions(socketOptions))
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", explainError(err))
	}
	defer func() { _ = conn.CloseLasting() }()
	if err := probe(conn); err != nil {
		return err
	}
	next, current := opts.newTables(opts.tableName()+nextSuffix), opts.newTables(opts.tableName())
	for _, t := range append(next[:], current[:]...) {
		found, err := findTable(conn, t)
		if err != nil {
			return err
		}
		if found == nil {
			continue
		}
		if found.Flags&nftables.TableFlagOwner != 0 {
			return ownedError(t, found.Owner)
		}
		if err := removeTable(conn, conn.Flush, t); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

// String returns the table in nft syntax: "ip fairlead".
func (t *table) String() string {
	if t.family == dataplane.IPv6 {
		return "ip6 " + t.nf.Name
	}
	return "ip " + t.nf.Name
}

// findTable returns the table from the kernel, or nil if it does not exist.
func findTable(conn ruleset, t *table) (*nftables.Table, error) {
	tables, err := conn.ListTablesOfFamily(t.nf.Family)
	if err != nil {
		return nil, fmt.Errorf("list the %s tables: %w", t.family, err)
	}
	for _, found := range tables {
		if found.Name == t.nf.Name && found.Family == t.nf.Family {
			return found, nil
		}
	}
	return nil, nil
}
