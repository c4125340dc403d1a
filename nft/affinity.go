package nft

import (
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// What clients are remembered by is spread over affinityShards maps, by the name of
// the Service, so that clients of one Service can fill only one of them. The kernel
// allocates the hash table of a map with a size when it makes the map, here 512 kB
// (net/netfilter/nft_set_hash.c, nft_rhash_init), so a map exists only once a Service
// needs it.
//
// docs/design/session-affinity-limits.md has the measurements.
const (
	affinityShards = 32
	// affinityLimit is how many clients a map remembers. Four thirds of it are a
	// power of two, which is what the kernel rounds the size of the hash table to.
	affinityLimit = 3 << 14
	// networkShare is the part of a map that the clients of one IPv6 network of 64
	// bits can take at once. As much again is granted over the affinity's timeout.
	networkShare = 8

	affinityPrefix = "affinity-"
	// networkBits is the length of the prefix that one IPv6 link has (RFC 4291),
	// so that one client can use any address in it.
	networkBits = 64
)

// affinityShard returns the shard of a Service.
func affinityShard(k dataplane.Key) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(k.Namespace + "/" + k.Name))
	sum := h.Sum32()
	return int((sum ^ sum>>16) % affinityShards)
}

// affinity returns the map of what is remembered in a shard.
func (t *table) affinity(shard int) *nftables.Set {
	key := nftables.MustConcatSetType(t.addr, t.addr, nftables.TypeInetProto, nftables.TypeInetService)
	return &nftables.Set{
		Table: t.nf, Name: fmt.Sprintf(affinityPrefix+"%02x", shard), IsMap: true, KeyType: key, DataType: nftables.TypeClassID,
		Dynamic: true, HasTimeout: true, Size: uint32(t.affinityLimit), //nolint:gosec // small
	}
}

// affinityNetworks returns the set of client networks that have had clients remembered,
// each with a frontend and a limit. It is for IPv6 only: a client has one IPv4 address.
func (t *table) affinityNetworks() *nftables.Set {
	return &nftables.Set{
		Table: t.nf, Name: affinityPrefix + "networks",
		KeyType: nftables.MustConcatSetType(t.addr, t.addr, nftables.TypeInetProto, nftables.TypeInetService),
		Dynamic: true, HasTimeout: true, Size: uint32(t.affinityLimit), //nolint:gosec // small
	}
}

// parseAffinityShard returns the shard of a map by its name.
func parseAffinityShard(name string) (int, bool) {
	text, ok := strings.CutPrefix(name, affinityPrefix)
	shard, err := strconv.ParseUint(text, 16, 8)
	return int(shard), ok && err == nil && len(text) == 2 && shard < affinityShards //nolint:gosec // small
}

// affinityShardsIn returns the shards that have a map in the kernel which is as it must
// be, or whose branches need one.
func (c *content) affinityShardsIn(t *table) []int {
	if t.virtual {
		return nil
	}
	in := map[int]bool{}
	for name, found := range c.sets {
		if shard, ok := parseAffinityShard(name); ok && sameSet(found, t.affinity(shard)) {
			in[shard] = true
		}
	}
	for b, intact := range c.branches {
		if intact && b.usesAffinityMap() {
			in[b.affinityShard()] = true
		}
	}
	return slices.Sorted(maps.Keys(in))
}

func (b branch) usesAffinityMap() bool { return b.in == affinities || b.in == localAffinities }

// addAffinityMaps adds the maps of the branches' shards to the transaction where there
// are none yet, and returns the shards that have one when it is committed.
func (d *Dataplane) addAffinityMaps(t *table, branches []branch) []int {
	shards := slices.Clone(d.affinityShards[index(t.family)])
	for _, b := range branches {
		if shard := b.affinityShard(); b.usesAffinityMap() && !slices.Contains(shards, shard) {
			_ = d.conn.AddSet(t.affinity(shard), nil) // the library keeps the error for Flush
			shards = append(shards, shard)
		}
	}
	return shards
}

// affinityRules are those of an affinity's timeout and shard. They refer to no map but
// those of what is remembered.
func (t *table) affinityRules(c class, l list) []rule {
	by, remembered := c.addressing(), t.affinity(c.affinityShard())
	recall := slices.Concat(t.clientKey(by), []expr.Any{mapLookup(remembered, reg(0)), setPriority(reg(0))})
	remember := func(op uint32) []expr.Any {
		id := t.addrLen/2 + 2
		update := &expr.Dynset{
			SrcRegKey: reg(0), SrcRegData: reg(id), SetName: remembered.Name, Operation: op,
		}
		if op != dynsetDelete {
			update.Timeout = c.timeout()
		}
		return slices.Concat(t.clientKey(by), []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(id)}, update})
	}
	translate := jumpTo(by.chainName("translate-sticky"))
	forget := rule{comment: "that endpoint is gone", exprs: slices.Concat(isID(), remember(dynsetDelete))}
	pick := rule{exprs: []expr.Any{jumpTo(by.chainName(l.chainName("pick")))}}
	rules := []rule{
		{exprs: recall},
		{exprs: slices.Concat(isIDOf(l), remember(unix.NFT_DYNSET_OP_UPDATE), []expr.Any{translate})},
		forget,
		pick,
	}
	if t.family == dataplane.IPv6 {
		rules = append(rules, rule{
			comment: "the client's network has had its share",
			exprs:   slices.Concat(isIDOf(l), t.overNetworkShare(c), []expr.Any{count(affinityNetworkLimit), translate}),
		})
	}
	return append(rules,
		rule{
			comment: "another connection of the client's may have been faster",
			exprs:   slices.Concat(isIDOf(l), remember(unix.NFT_DYNSET_OP_UPDATE), recall, []expr.Any{translate}),
		},
		rule{comment: "the map is full", exprs: slices.Concat(isIDOf(l), []expr.Any{count(affinityFull), translate})},
		forget, // as it went while the packet was on its way
		pick,
		rule{exprs: []expr.Any{translate}},
		rule{comment: "the last one went: the client will try again", exprs: []expr.Any{drop()}},
	)
}

// overNetworkShare matches new clients of a network and a frontend that has had its
// share of clients remembered. It matches none if there are too many networks.
func (t *table) overNetworkShare(c class) []expr.Any {
	mask := make([]byte, t.addrLen)
	setBits(mask, networkBits)
	share := max(1, t.affinityLimit/networkShare)
	perHour := max(1, uint64(share)*uint64(time.Hour)/uint64(c.timeout())) //nolint:gosec // positive
	return slices.Concat(
		[]expr.Any{
			t.saddr(0),
			&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: uint32(t.addrLen), Mask: mask, Xor: make([]byte, t.addrLen)}, //nolint:gosec // 16
		},
		t.frontendKey(c.addressing(), t.addrLen/4),
		[]expr.Any{&expr.Dynset{
			SrcRegKey: reg(0), SetName: t.affinityNetworks().Name, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: c.timeout(),
			Exprs: []expr.Any{&expr.Limit{
				Type: expr.LimitTypePkts, Rate: perHour, Unit: expr.LimitTimeHour, Burst: uint32(share), Over: true, //nolint:gosec // small
			}},
		}},
	)
}

// dynsetDelete is NFT_DYNSET_OP_DELETE (linux/netfilter/nf_tables.h), which
// x/sys lacks.
const dynsetDelete = 2
