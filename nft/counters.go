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

// counter is a named counter: a reason not to serve a connection.
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

// Counters of connections whose clients are not remembered, although their Service has
// session affinity.
const (
	affinityFull         counter = "affinity-full"
	affinityNetworkLimit counter = "affinity-network-limit"
)

// rejectedLocalhostCounter counts connections to a node port at a loopback address.
func rejectedLocalhostCounter(p dataplane.Protocol) counter {
	return counter("rejected-localhost-" + strings.ToLower(p.String()))
}

// protocols returns those that frontends have.
func protocols() []dataplane.Protocol {
	return []dataplane.Protocol{dataplane.TCP, dataplane.UDP, dataplane.SCTP}
}

// allCounters returns all counters, refusedCounters those of what is not served.
func allCounters() []counter {
	return append(refusedCounters(), affinityFull, affinityNetworkLimit)
}

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

// CounterValue is what one of the backend's counters has counted since its table was
// made. Restarts of the program leave it alone; [Cleanup], a reboot and whoever
// else removes the table make it begin again.
type CounterValue struct {
	// Family says which of the two tables the counter is in.
	Family dataplane.Family
	// Name is the counter's name, as `nft list counters` shows it: what became
	// of the packets, and why. For example, "rejected-no-endpoints".
	Name string
	// Localhost is the protocol of the counters of node ports at loopback
	// addresses, each of which counts one protocol, and 0 of all others.
	Localhost dataplane.Protocol
	// Packets are those that were rejected or dropped, not connections: a client
	// that tries again is counted again. Bytes are their sizes with the IP header.
	Packets, Bytes uint64
}

// CounterReader read what was not served, beside a Dataplane and without one. Their
// methods may be called from any goroutine.
type CounterReader struct {
	table string
	netns int

	mu sync.Mutex
	// conn is nil until it is needed, and after an error. It is kept because the
	// kernel waits for the commit under way before it closes such a socket
	// (net/netfilter/nf_tables_api.c, nft_rcv_nl_event).
	conn *netlink.Conn
}

// NewCounterReader returns Counters of a network namespace, whose file descriptor must
// stay open for as long as they are in use. It does not connect to the kernel yet.
func NewCounterReader(opts Options) *CounterReader {
	return &CounterReader{table: opts.tableName(), netns: opts.NetNS}
}

// Read returns what every counter has counted, in an order that stays; nothing is
// counted where there is no table. It asks the kernel once for all, which does not
// wait for commits, nor they for it, and takes a fraction of a millisecond however
// many Services there are. The error is that of ctx, or as for [Open]; the next
// Read connects anew.
func (c *CounterReader) Read(ctx context.Context) ([]CounterValue, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	counts, err := c.read(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the counters of the tables %s: %w", c.table, errors.Join(err, c.disconnect()))
	}
	return counts, nil
}

// Close closes the connection to the kernel. A Read after that opens another.
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
	if !stop() { // the connection is of no use with that deadline
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, explainError(err)
	}
	return counts, nil
}

// dumpCounterObjects reads the counters of both tables of a name in one dump. The library's
// GetNamedObjects asks for each, and for objects of all kinds. Others may have added some.
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
	found := map[objectKey]CounterValue{}
	for m, err := range conn.ReceiveIter() {
		if err != nil {
			return nil, err
		}
		if len(m.Data) >= 4 {
			o, c := parseCounter(m.Data)
			found[o] = c
		}
	}
	return found, nil
}

// dumpRefusedCounters returns the counters of what is not served.
func dumpRefusedCounters(conn *netlink.Conn, table string) ([]CounterValue, error) {
	found, err := dumpCounterObjects(conn, table)
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
			c := found[objectKey{family, string(name)}]
			c.Family, c.Name, c.Localhost = f, string(name), localhost[name]
			counts = append(counts, c)
		}
	}
	return counts, nil
}

// objectKey tells objects of tables of our name.
type objectKey struct {
	family nftables.TableFamily
	name   string
}

// parseCounter decodes a message about a counter: the header with the family, and
// attributes (linux/netfilter/nf_tables.h, nft_object_attributes and
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
