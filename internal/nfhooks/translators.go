package nfhooks

import (
	"cmp"
	"errors"
	"slices"
	"strings"

	"fairlead.io/fairlead/internal/xtables"
)

// Translators returns what translates the destinations of connections of a family, ip or ip6, at
// the hooks prerouting, input or output, in the order of the calls: NAT chains of nf_tables, the
// table nat of iptables-legacy, and IPVS. The order of functions with the same priority is
// unknown. IPVS is missing if the kernel cannot list the functions of hooks.
func (c *Conn) Translators(chains []Chain, family string, hook Hook) ([]Function, error) {
	var translators []Function
	if hook != Input { // there, NAT rules translate sources
		translators = natChains(chains, family, hook)
		translators = append(translators, legacyNAT(family)...)
		slices.SortStableFunc(translators, func(a, b Function) int { return cmp.Compare(a.Priority, b.Priority) })
	}
	functions, err := c.Functions(family, hook)
	if errors.Is(err, ErrUnsupported) {
		return translators, nil
	}
	if err != nil {
		return nil, err
	}
	// The kernel lists a single function for NAT, which calls all NAT chains in the order of
	// their priorities. IPVS follows NAT.
	for _, f := range functions {
		if schedules(f.Name) {
			translators = append(translators, f)
		}
	}
	return translators, nil
}

// schedules reports whether a function of IPVS schedules new connections. Others handle replies and
// ICMP errors.
func schedules(function string) bool {
	return strings.HasPrefix(function, "ip_vs_in_hook") || strings.HasPrefix(function, "ip_vs_remote_request") || strings.HasPrefix(function, "ip_vs_local_request")
}

func natChains(chains []Chain, family string, hook Hook) []Function {
	var functions []Function
	for _, chain := range chains {
		if chain.Type == "nat" && chain.Hook == hook && (chain.Family == family || chain.Family == "inet") {
			functions = append(functions, Function{Priority: chain.Priority, Name: chain.String()})
		}
	}
	return functions
}

// legacyPriority is NF_IP_PRI_NAT_DST of linux/netfilter_ipv4.h, and the same for IPv6.
const legacyPriority = -100

// legacyNAT returns the table nat of iptables-legacy if it exists.
func legacyNAT(family string) []Function {
	for _, f := range xtables.Families() {
		if names, err := f.Tables(); f.Name == family && err == nil && slices.Contains(names, "nat") {
			return []Function{{Priority: legacyPriority, Name: "table nat of " + f.Program}}
		}
	}
	return nil
}
