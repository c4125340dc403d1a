package nfhooks

import (
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// rule is an nf_tables rule.
type rule struct {
	chain string
	// expressions has the names of the expressions. target is the name of the iptables target,
	// if there is one.
	expressions []string
	target      string
	// verdict is the code of the last immediate verdict, or -1.
	verdict int
}

// rules returns the rules of a table, or of a chain in the table.
func (c *Conn) rules(family, table, chain string) ([]rule, error) {
	attributes := []netlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: []byte(table + "\x00")}}
	if chain != "" {
		attributes = append(attributes, netlink.Attribute{Type: unix.NFTA_RULE_CHAIN, Data: []byte(chain + "\x00")})
	}
	data, err := netlink.MarshalAttributes(attributes)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	number := map[string]byte{"ip": unix.NFPROTO_IPV4, "ip6": unix.NFPROTO_IPV6, "inet": unix.NFPROTO_INET}[family]
	messages, err := c.request(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETRULE, netlink.Dump, number, data)
	if errors.Is(err, unix.ENOENT) { // deleted meanwhile
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list rules of table %s %s: %w", family, table, err)
	}
	var rules []rule
	for _, m := range messages {
		r := rule{verdict: -1}
		err := decode(m, func(d *netlink.AttributeDecoder) error {
			switch d.Type() {
			case unix.NFTA_RULE_CHAIN:
				r.chain = d.String()
			case unix.NFTA_RULE_EXPRESSIONS:
				return visitAll(d.Bytes(), func(element *netlink.AttributeDecoder) error { return r.addExpression(element.Bytes()) })
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list rules of table %s %s: %w", family, table, err)
		}
		if chain == "" || r.chain == chain {
			rules = append(rules, r)
		}
	}
	return rules, nil
}

// addExpression decodes the attributes of an expression.
func (r *rule) addExpression(data []byte) error {
	var name string
	return visitAll(data, func(d *netlink.AttributeDecoder) error {
		switch d.Type() {
		case unix.NFTA_EXPR_NAME:
			name = d.String()
			r.expressions = append(r.expressions, name)
		case unix.NFTA_EXPR_DATA:
			switch name {
			case "target":
				return visitAll(d.Bytes(), func(target *netlink.AttributeDecoder) error {
					if target.Type() == unix.NFTA_TARGET_NAME {
						r.target = target.String()
					}
					return nil
				})
			case "immediate":
				return r.addImmediate(d.Bytes())
			}
		}
		return nil
	})
}

// addImmediate decodes the verdict of an immediate expression.
func (r *rule) addImmediate(data []byte) error {
	return visitAll(data, func(d *netlink.AttributeDecoder) error {
		if d.Type() != unix.NFTA_IMMEDIATE_DATA {
			return nil
		}
		return visitAll(d.Bytes(), func(value *netlink.AttributeDecoder) error {
			if value.Type() != unix.NFTA_DATA_VERDICT {
				return nil
			}
			return visitAll(value.Bytes(), func(verdict *netlink.AttributeDecoder) error {
				if verdict.Type() == unix.NFTA_VERDICT_CODE {
					r.verdict = int(int32(verdict.Uint32())) //nolint:gosec // the kernel sends it as unsigned
				}
				return nil
			})
		})
	})
}

// unconditionalDrop returns drop or reject if the rule has no condition and one of these verdicts.
func (r rule) unconditionalDrop() string {
	for _, expression := range r.expressions {
		if !slices.Contains([]string{"counter", "log", "immediate", "reject", "target"}, expression) {
			return ""
		}
	}
	switch {
	case slices.Contains(r.expressions, "reject"), r.target == "REJECT":
		return "reject"
	case r.verdict == nfDrop && r.target == "":
		return "drop"
	default:
		return ""
	}
}

// Masquerading returns the chains that masquerade connections, with their table. Chains of base
// chains' tables for which skip returns true are left out.
func (c *Conn) Masquerading(chains []Chain, skip func(Chain) bool) ([]string, error) {
	type table struct{ family, name string }
	var tables []table
	for _, chain := range chains {
		t := table{chain.Family, chain.Table}
		if chain.Type == "nat" && chain.Hook == Postrouting && !skip(chain) && !slices.Contains(tables, t) {
			tables = append(tables, t)
		}
	}
	var found []string
	for _, t := range tables {
		rules, err := c.rules(t.family, t.name, "")
		if err != nil {
			return nil, err
		}
		for _, r := range rules {
			chain := Chain{Family: t.family, Table: t.name, Name: r.chain}
			masquerades := slices.Contains(r.expressions, "masq") || r.target == "MASQUERADE" || r.target == "SNAT"
			if masquerades && !skip(chain) && !slices.Contains(found, chain.String()) {
				found = append(found, chain.String())
			}
		}
	}
	return found, nil
}
