package nft

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The maps of session affinity store which endpoint a client used. They are sharded by
// frontend (see shardOf), so the clients of one frontend can fill only one map. The kernel
// allocates the hash table of a map with a size when it creates the map, here 512 kB
// (net/netfilter/nft_set_hash.c, nft_rhash_init).
//
// docs/design/session-affinity-limits.md has the measurements.
const (
	// affinityMapSize is the maximum number of clients in one map. Four thirds of it are a
	// power of two; the kernel rounds the size of the hash table up to this.
	affinityMapSize = 3 << 14
	// networkDivisor limits the clients of one IPv6 network of 64 bits to affinityMapSize /
	// networkDivisor at once, plus as many again during one affinity timeout.
	networkDivisor = 8

	affinityPrefix = "affinity-"
	// clientNetworkBits is the prefix length of one IPv6 link (RFC 4291). One client can
	// use every address in it.
	clientNetworkBits = 64
)

// affinityMap returns the affinity map of a shard.
func (t *table) affinityMap(shard int) *nftables.Set {
	key := nftables.MustConcatSetType(t.addr, t.addr, nftables.TypeInetProto, nftables.TypeInetService)
	return &nftables.Set{
		Table: t.nf, Name: fmt.Sprintf(affinityPrefix+"%x", shard), IsMap: true, KeyType: key, DataType: nftables.TypeClassID,
		Dynamic: true, HasTimeout: true, Size: uint32(t.affinityMapSize), //nolint:gosec // small
	}
}

// affinityNetworkSet returns the set that limits how many clients of one network a frontend
// stores. Each element is a client network and a frontend with a rate limit. The set exists
// for IPv6 only, because an IPv4 client has a single address.
func (t *table) affinityNetworkSet() *nftables.Set {
	return &nftables.Set{
		Table: t.nf, Name: affinityPrefix + "networks",
		KeyType: nftables.MustConcatSetType(t.addr, t.addr, nftables.TypeInetProto, nftables.TypeInetService),
		Dynamic: true, HasTimeout: true, Size: uint32(t.affinityMapSize), //nolint:gosec // small
	}
}

// parseAffinityShard returns the shard of an affinity map with this name.
func parseAffinityShard(name string) (int, bool) {
	text, ok := strings.CutPrefix(name, affinityPrefix)
	shard, err := strconv.ParseUint(text, 16, 8)
	return int(shard), ok && err == nil && len(text) == 1 && shard < numShards //nolint:gosec // small
}

// affinityRules returns the rules of one affinity timeout. They refer to no maps except the
// affinity maps. All shards share one chain, as in table.translateChains: with one chain per
// shard, the kernel would walk many more paths when a class is new.
//
//	chain affinity-10800s {
//		ip daddr & 0.0.0.15 == 0.0.0.0 meta priority set ip saddr . ip daddr . meta l4proto . th dport map @affinity-0
//		…
//		meta priority & ffff:100 == fafa:0 ip daddr & 0.0.0.15 == 0.0.0.0 update @affinity-0 { ip saddr . ip daddr . meta l4proto . th dport timeout 3h : meta priority }
//		…
//		meta priority & ffff:100 == fafa:0 jump translate-sticky
//		meta priority & ffff:0 == fafa:0 ip daddr & 0.0.0.15 == 0.0.0.0 delete @affinity-0 { ip saddr . ip daddr . meta l4proto . th dport : meta priority } comment "that endpoint is gone"
//		…
//		jump pick
//		meta priority & ffff:100 == fafa:0 ip daddr & 0.0.0.15 == 0.0.0.0 update @affinity-0 { ip saddr . ip daddr . meta l4proto . th dport timeout 3h : meta priority } meta priority set ip saddr . ip daddr . meta l4proto . th dport map @affinity-0 jump translate-sticky comment "another connection of the client's may have been faster"
//		…
//		meta priority & ffff:100 == fafa:0 counter name "affinity-full" jump translate-sticky comment "the map is full"
//		meta priority & ffff:0 == fafa:0 ip daddr & 0.0.0.15 == 0.0.0.0 delete @affinity-0 { ip saddr . ip daddr . meta l4proto . th dport : meta priority } comment "that endpoint is gone"
//		…
//		jump pick
//		jump translate-sticky
//		drop comment "the last one went: the client will try again"
//	}
func (t *table) affinityRules(c serviceClass, l endpointList) []rule {
	by := c.addressing()
	forEachShard := func(comment string, condition []expr.Any, exprs func(*nftables.Set) []expr.Any) []rule {
		var rules []rule
		for shard := range numShards {
			rules = append(rules, rule{comment: comment, exprs: slices.Concat(condition, t.matchShard(by, shard), exprs(t.affinityMap(shard)))})
		}
		return rules
	}
	lookUpClient := func(affinityMap *nftables.Set) []expr.Any {
		return slices.Concat(t.clientKey(by), []expr.Any{mapLookup(affinityMap, reg(0)), setPriority(reg(0))})
	}
	write := func(op uint32) func(*nftables.Set) []expr.Any {
		return func(affinityMap *nftables.Set) []expr.Any {
			id := t.addrLen/2 + 2
			update := &expr.Dynset{
				SrcRegKey: reg(0), SrcRegData: reg(id), SetName: affinityMap.Name, Operation: op,
			}
			if op != dynsetDelete {
				update.Timeout = c.timeout()
			}
			return slices.Concat(t.clientKey(by), []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(id)}, update})
		}
	}
	update := write(unix.NFT_DYNSET_OP_UPDATE)
	translate := jumpChain(by.chainName("translate-sticky"))
	storeClient := func(affinityMap *nftables.Set) []expr.Any {
		return slices.Concat(update(affinityMap), lookUpClient(affinityMap), []expr.Any{translate})
	}
	deleteStale := forEachShard("that endpoint is gone", matchEndpointID(), write(dynsetDelete))
	pick := rule{exprs: []expr.Any{jumpChain(by.chainName(l.chainName("pick")))}}
	useStored := []rule{{exprs: append(matchEndpointIDInList(l), translate)}}
	rules := slices.Concat(forEachShard("", nil, lookUpClient), forEachShard("", matchEndpointIDInList(l), update), useStored, deleteStale, []rule{pick})
	if t.family == dataplane.IPv6 {
		rules = append(rules, rule{
			comment: "the client's network has had its share",
			exprs:   slices.Concat(matchEndpointIDInList(l), t.matchNetworkOverLimit(c), []expr.Any{counterRef(affinityNetworkLimit), translate}),
		})
	}
	rules = append(rules, forEachShard("another connection of the client's may have been faster", matchEndpointIDInList(l), storeClient)...)
	rules = append(rules, rule{comment: "the map is full", exprs: slices.Concat(matchEndpointIDInList(l), []expr.Any{counterRef(affinityFull), translate})})
	rules = append(rules, deleteStale...) // the endpoint may have been deleted meanwhile
	return append(rules, pick,
		rule{exprs: []expr.Any{translate}},
		rule{comment: "the last one went: the client will try again", exprs: []expr.Any{drop()}},
	)
}

// matchNetworkOverLimit matches new clients of a network for which the frontend already
// stores as many clients as the limit allows. It does not match if the set of networks is
// full.
//
//	update @affinity-networks { ip6 saddr & ffff:ffff:ffff:ffff:: . ip6 daddr & :: . meta l4proto . th dport timeout 3h limit rate over 2048/hour burst 6144 packets }
func (t *table) matchNetworkOverLimit(c serviceClass) []expr.Any {
	mask := make([]byte, t.addrLen)
	setLeadingBits(mask, clientNetworkBits)
	share := max(1, t.affinityMapSize/networkDivisor)
	perHour := max(1, uint64(share)*uint64(time.Hour)/uint64(c.timeout())) //nolint:gosec // positive
	return slices.Concat(
		[]expr.Any{
			t.saddr(0),
			&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: uint32(t.addrLen), Mask: mask, Xor: make([]byte, t.addrLen)}, //nolint:gosec // 16
		},
		t.frontendKey(c.addressing(), t.addrLen/4),
		[]expr.Any{&expr.Dynset{
			SrcRegKey: reg(0), SetName: t.affinityNetworkSet().Name, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: c.timeout(),
			Exprs: []expr.Any{&expr.Limit{
				Type: expr.LimitTypePkts, Rate: perHour, Unit: expr.LimitTimeHour, Burst: uint32(share), Over: true, //nolint:gosec // small
			}},
		}},
	)
}

// dynsetDelete is NFT_DYNSET_OP_DELETE (linux/netfilter/nf_tables.h), which x/sys does not
// define.
const dynsetDelete = 2
