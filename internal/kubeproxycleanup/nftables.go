package kubeproxycleanup

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nlconn"
)

// nftTable is the name of the tables of kube-proxy's mode nftables.
const nftTable = "kube-proxy"

// transactionSize is the number of changes in one nf_tables transaction, which other users of
// nf_tables wait for.
const transactionSize = 1024

// nftCleaner removes kube-proxy's nftables tables and its chains in the tables of iptables-nft.
type nftCleaner struct {
	read  *nlconn.Conn
	write *nftables.Conn
}

func newNFTCleaner() (*nftCleaner, error) {
	read, err := nlconn.Dial(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return nil, err
	}
	write, err := nftables.New()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open netlink socket for nftables: %w", err), read.Close())
	}
	return &nftCleaner{read, write}, nil
}

func (c *nftCleaner) close() error { return c.read.Close() }

func nftFamilies() []nftables.TableFamily {
	return []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6}
}

func familyName(f nftables.TableFamily) string {
	if f == nftables.TableFamilyIPv6 {
		return "ip6"
	}
	return "ip"
}

// removeTables removes the tables of kube-proxy's mode nftables.
func (c *nftCleaner) removeTables(report func(string)) error {
	var errs []error
	for _, family := range nftFamilies() {
		name := fmt.Sprintf("table %s %s", familyName(family), nftTable)
		c.write.DelTable(&nftables.Table{Family: family, Name: nftTable})
		switch err := c.write.Flush(); {
		case err == nil:
			report(name)
		case errors.Is(err, unix.ENOENT):
		default:
			errs = append(errs, fmt.Errorf("%s remains: %w; to delete it, run: nft delete %s", name, err, name))
		}
	}
	return errors.Join(errs...)
}

// removeIPTablesChains removes kube-proxy's chains from the tables of iptables-nft, and the jumps
// to them. It first removes the jumps, in one transaction for each family.
func (c *nftCleaner) removeIPTablesChains(ctx context.Context, report func(string)) error {
	var errs []error
	for _, family := range nftFamilies() {
		if err := c.removeFamilyChains(ctx, family, report); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (c *nftCleaner) removeFamilyChains(ctx context.Context, family nftables.TableFamily, report func(string)) error {
	chains, base, err := c.chains(ctx, family)
	if err != nil {
		return err
	}
	plans := map[string]plan{}
	var errs []error
	for _, table := range iptablesTables() {
		if !slices.ContainsFunc(chains[table], isKubeProxyChain) {
			continue
		}
		rules, err := c.rules(ctx, family, table)
		if err != nil {
			return err
		}
		p := newPlan(chains[table], rules, func(chain string) bool { return base[table][chain] })
		plans[table] = p
		for _, jump := range p.jumps {
			t := &nftables.Table{Family: family, Name: table}
			if err := c.write.DelRule(&nftables.Rule{Table: t, Chain: &nftables.Chain{Table: t, Name: jump.chain}, Handle: jump.handle}); err != nil {
				return fmt.Errorf("delete rule in chain %s of table %s %s: %w", jump.chain, familyName(family), table, err)
			}
		}
	}
	if err := c.write.Flush(); err != nil {
		return fmt.Errorf("delete the rules that jump to kube-proxy's chains in iptables-nft (%s): %w; if another program changed the rules meanwhile, run this command again",
			familyName(family), err)
	}
	for _, table := range iptablesTables() {
		p, ok := plans[table]
		if !ok {
			continue
		}
		name := fmt.Sprintf("table %s %s of iptables-nft", familyName(family), table)
		if err := c.deleteChains(&nftables.Table{Family: family, Name: table}, slices.Collect(maps.Keys(p.chains))); err != nil {
			errs = append(errs, fmt.Errorf("delete kube-proxy's chains in %s: %w", name, err))
			continue
		}
		if !p.empty() {
			report(p.describe(name))
		}
		errs = append(errs, p.keptError(name))
	}
	return errors.Join(errs...)
}

// deleteChains deletes chains that may jump to each other. It deletes all rules first.
func (c *nftCleaner) deleteChains(t *nftables.Table, names []string) error {
	for _, change := range []func(*nftables.Chain){c.write.FlushChain, c.write.DelChain} {
		for some := range slices.Chunk(names, transactionSize) {
			for _, name := range some {
				change(&nftables.Chain{Table: t, Name: name})
			}
			if err := c.write.Flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// chains returns the names of all chains by table, and which of them are base chains.
func (c *nftCleaner) chains(ctx context.Context, family nftables.TableFamily) (names map[string][]string, base map[string]map[string]bool, err error) {
	err = c.dump(ctx, family, unix.NFT_MSG_GETCHAIN, nil, func() {
		names, base = map[string][]string{}, map[string]map[string]bool{}
	}, func(attributes []byte) {
		table, chain := text(attributes, unix.NFTA_CHAIN_TABLE), text(attributes, unix.NFTA_CHAIN_NAME)
		names[table] = append(names[table], chain)
		if _, ok := nlconn.Attribute(attributes, unix.NFTA_CHAIN_HOOK); ok {
			if base[table] == nil {
				base[table] = map[string]bool{}
			}
			base[table][chain] = true
		}
	})
	if err != nil {
		return nil, nil, fmt.Errorf("list nftables chains (%s): %w", familyName(family), err)
	}
	return names, base, nil
}

// rules returns the rules of a table.
func (c *nftCleaner) rules(ctx context.Context, family nftables.TableFamily, table string) (rules []rule, err error) {
	err = c.dump(ctx, family, unix.NFT_MSG_GETRULE, nlconn.AppendString(nil, unix.NFTA_RULE_TABLE, table), func() { rules = nil }, func(attributes []byte) {
		// Kernels without the filter return the rules of all tables.
		if text(attributes, unix.NFTA_RULE_TABLE) != table {
			return
		}
		r := rule{chain: text(attributes, unix.NFTA_RULE_CHAIN)}
		if handle, ok := nlconn.Attribute(attributes, unix.NFTA_RULE_HANDLE); ok && len(handle) == 8 {
			r.handle = binary.BigEndian.Uint64(handle)
		}
		expressions, _ := nlconn.Attribute(attributes, unix.NFTA_RULE_EXPRESSIONS)
		for _, expression := range nlconn.Attributes(expressions) {
			if text(expression, unix.NFTA_EXPR_NAME) == "immediate" {
				r.jump = verdictChain(expression)
			}
		}
		rules = append(rules, r)
	})
	if err != nil {
		return nil, fmt.Errorf("list rules of table %s %s: %w", familyName(family), table, err)
	}
	return rules, nil
}

// verdictChain returns the chain of an immediate expression with a jump or goto, or "".
func verdictChain(expression []byte) string {
	for _, typ := range []uint16{unix.NFTA_EXPR_DATA, unix.NFTA_IMMEDIATE_DATA, unix.NFTA_DATA_VERDICT} {
		nested, ok := nlconn.Attribute(expression, typ)
		if !ok {
			return ""
		}
		expression = nested
	}
	return text(expression, unix.NFTA_VERDICT_CHAIN)
}

// dump calls visit with the attributes of each object. It calls reset before the first one, and
// starts again if the ruleset changes during the dump.
func (c *nftCleaner) dump(
	ctx context.Context, family nftables.TableFamily, get netlink.HeaderType, attributes []byte, reset func(), visit func(attributes []byte),
) error {
	const attempts = 10
	for range attempts {
		reset()
		interrupted, err := c.read.Dump(ctx, netlink.Message{
			Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | get},
			Data:   append([]byte{byte(family), unix.NFNETLINK_V0, 0, 0}, attributes...),
		}, func(data []byte) error {
			const header = 4 // struct nfgenmsg
			if len(data) >= header {
				visit(data[header:])
			}
			return nil
		})
		if err != nil || !interrupted {
			return err
		}
	}
	return errors.New("the ruleset keeps changing")
}

// text returns an attribute with a null-terminated string.
func text(attributes []byte, typ uint16) string {
	value, _ := nlconn.Attribute(attributes, typ)
	return unix.ByteSliceToString(value)
}
