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

// ErrNoNFTables is returned by [Open] on a kernel without nf_tables.
var ErrNoNFTables = errors.New("the kernel has no nf_tables (CONFIG_NF_TABLES, module nf_tables)")

// Options are the options of [Open]. The zero value is ready to use.
type Options struct {
	// NetNS is a file descriptor of the network namespace to program; 0 means
	// the namespace of the calling thread. It is used during Open only.
	NetNS int
	// Logger gets what is worth an operator's attention but is no failure of a
	// Service. Nil discards it.
	Logger *slog.Logger
	// Table is the name of the two tables. Empty: [TableName].
	Table string
	// Translator picks the endpoints. Nil: the tables themselves do, at random.
	Translator Translator
	// VirtualNetworks are where the Translator's virtual servers are that are not at
	// a frontend's own address. Connections get there by way of a frontend only: those
	// of clients that know the address are dropped.
	VirtualNetworks []netip.Prefix
	// OnRebuild, if not nil, is called in Replace before it rebuilds a table that it
	// cannot repair in place, or removes one to make it anew. It must not block.
	OnRebuild func(Rebuild)
	// OwnTables makes the Dataplane the owner of the tables until Close: the kernel
	// refuses changes of other processes, and `nft flush ruleset` leaves the tables
	// out. It takes Linux 6.9 and has no effect before, see [Dataplane.OwnsTables].
	OwnTables bool

	affinityMapSize int // the constant; tests make it small
}

// Rebuild describes the rebuild of a table.
type Rebuild struct {
	Family dataplane.Family
	// Table is the table as nft names it, such as "ip fairlead", and Reason says why it
	// is not repaired in place.
	Table, Reason string
}

func (o Options) tableName() string { return cmp.Or(o.Table, TableName) }

// newTables returns the tables of a name that these options are about.
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

// Dataplane programs nftables. Its methods must be called from one goroutine,
// except for Drift and the channel it returns.
type Dataplane struct {
	// mu keeps an [AffinityLimiter] from the socket during a call: all changes go
	// through it, because it may own the tables.
	mu        sync.Mutex
	conn      *nftables.Conn
	socket    *netlink.Conn // of conn
	portID    uint32        // of socket
	ownTables bool          // the tables get an owner
	dump      *dumpConn
	flush     func() error // conn.Flush; tests make it fail
	log       *slog.Logger
	tables    [2]*table
	// newTables returns tables of a name. It is that of the options, unless tests
	// change it.
	newTables func(name string) [2]*table
	// onRebuild is that of the options, or nil.
	onRebuild func(Rebuild)
	// schema is the constant; tests change it.
	schema int
	// generation is the generation of the kernel, if only this Dataplane has changed
	// it since the tables were read.
	generation uint32
	watch      *watch
	prefetched *prefetched // nil for none
	// lastPrefetchChanges is the number of announced changes when Prefetch last saw that there
	// is something to read.
	lastPrefetchChanges uint64
	// pause is nil while the watch is subscribed.
	pause *notificationPause

	// renderer is the one that Open has chosen. tables have the same.
	renderer renderer

	// node is that of the last Replace.
	node dataplane.Node
	// slotAssignments holds those of Services, as programmed, that are not what
	// assignServiceSlots makes from nothing.
	slotAssignments map[dataplane.Key]slotAssignment
	// verdictElements counts, by table, the programmed frontends that need each branch
	// that there is; resting says since when a branch is needed by none.
	verdictElements [2]map[verdictElement]int
	unusedSince     [2]map[verdictElement]time.Time
	// addrs and ports count, by table, what is programmed of those who share the
	// elements of sets.
	addrs [2]addrCounts
	ports [2]portCounts
	// rangePrefixLengths are, by table, the prefix lengths that there is a set of source
	// ranges for, in order.
	rangePrefixLengths [2][]int
	// listIDAllocator has, by table, the list IDs of Services whose frontends share a list.
	listIDs [2]listIDAllocator
	now     func() time.Time
	// transactionSize and minSharedFrontends are the constants; tests make them small.
	transactionSize, minSharedFrontends int
}

var _ dataplane.Dataplane = (*Dataplane)(nil)

// Open connects to the kernel and starts to watch for drift. It changes nothing.
//
// The error wraps [ErrNoNFTables] on a kernel without nf_tables, and
// os.ErrPermission where the process lacks CAP_NET_ADMIN.
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
	own := opts.OwnTables
	if own {
		if own, err = supportsOwner(socket, opts.newTables(opts.tableName())[0]); err != nil {
			return nil, errors.Join(err, conn.CloseLasting())
		}
	}
	dump, err := dialDump(opts.NetNS)
	if err != nil {
		return nil, errors.Join(err, conn.CloseLasting())
	}
	watch, err := startWatch(opts.tableName(), opts.NetNS, portID, log)
	if err != nil {
		return nil, errors.Join(err, dump.Close(), conn.CloseLasting())
	}
	d := &Dataplane{
		conn:      conn,
		socket:    socket,
		portID:    portID,
		ownTables: own,
		dump:      dump,
		flush:     conn.Flush,
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
	d.resetState()
	return d, nil
}

// resetState drops what is known of the kernel.
func (d *Dataplane) resetState() {
	d.slotAssignments = map[dataplane.Key]slotAssignment{}
	for i := range d.tables {
		d.resetTableState(i)
	}
}

// resetTableState drops what is known of the i-th table, except for arrangements.
func (d *Dataplane) resetTableState(i int) {
	d.verdictElements[i] = map[verdictElement]int{}
	d.unusedSince[i] = map[verdictElement]time.Time{}
	d.addrs[i], d.ports[i] = newAddrCounts(), portCounts{}
	d.rangePrefixLengths[i] = nil
	d.listIDs[i] = newListIDAllocator()
}

// probe asks the kernel for something that only nf_tables can answer, and that
// only an administrator may ask.
func probe(conn *nftables.Conn) error {
	_, err := conn.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return fmt.Errorf("ask the kernel for its nftables tables: %w", explainError(err))
	}
	return nil
}

// explainError adds what the kernel means by an error of the first requests.
func explainError(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		// nfnetlink answers EINVAL for a subsystem it does not have
		// (net/netfilter/nfnetlink.c, nfnetlink_rcv_msg).
		return fmt.Errorf("%w: %w", ErrNoNFTables, err)
	}
	return err
}

// Socket buffers. A batch is one sendmsg, which fails with EMSGSIZE unless the
// send buffer holds all of it; see transactionSize for how large a batch gets. The
// kernel allocates what is used, not what is allowed.
const (
	sendBuffer    = 16 << 20
	receiveBuffer = 16 << 20
)

func socketOptions(conn *netlink.Conn) error {
	if err := checkDescriptor(conn); err != nil {
		return err
	}
	// The kernel's own words for what is wrong. Not together with
	// CapAcknowledge: the library looks for the words behind the whole request.
	if err := conn.SetOption(netlink.ExtendedAcknowledge, true); err != nil {
		return fmt.Errorf("ask for extended netlink errors: %w", err)
	}
	if err := conn.SetWriteBuffer(sendBuffer); err != nil {
		return fmt.Errorf("set the netlink send buffer to %d bytes: %w", sendBuffer, err)
	}
	if err := conn.SetReadBuffer(receiveBuffer); err != nil {
		return fmt.Errorf("set the netlink receive buffer to %d bytes: %w", receiveBuffer, err)
	}
	return nil
}

// checkDescriptor refuses a socket that the library, which uses select(2), would
// panic on.
func checkDescriptor(conn *netlink.Conn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("look at the netlink socket: %w", err)
	}
	var descriptor uintptr
	if err := raw.Control(func(fd uintptr) { descriptor = fd }); err != nil {
		return fmt.Errorf("look at the netlink socket: %w", err)
	}
	if descriptor >= unix.FD_SETSIZE {
		return fmt.Errorf("the netlink socket is file descriptor %d, want one below %d: open the dataplane before %d other files are open",
			descriptor, unix.FD_SETSIZE, unix.FD_SETSIZE)
	}
	return nil
}

// Lost implements [dataplane.LossNotifier].
func (d *Dataplane) Lost() <-chan struct{} { return d.watch.lost }

// Drift implements [dataplane.Dataplane]. The kernel announces every change of
// a ruleset; those of our tables by others arrive here at once. While a Replace
// makes both tables they do not: it signals in the end if others have changed
// anything, be it in other tables.
func (d *Dataplane) Drift() <-chan struct{} { return d.watch.drift }

// Close implements [dataplane.Dataplane].
func (d *Dataplane) Close() error {
	return errors.Join(d.watch.close(), d.dump.Close(), d.conn.CloseLasting())
}

// Cleanup removes both tables with all that is in them, whoever made them. It
// needs no Dataplane and no memory of one. Established connections to Services go
// on only where somebody else's rules make the kernel translate addresses: it
// stops to with the last nat chain of a family, and with the last rule that
// needs connection tracking.
//
// The error wraps [ErrOwned] and names the process if another one owns a table.
func Cleanup(opts Options) error {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(opts.NetNS), nftables.WithSockOptions(socketOptions))
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", explainError(err))
	}
	defer func() { _ = conn.CloseLasting() }()
	if err := probe(conn); err != nil {
		return err
	}
	next, own := opts.newTables(opts.tableName()+nextSuffix), opts.newTables(opts.tableName())
	for _, t := range append(next[:], own[:]...) {
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

// String returns the table as nft names it: "ip fairlead".
func (t *table) String() string {
	if t.family == dataplane.IPv6 {
		return "ip6 " + t.nf.Name
	}
	return "ip " + t.nf.Name
}

// findTable returns the table as the kernel has it, or nil.
func findTable(conn *nftables.Conn, t *table) (*nftables.Table, error) {
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
