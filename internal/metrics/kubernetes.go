package metrics

import (
	"runtime"
	"strings"
)

// addKubernetes adds the metrics that all components of Kubernetes have.
//
// git_version is the release of kube-proxy that Fairlead corresponds to, because rules like
// KubeVersionMismatch compare it with the other components of the cluster. fairlead_build_info has
// Fairlead's own version.
func (m *Metrics) addKubernetes() {
	major, minor, _ := strings.Cut(strings.TrimPrefix(m.options.KubernetesVersion, "v"), ".")
	minor, _, _ = strings.Cut(minor, ".")
	m.gauges("kubernetes", "build_info", "Always 1. The labels identify the release of kube-proxy that Fairlead corresponds to.",
		"major", "minor", "git_version", "git_commit", "git_tree_state", "build_date", "go_version", "compiler", "platform").
		WithLabelValues(major, minor, m.options.KubernetesVersion, "", "", "",
			runtime.Version(), runtime.Compiler, runtime.GOOS+"/"+runtime.GOARCH).Set(1)
}
