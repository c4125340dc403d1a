package agent

import (
	"slices"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nodesettings"
)

// podsOf returns how pods are recognised on a node.
func podsOf(n dataplane.Node) nodesettings.Pods {
	return nodesettings.Pods{CIDRs: slices.Concat(n.PodCIDRs, n.LocalPodCIDRs), Bridge: n.PodInterface}
}

// countSettings counts the problems of each kind, for metrics.
func countSettings(problems []nodesettings.Problem) map[string]int {
	counts := map[string]int{}
	for _, kind := range nodesettings.Kinds() {
		counts[string(kind)] = 0
	}
	for _, p := range problems {
		counts[string(p.Kind)]++
	}
	return counts
}
