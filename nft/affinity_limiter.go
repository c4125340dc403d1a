package nft

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// AffinityStats describes the affinity maps of one table.
type AffinityStats struct {
	Family dataplane.Family
	// Clients is the number of stored clients, FullestMap the number of clients in the
	// fullest map, and Limit the maximum number of clients in one map. Clients and
	// FullestMap are from the last measurement; see [AffinityLimiter.Limit].
	Clients, FullestMap, Limit int
	// Full and NetworkLimit count the connections of clients that were not stored, because
	// the map was full or the client's network had reached its limit. Like [CounterValue],
	// they start at 0 again when the table is created again.
	Full, NetworkLimit uint64
	// Evicted is the number of clients that this AffinityLimiter has removed from the maps.
	Evicted uint64
}

// AffinityLimiter removes clients from full affinity maps while a Dataplane is in use. Its
// methods are safe for concurrent use.
type AffinityLimiter struct {
	dataplane *Dataplane
	tables    [2]*table
	netns     int

	mu    sync.Mutex
	stats [2]AffinityStats

	callMu sync.Mutex    // guards the fields below; a call may wait for a call of the Dataplane
	conn   *netlink.Conn // nil before the first Limit and after an error
	// measured is when Clients was last counted. It is the zero Time before the first
	// count.
	measured time.Time
	now      func() time.Time
}

const (
	// evictionDivisor determines how many clients one eviction removes from a full map:
	// affinityMapSize / evictionDivisor. With a smaller divisor, a flood of new clients
	// would displace the older clients sooner.
	evictionDivisor = 16
	// measureInterval is how often clients are counted if no map is full.
	measureInterval = time.Minute
)

// NewAffinityLimiter returns an AffinityLimiter that makes its changes through d, which
// must have been opened with the same options. The Dataplane and the file descriptor of the
// network namespace must stay open while the AffinityLimiter is in use. NewAffinityLimiter
// does not connect to the kernel.
func NewAffinityLimiter(d *Dataplane, opts Options) *AffinityLimiter {
	l := &AffinityLimiter{dataplane: d, tables: opts.newTables(opts.tableName()), netns: opts.NetNS, now: time.Now}
	for i, t := range l.tables {
		l.stats[i] = AffinityStats{Family: t.family, Limit: t.affinityMapSize}
	}
	return l
}

// Limit removes clients from full maps if the kernel has failed to store a client since the
// last call. It removes clients of the frontends with the most clients, and of each
// frontend the clients whose last connection is longest ago. Limit reads two counters from
// the kernel. It reads all elements of the maps only if the kernel failed to store a
// client, or one minute after the last time. It does nothing if the tables do not exist.
// The error is the error of ctx or an error as for [Open].
func (l *AffinityLimiter) Limit(ctx context.Context) error {
	l.callMu.Lock()
	defer l.callMu.Unlock()
	l.mu.Lock()
	stats := l.stats
	l.mu.Unlock()
	err := l.limit(ctx, &stats)
	l.mu.Lock()
	l.stats = stats
	l.mu.Unlock()
	if err != nil && l.conn != nil {
		err = errors.Join(err, l.conn.Close())
		l.conn = nil
	}
	if err != nil {
		return fmt.Errorf("limit session affinity: %w", err)
	}
	return nil
}

// Stats returns the statistics of both tables. It does not read from the kernel.
func (l *AffinityLimiter) Stats() []AffinityStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.stats[:])
}

// Close closes the connection to the kernel. A later Limit opens a new one.
func (l *AffinityLimiter) Close() error {
	l.callMu.Lock()
	defer l.callMu.Unlock()
	if l.conn == nil {
		return nil
	}
	err := l.conn.Close()
	l.conn = nil
	if err != nil {
		return fmt.Errorf("close the netlink socket: %w", err)
	}
	return nil
}

func (l *AffinityLimiter) limit(ctx context.Context, all *[2]AffinityStats) error {
	if l.conn == nil {
		conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: l.netns, MessageBufferSize: nlconn.MessageSize})
		if err != nil {
			return fmt.Errorf("open netlink socket: %w", explainError(err))
		}
		l.conn = conn
	}
	found, err := dumpCounterObjects(l.conn, l.tables[0].nf.Name)
	if err != nil {
		return explainError(err)
	}
	due := l.measured.IsZero() || l.now().Sub(l.measured) >= measureInterval
	if due {
		l.measured = l.now()
	}
	for i, t := range l.tables {
		stats := &all[i]
		full := found[objectKey{t.nf.Family, string(affinityFull)}].Packets
		evict := full > stats.Full
		stats.Full = full
		stats.NetworkLimit = found[objectKey{t.nf.Family, string(affinityNetworkLimit)}].Packets
		if !evict && !due {
			continue
		}
		if err := l.limitTable(ctx, t, stats, evict); err != nil {
			return fmt.Errorf("table %s: %w", t, err)
		}
	}
	return nil
}

func (l *AffinityLimiter) limitTable(ctx context.Context, t *table, stats *AffinityStats, evict bool) error {
	shards, err := listAffinityShards(l.conn, t)
	if err != nil {
		return err
	}
	stats.Clients, stats.FullestMap = 0, 0
	for _, shard := range shards {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		clients, err := readAffinityMap(l.conn, t, shard)
		if err != nil {
			return err
		}
		n := len(clients)
		if threshold := t.affinityMapSize - t.affinityMapSize/evictionDivisor; evict && n > threshold {
			evicted, err := l.evict(t, shard, clientsToEvict(clients, t.addrLen, max(1, t.affinityMapSize/evictionDivisor)))
			stats.Evicted += uint64(evicted) //nolint:gosec // a length
			n -= evicted
			if err != nil {
				return err
			}
		}
		stats.Clients += n
		stats.FullestMap = max(stats.FullestMap, n)
	}
	return nil
}

// rememberedClient is an element of an affinity map. key contains the client's address and
// the frontend.
type rememberedClient struct {
	key []byte
	// expires is the remaining part of the timeout.
	expires time.Duration
}

// clientsToEvict selects n of the clients, or fewer if fewer exist. It takes clients from
// the frontends with the most clients, so that each of these keeps the same number and no
// other frontend has more. Of one frontend, it selects the clients whose last connection is
// longest ago. It sorts clients.
func clientsToEvict(clients []rememberedClient, addrLen, n int) []rememberedClient {
	frontend := func(r rememberedClient) string { return string(r.key[min(addrLen, len(r.key)):]) }
	groups := map[string][]rememberedClient{}
	for _, c := range clients {
		groups[frontend(c)] = append(groups[frontend(c)], c)
	}
	sizes := make([]int, 0, len(groups))
	for _, g := range groups {
		sizes = append(sizes, len(g))
	}
	keep := maxClientsPerFrontend(sizes, n)
	var selected []rememberedClient
	for _, g := range groups {
		if len(g) <= keep {
			continue
		}
		slices.SortFunc(g, func(a, b rememberedClient) int { return cmp.Compare(a.expires, b.expires) })
		selected = append(selected, g[:len(g)-keep]...)
	}
	return selected[:min(n, len(selected))]
}

// maxClientsPerFrontend returns the largest number for which at least n clients are left
// over if each group keeps at most that many.
func maxClientsPerFrontend(sizes []int, n int) int {
	slices.SortFunc(sizes, func(a, b int) int { return cmp.Compare(b, a) })
	total := 0
	for i, size := range sizes {
		total += size
		next := 0
		if i+1 < len(sizes) {
			next = sizes[i+1]
		}
		if keep := (total - n) / (i + 1); total >= n && keep >= next {
			return keep
		}
	}
	return 0
}

// evict deletes elements in several commits, so that none of them blocks other users of
// nftables for long. It returns the number of elements that it has deleted, excluding
// elements that were already gone.
func (l *AffinityLimiter) evict(t *table, shard int, clients []rememberedClient) (int, error) {
	evicted := 0
	for part := range slices.Chunk(clients, transactionSize) {
		n, err := l.dataplane.deleteClients(t.affinityMap(shard), part)
		evicted += n
		if err != nil {
			return evicted, err
		}
	}
	return evicted, nil
}

// deleteClients deletes elements in one commit. If an element does not exist any more, the
// commit fails, and deleteClients retries each half.
func (d *Dataplane) deleteClients(set *nftables.Set, clients []rememberedClient) (int, error) {
	elements := make([]element, len(clients))
	for i, c := range clients {
		elements[i].Key = c.key
	}
	err := d.commitExclusively(func() error { return d.conn.SetDeleteElements(set, elements) })
	switch {
	case err == nil:
		return len(clients), nil
	case !errors.Is(err, unix.ENOENT):
		return 0, fmt.Errorf("delete from map %s: %w", set.Name, err)
	case len(clients) == 1:
		return 0, nil
	}
	half := len(clients) / 2
	first, err := d.deleteClients(set, clients[:half])
	if err != nil {
		return first, err
	}
	second, err := d.deleteClients(set, clients[half:])
	return first + second, err
}

// commitExclusively commits the messages that change adds to the transaction. It waits for
// other calls to finish.
func (d *Dataplane) commitExclusively(change func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := change(); err != nil {
		return err
	}
	return d.submit()
}

// listAffinityShards returns the shards that have an affinity map in the kernel.
func listAffinityShards(conn *netlink.Conn, t *table) ([]int, error) {
	var shards []int
	err := dumpTable(conn, t, unix.NFT_MSG_GETSET, []netlink.Attribute{
		{Type: unix.NFTA_SET_TABLE, Data: []byte(t.nf.Name + "\x00")},
	}, func(attrs []byte) {
		name, _ := nlconn.Attribute(attrs, unix.NFTA_SET_NAME)
		if shard, ok := parseAffinityShard(strings.TrimSuffix(string(name), "\x00")); ok {
			shards = append(shards, shard)
		}
	})
	if errors.Is(err, unix.ENOENT) { // the table does not exist
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the sets: %w", err)
	}
	return shards, nil
}

// readAffinityMap returns the elements of a map, or none if the map does not exist. An
// element that expires or is added during the dump may be missing.
func readAffinityMap(conn *netlink.Conn, t *table, shard int) ([]rememberedClient, error) {
	name := t.affinityMap(shard).Name
	var clients []rememberedClient
	err := dumpTable(conn, t, unix.NFT_MSG_GETSETELEM, []netlink.Attribute{
		{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: []byte(t.nf.Name + "\x00")},
		{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(name + "\x00")},
	}, func(attrs []byte) {
		list, _ := nlconn.Attribute(attrs, unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		for len(list) > 0 {
			_, item, rest, err := nlconn.NextAttribute(list)
			if err != nil {
				return
			}
			list = rest
			data, _ := nlconn.Attribute(item, unix.NFTA_SET_ELEM_KEY)
			key, ok := nlconn.Attribute(data, unix.NFTA_DATA_VALUE)
			if !ok {
				continue
			}
			r := rememberedClient{key: slices.Clone(key)}
			if v, ok := nlconn.Attribute(item, unix.NFTA_SET_ELEM_EXPIRATION); ok && len(v) == 8 {
				r.expires = time.Duration(binary.BigEndian.Uint64(v)) * time.Millisecond //nolint:gosec // at most a day
			}
			clients = append(clients, r)
		}
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the elements of map %s: %w", name, err)
	}
	return clients, nil
}

// dumpTable requests a dump of a table and calls visit with the attributes of each message.
func dumpTable(conn *netlink.Conn, t *table, typ uint16, attrs []netlink.Attribute, visit func(attrs []byte)) error {
	b, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return fmt.Errorf("encode the request: %w", err)
	}
	request := netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ),
			Flags: netlink.Request | netlink.Dump,
		},
		Data: append([]byte{byte(t.nf.Family), unix.NFNETLINK_V0, 0, 0}, b...),
	}
	if _, err := conn.Send(request); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	for m, err := range conn.ReceiveIter() {
		if err != nil {
			return err
		}
		if len(m.Data) >= 4 {
			visit(m.Data[4:])
		}
	}
	return nil
}
