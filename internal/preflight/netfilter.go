package preflight

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"fairlead.io/fairlead/internal/nfhooks"
)

// checkNetfilter reports which programs translate connections and in which order, which chains
// drop packets by default, and who masquerades.
func (c *checker) checkNetfilter() {
	conn, err := nfhooks.Dial()
	if err != nil {
		c.error("netfilter", err)
		return
	}
	defer conn.Close() //nolint:errcheck // nothing was written to it
	chains, err := conn.Chains()
	if err != nil {
		c.error("netfilter", err)
		return
	}
	c.reportTranslators(conn, chains)
	c.reportDroppers(conn, chains)
	c.reportMasquerading(conn, chains)
}

// reportTranslators reports the order in which NAT rules see new connections.
func (c *checker) reportTranslators(conn *nfhooks.Conn, chains []nfhooks.Chain) {
	const check = "translation-order"
	for _, family := range []string{"ip", "ip6"} {
		for _, hook := range []nfhooks.Hook{nfhooks.Prerouting, nfhooks.Output} {
			order, err := conn.Functions(family, hook)
			if errors.Is(err, nfhooks.ErrUnsupported) {
				order = natChains(chains, family, hook)
			} else if err != nil {
				c.error(check, err)
				return
			}
			var names []string
			for _, f := range order {
				if translates(f, chains) {
					names = append(names, fmt.Sprintf("%s (priority %d)", f.Name, f.Priority))
				}
			}
			if len(names) > 0 {
				c.Add(check, Info, "", "%s %s: %s", family, hook, strings.Join(names, ", then "))
			}
			c.reportPredecessors(family, hook, order, chains)
		}
	}
}

// reportPredecessors warns about NAT rules that see new connections before a running Fairlead.
func (c *checker) reportPredecessors(family string, hook nfhooks.Hook, order []nfhooks.Function, chains []nfhooks.Chain) {
	if c.holder == nil {
		return
	}
	ours := slices.IndexFunc(order, func(f nfhooks.Function) bool { return isFairleadFunction(f) && translates(f, chains) })
	for _, f := range order[:max(0, ours)] {
		if translates(f, chains) && !isFairleadFunction(f) {
			c.Add("translation-order", Info, "", "%s %s: %s translates connections before Fairlead, which leaves those connections to it", family, hook, f.Name)
		}
	}
}

// translates reports whether a function is a NAT chain of nf_tables or the NAT of iptables-legacy,
// or belongs to IPVS.
func translates(f nfhooks.Function, chains []nfhooks.Chain) bool {
	return strings.Contains(f.Name, "module iptable_nat") || strings.Contains(f.Name, "module ip6table_nat") || strings.Contains(f.Name, "module ip_vs") ||
		slices.ContainsFunc(chains, func(chain nfhooks.Chain) bool {
			return chain.Type == "nat" && chain.String() == f.Name
		})
}

func isFairleadFunction(f nfhooks.Function) bool {
	words := strings.Fields(f.Name)
	return len(words) == 4 && isFairlead(words[2])
}

// natChains returns the NAT chains of a family at a hook by priority. The order of chains with
// the same priority is unknown.
func natChains(chains []nfhooks.Chain, family string, hook nfhooks.Hook) []nfhooks.Function {
	var functions []nfhooks.Function
	for _, chain := range chains {
		if chain.Type == "nat" && chain.Hook == hook && (chain.Family == family || chain.Family == "inet") {
			functions = append(functions, nfhooks.Function{Priority: chain.Priority, Name: chain.String()})
		}
	}
	slices.SortStableFunc(functions, func(a, b nfhooks.Function) int { return int(a.Priority) - int(b.Priority) })
	return functions
}

// reportDroppers reports chains that drop packets which no rule accepts. Whether a rule accepts a
// Service's packets depends on their addresses and interfaces, so this is a warning.
func (c *checker) reportDroppers(conn *nfhooks.Conn, chains []nfhooks.Chain) {
	droppers, err := conn.Droppers(chains, func(chain nfhooks.Chain) bool {
		return isFairlead(chain.Table) || chain.Table == "kube-proxy"
	})
	if err != nil {
		c.error("firewall", err)
	}
	for _, d := range droppers {
		consequence := "Services are reachable only if a rule accepts the packets before"
		switch d.Hook {
		case nfhooks.Forward:
			consequence = "connections to pods need a rule that accepts them. kube-proxy's mode iptables adds one, its mode nftables and Fairlead do not"
		case nfhooks.Input:
			consequence = "health-check node ports, /healthz and endpoints on the host network need a rule that accepts them"
		case nfhooks.Prerouting, nfhooks.Output, nfhooks.Postrouting:
		}
		c.Add("firewall-"+d.Hook.String(), Warning, d.Fix, "%s: %s: %s", d.Name, d.Reason, consequence)
	}
	for _, hook := range []nfhooks.Hook{nfhooks.Prerouting, nfhooks.Input, nfhooks.Forward} {
		if err == nil && !slices.ContainsFunc(droppers, func(d nfhooks.Dropper) bool { return d.Hook == hook }) {
			c.Add("firewall-"+hook.String(), OK, "", "no chain drops packets by default")
		}
	}
}

// reportMasquerading reports other programs' rules that masquerade, such as those of a CNI plugin.
func (c *checker) reportMasquerading(conn *nfhooks.Conn, chains []nfhooks.Chain) {
	const check = "masquerading"
	found, err := conn.Masquerading(chains, func(chain nfhooks.Chain) bool {
		return isFairlead(chain.Table) || chain.Table == "kube-proxy" || strings.HasPrefix(chain.Name, "KUBE-")
	})
	if err != nil {
		c.error(check, err)
		return
	}
	legacy, err := nfhooks.LegacyMasquerading()
	if err != nil {
		c.error(check, err)
	}
	if found = append(found, legacy...); len(found) > 0 {
		c.Add(check, Info, "", "another program, usually the CNI plugin, masquerades connections: %s", strings.Join(found, ", "))
		return
	}
	c.Add(check, Info, "", "no other program masquerades connections with nf_tables or iptables; connections of pods to other networks keep the pod's address")
}
