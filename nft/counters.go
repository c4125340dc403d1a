package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// counter is the name of a counter in the tables. Each counts refused packets for one
// reason, except affinityFull and affinityNetworkLimit.
type counter string

const (
	rejectedNoEndpoints     counter = "rejected-no-endpoints"
	droppedNoEndpoints      counter = "dropped-no-endpoints"
	droppedNoLocalEndpoints counter = "dropped-no-local-endpoints"
	droppedSourceRanges     counter = "dropped-source-ranges"
	rejectedUndeclaredPort  counter = "rejected-undeclared-port"
	droppedNoService        counter = "dropped-no-service"
	droppedInvalid          counter = "dropped-invalid"
	droppedLoopback         counter = "dropped-loopback"
)

// Counters of connections whose clients no affinity map stores, although their Service has
// session affinity.
const (
	affinityFull         counter = "affinity-full"
	affinityNetworkLimit counter = "affinity-network-limit"
)

// rejectedLocalhostCounter returns the counter of connections to a node port at a loopback
// address.
func rejectedLocalhostCounter(p dataplane.Protocol) counter {
	return counter("rejected-localhost-" + strings.ToLower(p.String()))
}

// protocols returns the protocols that frontends can have.
func protocols() []dataplane.Protocol {
	return []dataplane.Protocol{dataplane.TCP, dataplane.UDP, dataplane.SCTP}
}

// allCounters returns all counters of a table.
func allCounters() []counter {
	return append(refusedCounters(), affinityFull, affinityNetworkLimit)
}

// refusedCounters returns the counters of refused packets.
func refusedCounters() []counter {
	all := []counter{
		rejectedNoEndpoints, droppedNoEndpoints, droppedNoLocalEndpoints, droppedSourceRanges,
		rejectedUndeclaredPort, droppedNoService, droppedInvalid, droppedLoopback,
	}
	for _, p := range protocols() {
		all = append(all, rejectedLocalhostCounter(p))
	}
	return all
}

// CounterValue is the value of one counter of refused packets since its table was created.
// Restarts of the program do not reset it. The value starts at 0 again after [Cleanup],
// after a reboot, and if another program removes the table.
type CounterValue struct {
	// Family identifies the table of the counter.
	Family dataplane.Family
	// Name is the counter's name, as `nft list counters` shows it: the verdict and the
	// reason. For example, "rejected-no-endpoints".
	Name string
	// Localhost is the protocol of a counter of node ports at loopback addresses. It is 0
	// for all other counters.
	Localhost dataplane.Protocol
	// Packets is the number of refused packets, including retries of the same client. Bytes
	// is their total size, including IP headers.
	Packets, Bytes uint64
}

// CounterReader reads the counters of refused packets. It does not need a Dataplane. Its
// methods are safe for concurrent use.
type CounterReader struct {
	table string
	netns int

	mu sync.Mutex
	// conn is nil before the first Read and after an error. The CounterReader keeps it
	// open, because to close such a socket the kernel waits for the commit in progress
	// (net/netfilter/nf_tables_api.c, nft_rcv_nl_event).
	conn *netlink.Conn
}

// NewCounterReader returns a CounterReader for a network namespace, whose file descriptor
// must stay open while the CounterReader is in use. NewCounterReader does not connect to
// the kernel.
func NewCounterReader(opts Options) *CounterReader {
	return &CounterReader{table: opts.tableName(), netns: opts.NetNS}
}

// Read returns the values of all counters in a fixed order. Values are 0 if a table does
// not exist. Read requests one dump from the kernel. The dump does not wait for commits and
// does not delay them, and takes a fraction of a millisecond for any number of Services.
// The error is the error of ctx or an error as for [Open]; the next Read opens a new
// connection.
func (c *CounterReader) Read(ctx context.Context) ([]CounterValue, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	counts, err := c.read(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the counters of the tables %s: %w", c.table, errors.Join(err, c.disconnect()))
	}
	return counts, nil
}

// Close closes the connection to the kernel. A later Read opens a new one.
func (c *CounterReader) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.disconnect()
}

func (c *CounterReader) disconnect() error {
	if c.conn == nil {
		return nil
	}
	err := c.conn.Close()
	c.conn = nil
	if err != nil {
		return fmt.Errorf("close the netlink socket: %w", err)
	}
	return nil
}

func (c *CounterReader) read(ctx context.Context) ([]CounterValue, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if c.conn == nil {
		conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: c.netns})
		if err != nil {
			return nil, fmt.Errorf("open netlink socket: %w", explainError(err))
		}
		c.conn = conn
	}
	conn := c.conn
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	counts, err := dumpRefusedCounters(conn, c.table)
	if !stop() { // the deadline makes the connection useless
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, explainError(err)
	}
	return counts, nil
}

// dumpCounterObjects reads the counters of both tables with this name in one dump. The
// library's GetNamedObjects sends one request per table, for objects of all types. The
// result can contain counters that other programs have added.
func dumpCounterObjects(conn *netlink.Conn, table string) (map[objectKey]CounterValue, error) {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_OBJ_TABLE, Data: []byte(table + "\x00")},
		{Type: unix.NFTA_OBJ_TYPE, Data: binary.BigEndian.AppendUint32(nil, unix.NFT_OBJECT_COUNTER)},
	})
	if err != nil {
		return nil, fmt.Errorf("encode the request: %w", err)
	}
	request := netlink.Message{
		Header: netlink.Header{
			Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETOBJ,
			Flags: netlink.Request | netlink.Dump,
		},
		Data: append([]byte{unix.NFPROTO_UNSPEC, unix.NFNETLINK_V0, 0, 0}, attrs...),
	}
	if _, err := conn.Send(request); err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	counters := map[objectKey]CounterValue{}
	for m, err := range conn.ReceiveIter() {
		if err != nil {
			return nil, err
		}
		if len(m.Data) >= 4 {
			o, c := parseCounter(m.Data)
			counters[o] = c
		}
	}
	return counters, nil
}

// dumpRefusedCounters returns the values of the counters of refused packets.
func dumpRefusedCounters(conn *netlink.Conn, table string) ([]CounterValue, error) {
	all, err := dumpCounterObjects(conn, table)
	if err != nil {
		return nil, err
	}
	localhost := map[counter]dataplane.Protocol{}
	for _, p := range protocols() {
		localhost[rejectedLocalhostCounter(p)] = p
	}
	var counts []CounterValue
	for _, f := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		family := nftables.TableFamilyIPv4
		if f == dataplane.IPv6 {
			family = nftables.TableFamilyIPv6
		}
		for _, name := range refusedCounters() {
			c := all[objectKey{family, string(name)}]
			c.Family, c.Name, c.Localhost = f, string(name), localhost[name]
			counts = append(counts, c)
		}
	}
	return counts, nil
}

// objectKey identifies an object in one of our tables.
type objectKey struct {
	family nftables.TableFamily
	name   string
}

// parseCounter decodes a message about a counter: the header, which contains the family,
// and the attributes (linux/netfilter/nf_tables.h, nft_object_attributes and
// nft_counter_attributes).
func parseCounter(b []byte) (objectKey, CounterValue) {
	o, attrs := objectKey{family: nftables.TableFamily(b[0])}, b[4:]
	if name, ok := nlconn.Attribute(attrs, unix.NFTA_OBJ_NAME); ok {
		o.name = strings.TrimSuffix(string(name), "\x00")
	}
	data, _ := nlconn.Attribute(attrs, unix.NFTA_OBJ_DATA)
	number := func(typ uint16) uint64 {
		if v, ok := nlconn.Attribute(data, typ); ok && len(v) == 8 {
			return binary.BigEndian.Uint64(v)
		}
		return 0
	}
	return o, CounterValue{Packets: number(unix.NFTA_COUNTER_PACKETS), Bytes: number(unix.NFTA_COUNTER_BYTES)}
}
