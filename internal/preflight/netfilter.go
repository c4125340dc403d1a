package preflight

import (
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

// reportTranslators reports the order in which NAT rules and IPVS see new connections.
func (c *checker) reportTranslators(conn *nfhooks.Conn, chains []nfhooks.Chain) {
	const check = "translation-order"
	for _, family := range []string{"ip", "ip6"} {
		for _, hook := range []nfhooks.Hook{nfhooks.Prerouting, nfhooks.Input, nfhooks.Output} {
			order, err := conn.Translators(chains, family, hook)
			if err != nil {
				c.error(check, err)
				return
			}
			if len(order) > 0 {
				c.Add(check, Info, "", "%s %s: %s", family, hook, describeOrder(order))
			}
			c.reportPredecessors(family, hook, order)
		}
	}
}

// describeOrder lists functions. The order of functions with the same priority is unknown.
func describeOrder(order []nfhooks.Function) string {
	var text strings.Builder
	for i, f := range order {
		switch {
		case i == 0:
		case f.Priority == order[i-1].Priority:
			text.WriteString(" and ")
		default:
			text.WriteString(", then ")
		}
		fmt.Fprintf(&text, "%s (priority %d)", f.Name, f.Priority)
	}
	return text.String()
}

// reportPredecessors reports NAT rules that see new connections before a running Fairlead.
func (c *checker) reportPredecessors(family string, hook nfhooks.Hook, order []nfhooks.Function) {
	if c.holder == nil {
		return
	}
	ours := slices.IndexFunc(order, isFairleadFunction)
	for _, f := range order[:max(0, ours)] {
		if f.Priority < order[ours].Priority {
			c.Add("translation-order", Info, "", "%s %s: %s translates connections before Fairlead, which leaves those connections to it", family, hook, f.Name)
		}
	}
}

func isFairleadFunction(f nfhooks.Function) bool {
	words := strings.Fields(f.Name)
	return len(words) == 4 && isFairlead(words[2])
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
