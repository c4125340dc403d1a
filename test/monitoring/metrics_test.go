package monitoring_test

import (
	"maps"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// parseMetrics parses a scrape.
func parseMetrics(t *testing.T, text string) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// allowedBuckets lists histograms with different buckets, and why.
var allowedBuckets = map[string]string{
	"go_gc_heap_allocs_by_size_bytes": "the Go release defines them",
	"go_gc_heap_frees_by_size_bytes":  "the Go release defines them",
}

func allowed(name string, list map[string]string) bool {
	for pattern := range list {
		if prefix, ok := strings.CutSuffix(pattern, "*"); pattern == name || ok && strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// labelNames returns the label names of a family, which must be the same in all its metrics.
func labelNames(t *testing.T, f *dto.MetricFamily) string {
	t.Helper()
	var all []string
	for _, m := range f.GetMetric() {
		var names []string
		for _, l := range m.GetLabel() {
			names = append(names, l.GetName())
		}
		slices.Sort(names)
		if text := strings.Join(names, ","); !slices.Contains(all, text) {
			all = append(all, text)
		}
	}
	if len(all) != 1 {
		t.Errorf("%s has metrics with the labels %q", f.GetName(), all)
	}
	return strings.Join(all, " or ")
}

// buckets returns the upper bounds of a histogram.
func buckets(f *dto.MetricFamily) []float64 {
	var bounds []float64
	for _, b := range f.GetMetric()[0].GetHistogram().GetBucket() {
		bounds = append(bounds, b.GetUpperBound())
	}
	return bounds
}

// TestMetrics compares the names, types, labels and buckets of Fairlead's metrics with the real
// kube-proxy's. docs/compatibility.md names the metrics that Fairlead lacks.
func TestMetrics(t *testing.T) {
	// These ports have no effect, because the default addresses have ports.
	ports := []string{"--healthz-port=9998", "--metrics-port=9999"}
	kube, fair := kubeProxy(t, ports...), fairlead(t, ports...)
	kube.awaitProgrammed()
	fair.awaitProgrammed()
	for _, p := range []*proxy{kube, fair} {
		p.get("/healthz") // a health check for /metrics/slis
	}
	answers := documented(t, "Metrics")
	for _, path := range []string{"/metrics", "/metrics/slis"} {
		want, got := parseMetrics(t, kube.get(path)), parseMetrics(t, fair.get(path))
		for _, name := range slices.Sorted(maps.Keys(want)) {
			w, g := want[name], got[name]
			_, answer := row(answers, name)
			switch {
			case g == nil && strings.HasPrefix(answer, "none"):
			case g == nil:
				t.Errorf("%s: Fairlead lacks %s{%s}, a %s: %s", path, name, labelNames(t, w), w.GetType(), w.GetHelp())
			case w.GetType() != g.GetType():
				t.Errorf("%s: %s is a %s, want a %s", path, name, g.GetType(), w.GetType())
			case labelNames(t, w) != labelNames(t, g):
				t.Errorf("%s: %s has the labels %q, want %q", path, name, labelNames(t, g), labelNames(t, w))
			case !slices.Equal(buckets(w), buckets(g)) && !allowed(name, allowedBuckets):
				t.Errorf("%s: %s has the buckets %v, want %v", path, name, buckets(g), buckets(w))
			}
		}
		for name := range got {
			own := strings.HasPrefix(name, "fairlead_") || strings.HasPrefix(name, "promhttp_")
			if want[name] == nil && !own && !allowed(name, additionalMetrics) {
				t.Errorf("%s: kube-proxy does not have %s", path, name)
			}
		}
		if path == "/metrics" {
			compareFeatures(t, want["kubernetes_feature_enabled"], got["kubernetes_feature_enabled"])
			compareBuildInfo(t, want["kubernetes_build_info"], got["kubernetes_build_info"])
		}
	}
}

// additionalMetrics lists metrics that Fairlead always has and kube-proxy only after an event.
var additionalMetrics = map[string]string{
	"kubeproxy_*": "zero values from the start",
}

// compareFeatures checks that Fairlead's feature gates have kube-proxy's names, stages and values.
func compareFeatures(t *testing.T, want, got *dto.MetricFamily) {
	t.Helper()
	// Fairlead serves node ports on localhost if --nodeport-addresses says so, without a gate.
	different := []string{"KubeProxyNFTablesLocalhostNodePorts"}
	values := func(f *dto.MetricFamily) map[string]float64 {
		v := map[string]float64{}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			v[labels["name"]+" "+labels["stage"]] = m.GetGauge().GetValue()
		}
		return v
	}
	wanted := values(want)
	for gate, value := range values(got) {
		name, _, _ := strings.Cut(gate, " ")
		if w, ok := wanted[gate]; !ok || w != value && !slices.Contains(different, name) {
			t.Errorf("feature gate %s: value %v, kube-proxy has %v (exists: %v)", gate, value, w, ok)
		}
	}
}

// compareBuildInfo checks that Fairlead reports kube-proxy's release.
func compareBuildInfo(t *testing.T, want, got *dto.MetricFamily) {
	t.Helper()
	value := func(f *dto.MetricFamily, name string) string {
		for _, l := range f.GetMetric()[0].GetLabel() {
			if l.GetName() == name {
				return l.GetValue()
			}
		}
		return ""
	}
	for _, name := range []string{"git_version", "major", "minor", "platform", "compiler"} {
		if g, w := value(got, name), value(want, name); g != w {
			t.Errorf("kubernetes_build_info: %s=%q, want %q", name, g, w)
		}
	}
}
