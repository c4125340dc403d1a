package main

import (
	"context"
	"runtime/debug"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/client-go/features"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/component-base/metrics/prometheus/feature"
	_ "k8s.io/component-base/metrics/prometheus/restclient" // registers client-go's metrics
)

// kubernetesVersion returns the release of Kubernetes whose kube-proxy the program corresponds
// to. Version v0.37.2 of the module k8s.io/kube-proxy belongs to Kubernetes v1.37.2.
func kubernetesVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, module := range info.Deps {
		if module.Path == "k8s.io/kube-proxy" {
			return "v1" + strings.TrimPrefix(module.Version, "v0")
		}
	}
	return ""
}

// processMetrics returns the metrics that kube-proxy has because of the Kubernetes libraries: the
// Go runtime, the process, client-go and feature gates.
func processMetrics(ctx context.Context) prometheus.Gatherer {
	for _, f := range featureGates() {
		feature.RecordFeatureInfo(ctx, f.name, f.stage, f.enabled)
	}
	return legacyregistry.DefaultGatherer
}

// featureGate describes a Kubernetes feature gate.
type featureGate struct {
	name, stage string
	enabled     bool
}

// featureGates returns client-go's gates, and those of kube-proxy's gates whose features the
// program implements, which cannot be turned off.
func featureGates() []featureGate {
	gates := []featureGate{
		{"ComponentFlagz", "BETA", true},
		{"ComponentStatusz", "BETA", true},
		{"KubeProxyIPVS", "DEPRECATED", true},
		{"KubeProxyNFTablesLocalhostNodePorts", "ALPHA", true},
		{"MultiCIDRServiceAllocator", "", true},
		{"NFTablesNetlink", "BETA", true},
		{"NFTablesProxyMode", "", true},
		{"PreferSameTrafficDistribution", "", true},
	}
	// clientGates.Add does not fail.
	_ = features.AddFeaturesToExistingFeatureGates((*clientGates)(&gates))
	return gates
}

// clientGates implements [features.Registry].
type clientGates []featureGate

// Add adds client-go's gates with their current values.
func (c *clientGates) Add(specs map[features.Feature]features.FeatureSpec) error {
	for name, spec := range specs {
		*c = append(*c, featureGate{string(name), string(spec.PreRelease), features.FeatureGates().Enabled(name)})
	}
	return nil
}

// flagValues returns the values of all flags of a command.
func flagValues(cmd *cobra.Command) map[string]string {
	values := map[string]string{}
	cmd.Flags().VisitAll(func(f *pflag.Flag) { values[f.Name] = f.Value.String() })
	return values
}
