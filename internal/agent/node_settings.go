package agent

import (
	"slices"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nodesettings"
)

// podNetworks returns the networks and the bridge of the node's pods.
func podNetworks(n dataplane.Node) nodesettings.PodNetwork {
	return nodesettings.PodNetwork{CIDRs: slices.Concat(n.PodCIDRs, n.LocalPodCIDRs), Bridge: n.PodInterface}
}

// countSettingProblems counts the problems of each kind for metrics, including kinds without
// problems.
func countSettingProblems(problems []nodesettings.Problem) map[string]int {
	counts := map[string]int{}
	for _, kind := range nodesettings.Kinds() {
		counts[string(kind)] = 0
	}
	for _, p := range problems {
		counts[string(p.Kind)]++
	}
	return counts
}
