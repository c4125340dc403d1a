package otherproxy

import (
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nlconn"
	"fairlead.io/fairlead/internal/xtables"
)

// NATRules describes the NAT rules of a node. The kernel translates packets of established connections
// as long as a family has a NAT rule. An empty NAT chain is not sufficient: rules, not chains, keep
// connection tracking enabled (nf_ct_netns_get).
type NATRules struct {
	// IPv4 and IPv6 are the families with NAT rules of programs other than Fairlead.
	IPv4, IPv6 bool
	// Own is set if Fairlead has NAT rules.
	Own bool
}

// NATRules finds NAT rules. Fairlead's tables have the given names.
func (s *Scanner) NATRules(ownTables []string) (found NATRules, err error) {
	families := map[byte][]*bool{
		unix.NFPROTO_IPV4: {&found.IPv4}, unix.NFPROTO_IPV6: {&found.IPv6}, unix.NFPROTO_INET: {&found.IPv4, &found.IPv6},
	}
	for number, in := range families {
		others, own, err := s.nft.natRules(number, ownTables)
		if err != nil {
			return found, fmt.Errorf("find NAT rules: %w", err)
		}
		found.Own = found.Own || own
		for _, family := range in {
			*family = *family || others
		}
	}
	tables := legacyTables() // without the cached results for another question
	for i, family := range []*bool{&found.IPv4, &found.IPv6} {
		exists, err := tables[i].hasTarget(func(target []byte) bool { return isNATTarget(xtables.TargetName(target)) })
		if err != nil {
			return found, err
		}
		*family = *family || exists
	}
	return found, nil
}

// isNATTarget reports whether an iptables target translates addresses.
func isNATTarget(name string) bool {
	return slices.Contains([]string{"DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP"}, name)
}

// natRules reports whether a family has NAT rules in other tables and in own ones.
func (c *nftConn) natRules(family byte, ownTables []string) (others, own bool, err error) {
	rules, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump},
		Data:   []byte{family, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil {
		return false, false, err
	}
	for _, rule := range rules {
		const header = 4 // struct nfgenmsg
		attributes := rule.Data[min(header, len(rule.Data)):]
		expressions, _ := nlconn.Attribute(attributes, unix.NFTA_RULE_EXPRESSIONS)
		for _, expression := range nlconn.Attributes(expressions) {
			if !isNATExpression(expression) {
				continue
			}
			if slices.Contains(ownTables, text(attributes, unix.NFTA_RULE_TABLE)) {
				own = true
			} else {
				others = true
			}
		}
	}
	return others, own, nil
}

// isNATExpression reports whether an expression translates addresses, in nftables or iptables-nft.
func isNATExpression(expression []byte) bool {
	switch text(expression, unix.NFTA_EXPR_NAME) {
	case "nat", "masq", "redir":
		return true
	case "target":
		data, _ := nlconn.Attribute(expression, unix.NFTA_EXPR_DATA)
		return isNATTarget(text(data, unix.NFTA_TARGET_NAME))
	}
	return false
}

// text returns an attribute with a null-terminated string.
func text(attributes []byte, typ uint16) string {
	value, _ := nlconn.Attribute(attributes, typ)
	return unix.ByteSliceToString(value)
}
