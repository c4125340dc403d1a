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

// Connections are translated at one of two hook priorities. The kernel runs NAT hooks,
// including the hooks of iptables, by ascending priority; of hooks with equal priority, it
// runs the last registered one first. The first hook that translates a connection decides
// (nf_nat_core.c, nf_nat_inet_fn). Other proxies use dstnat.
//
//   - By default, Fairlead's chains run after the chains of other proxies. The rules of a
//     stopped Fairlead must not take precedence over a proxy that is started later, and by
//     then no process exists that could move them.
//   - With dataplane.Node.AheadOfOthers, they run before the chains of other proxies.
//
// The chains before other proxies exist only with AheadOfOthers, because every connection of the
// node pays for a NAT chain. With AheadOfOthers, the chains at both priorities have the same
// rules, and the set "ahead" selects the active ones, so that [Dataplane.GiveWay] changes a
// single element and no rule. A packet that is between the two priorities when
// AheadOfOthers begins can pass neither. Another proxy's rules then translate it.
const (
	aheadOffset       = -1
	behindOffset      = 1
	aheadSuffix       = "-ahead"
	natPreroutingName = "nat-prerouting"
	natOutputName     = "nat-output"
)

// newAheadSet returns the set that contains the table's family while Fairlead is ahead of
// other proxies.
func newAheadSet(t *nftables.Table) *nftables.Set {
	return &nftables.Set{Table: t, Name: "ahead", KeyType: nftables.TypeNFProto, HasTimeout: true}
}

// aheadElement returns the only element that the set ahead can contain.
func (t *table) aheadElement() element { return element{Key: []byte{byte(t.nf.Family)}} }

// aheadElements returns the elements of the set ahead for a node.
func (t *table) aheadElements(node dataplane.Node) []element {
	if !node.AheadOfOthers {
		return nil
	}
	return []element{t.aheadElement()}
}

// natBaseChains returns the base chains that translate connections, at both priorities with
// dataplane.Node.AheadOfOthers. Otherwise, nat-prerouting and nat-output have no rule for @ahead.
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
func (t *table) natBaseChains(base newBaseChain, node dataplane.Node, prerouting, output []rule) []chain {
	dstnat := *nftables.ChainPriorityNATDest
	if !node.AheadOfOthers {
		return []chain{
			base(natPreroutingName, nftables.ChainTypeNAT, nftables.ChainHookPrerouting, dstnat+behindOffset, prerouting...),
			base(natOutputName, nftables.ChainTypeNAT, nftables.ChainHookOutput, dstnat+behindOffset, output...),
		}
	}
	var chains []chain
	for _, position := range []struct {
		suffix   string
		priority nftables.ChainPriority
		leave    rule
	}{
		{aheadSuffix, dstnat + aheadOffset, t.returnIfInactive(true)},
		{"", dstnat + behindOffset, t.returnIfInactive(false)},
	} {
		withLeave := func(rules []rule) []rule { return append([]rule{position.leave}, rules...) }
		chains = append(chains,
			base(natPreroutingName+position.suffix, nftables.ChainTypeNAT, nftables.ChainHookPrerouting, position.priority, withLeave(prerouting)...),
			base(natOutputName+position.suffix, nftables.ChainTypeNAT, nftables.ChainHookOutput, position.priority, withLeave(output)...),
		)
	}
	return chains
}

// newBaseChain returns a base chain.
type newBaseChain func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority, rules ...rule) chain

// returnIfInactive returns the rule that leaves a chain if the chain is inactive. ahead
// says which of the two chains the rule is for.
//
//	meta nfproto != @ahead return
//	meta nfproto @ahead return
func (t *table) returnIfInactive(ahead bool) rule {
	isAhead := lookup(t.ahead)
	isAhead.Invert = ahead
	return rule{exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg(0)}, isAhead, &expr.Verdict{Kind: expr.VerdictReturn},
	}}
}

// GiveWay ends Node.AheadOfOthers of the last Replace after a delay. The kernel does this,
// so it also happens if the process has exited by then. With a delay of 0, it happens
// immediately. GiveWay does nothing without AheadOfOthers. The next Replace reverts it. The
// delay is rounded to milliseconds.
//
// Like other methods, GiveWay must not be called concurrently with other calls.
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
		// A deleted table is not ahead of other proxies.
		if err := d.submit(); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("give way to other proxies in table %s: %w", t, err))
		}
	}
	return errors.Join(errs...)
}
