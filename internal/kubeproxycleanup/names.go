package kubeproxycleanup

import (
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
)

// isKubeProxyChain reports whether kube-proxy creates a chain with this name, in its mode iptables
// or ipvs. Other programs also use the prefix KUBE-: kubelet (KUBE-FIREWALL,
// KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT) and the network policies of kube-router (KUBE-ROUTER-,
// KUBE-POD-FW-, KUBE-NWPLCY-), which k3s and k0s include.
//
// kube-proxy's mode iptables shares KUBE-FIREWALL with kubelet, which creates it again.
func isKubeProxyChain(name string) bool {
	rest, ok := strings.CutPrefix(name, "KUBE-")
	if !ok {
		return false
	}
	switch rest {
	case "SERVICES", "EXTERNAL-SERVICES", "NODEPORTS", "POSTROUTING", "MARK-MASQ", "MARK-DROP", "FORWARD", "PROXY-FIREWALL", "PROXY-CANARY", // iptables
		"SOURCE-RANGES-FIREWALL", "NODE-PORT", "LOAD-BALANCER", "IPVS-FILTER", "IPVS-OUT-FILTER": // ipvs
		return true
	}
	return slices.ContainsFunc([]string{"SVC-", "SVL-", "FW-", "EXT-", "XLB-", "SEP-"}, func(prefix string) bool { return strings.HasPrefix(rest, prefix) })
}

// iptablesTables returns the tables in which kube-proxy creates chains.
func iptablesTables() []string { return []string{"mangle", "nat", "filter"} }

// nodePortSets returns the sets with the node ports of a protocol in kube-proxy's mode ipvs. SCTP
// node ports are not included, because their set contains addresses, too.
func nodePortSets() map[string]dataplane.Protocol {
	return map[string]dataplane.Protocol{
		"KUBE-NODE-PORT-TCP": dataplane.TCP, "KUBE-6-NODE-PORT-TCP": dataplane.TCP,
		"KUBE-NODE-PORT-UDP": dataplane.UDP, "KUBE-6-NODE-PORT-UDP": dataplane.UDP,
	}
}

// ipSets returns the names of kube-proxy's sets (pkg/proxy/ipvs/ipset.go in Kubernetes 1.37), which
// truncates the names of IPv6 sets.
func ipSets() []string {
	const maxName = 31 // IPSET_MAXNAMELEN - 1
	var names []string
	for _, name := range []string{
		"LOOP-BACK", "CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL", "LOAD-BALANCER", "LOAD-BALANCER-LOCAL", "LOAD-BALANCER-FW",
		"LOAD-BALANCER-SOURCE-IP", "LOAD-BALANCER-SOURCE-CIDR", "NODE-PORT-TCP", "NODE-PORT-LOCAL-TCP", "NODE-PORT-UDP", "NODE-PORT-LOCAL-UDP",
		"NODE-PORT-SCTP-HASH", "NODE-PORT-LOCAL-SCTP-HASH", "HEALTH-CHECK-NODE-PORT", "IPVS-IPS",
	} {
		ipv6 := "KUBE-6-" + name
		names = append(names, "KUBE-"+name, ipv6[:min(len(ipv6), maxName)])
	}
	return names
}
