package nft

import (
	"errors"
	"fmt"
	"time"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Connections are translated in one of two places. Of all NAT hooks, those of
// iptables included, the kernel asks the one with the lowest priority first, and of
// equal ones the one that was registered last; the first that translates decides
// (nf_nat_core.c, nf_nat_inet_fn). Other proxies are at dstnat.
//
//   - As a rule Fairlead is behind them: what was programmed by a Fairlead that was
//     stopped must not stand in the way of a proxy that is started later, and no
//     process is there then to move it.
//   - With dataplane.Node.AheadOfOthers it is ahead of them.
//
// Both places have the same rules, and the set "ahead" says which one is in use. So to
// move is to write one element: no rule changes, and no packet finds neither.
const (
	aheadOffset       = -1
	behindOffset      = 1
	aheadSuffix       = "-ahead"
	natPreroutingName = "nat-prerouting"
	natOutputName     = "nat-output"
)

// newAheadSet returns the set that has the table's family while Fairlead is ahead of
// others.
func newAheadSet(t *nftables.Table) *nftables.Set {
	return &nftables.Set{Table: t, Name: "ahead", KeyType: nftables.TypeNFProto, HasTimeout: true}
}

// aheadElement is the one element that the set ahead may have.
func (t *table) aheadElement() element { return element{Key: []byte{byte(t.nf.Family)}} }

// aheadElements are the elements of the set ahead on this node.
func (t *table) aheadElements(node dataplane.Node) []element {
	if !node.AheadOfOthers {
		return nil
	}
	return []element{t.aheadElement()}
}

// natBaseChains returns the base chains that translate, in both places.
//
//	chain nat-prerouting-ahead {
//		type nat hook prerouting priority dstnat - 1; policy accept;
//		meta nfproto != @ahead return
//	chain nat-output-ahead {
//		type nat hook output priority dstnat - 1; policy accept;
//		meta nfproto != @ahead return
//	chain nat-prerouting {
//		type nat hook prerouting priority dstnat + 1; policy accept;
//		meta nfproto @ahead return
//	chain nat-output {
//		type nat hook output priority dstnat + 1; policy accept;
//		meta nfproto @ahead return
func (t *table) natBaseChains(base newBaseChain, prerouting, output []rule) []chain {
	dstnat := *nftables.ChainPriorityNATDest
	var chains []chain
	for _, place := range []struct {
		suffix   string
		priority nftables.ChainPriority
		leave    rule
	}{
		{aheadSuffix, dstnat + aheadOffset, t.returnIfInactive(true)},
		{"", dstnat + behindOffset, t.returnIfInactive(false)},
	} {
		in := func(rules []rule) []rule { return append([]rule{place.leave}, rules...) }
		chains = append(chains,
			base(natPreroutingName+place.suffix, nftables.ChainTypeNAT, nftables.ChainHookPrerouting, place.priority, in(prerouting)...),
			base(natOutputName+place.suffix, nftables.ChainTypeNAT, nftables.ChainHookOutput, place.priority, in(output)...),
		)
	}
	return chains
}

// newBaseChain makes a chain that packets begin in.
type newBaseChain func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority, rules ...rule) chain

// returnIfInactive leaves a chain unless Fairlead is ahead of others, or unless it is
// not.
//
//	meta nfproto != @ahead return
//	meta nfproto @ahead return
func (t *table) returnIfInactive(ahead bool) rule {
	found := lookup(t.ahead)
	found.Invert = ahead
	return rule{exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg(0)}, found, &expr.Verdict{Kind: expr.VerdictReturn},
	}}
}

// GiveWay ends Node.AheadOfOthers of the last Replace after a time, although this
// process may have ended by then: the kernel does it. With 0 it does so at once.
// Without AheadOfOthers there is nothing to do. A Replace takes it back. The time
// is rounded to milliseconds.
//
// Like all methods it must not be called beside others.
func (d *Dataplane) GiveWay(after time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.node.AheadOfOthers {
		return nil
	}
	var errs []error
	for _, t := range d.tables {
		d.conn.FlushSet(t.ahead)
		if after > 0 {
			last := t.aheadElement()
			last.Timeout = max(after, time.Millisecond)
			_ = d.conn.SetAddElements(t.ahead, []element{last}) // the library keeps the error for Flush
		}
		// A table that somebody has deleted is behind everybody.
		if err := d.submit(); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("give way to other proxies in table %s: %w", t, err))
		}
	}
	return errors.Join(errs...)
}
