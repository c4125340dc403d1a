package monitoring_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

// expressions lists what the panels of the dashboard Kubernetes/Proxy and the alert KubeProxyDown
// compute, by title.
var expressions = map[string]string{
	"alert KubeProxyDown":       `absent(up{job="kube-proxy"}) or sum by (cluster) (up{job="kube-proxy"}) == 0`,
	"alert KubeVersionMismatch": `count by (cluster) (count by (git_version, cluster) (kubernetes_build_info{job!~"kube-dns|coredns"})) > 1`,
	"Up":                        `sum(up{cluster="$cluster",job="kube-proxy"})`,
	"Rules sync rate":           `sum(rate(kubeproxy_sync_proxy_rules_duration_seconds_count{job="kube-proxy",instance=~"$instance"}[$__rate_interval]))`,
	"Rules sync latency": `histogram_quantile(0.99, rate(kubeproxy_sync_proxy_rules_duration_seconds_bucket{job="kube-proxy",` +
		`instance=~"$instance"}[$__rate_interval]))`,
	"Network programming rate": `sum(rate(kubeproxy_network_programming_duration_seconds_count{job="kube-proxy",instance=~"$instance"}[$__rate_interval]))`,
	"Network programming latency": `histogram_quantile(0.99, sum by (instance, le) (rate(kubeproxy_network_programming_duration_seconds_bucket{` +
		`job="kube-proxy",instance=~"$instance"}[$__rate_interval])))`,
	"Kube API requests 2xx": `sum(rate(rest_client_requests_total{job="kube-proxy",instance=~"$instance",code=~"2.."}[$__rate_interval]))`,
	"Kube API requests 3xx": `sum(rate(rest_client_requests_total{job="kube-proxy",instance=~"$instance",code=~"3.."}[$__rate_interval]))`,
	"Kube API requests 4xx": `sum(rate(rest_client_requests_total{job="kube-proxy",instance=~"$instance",code=~"4.."}[$__rate_interval]))`,
	"Kube API requests 5xx": `sum(rate(rest_client_requests_total{job="kube-proxy",instance=~"$instance",code=~"5.."}[$__rate_interval]))`,
	"POST request latency": `histogram_quantile(0.99, sum by (verb, le) (rate(rest_client_request_duration_seconds_bucket{job="kube-proxy",` +
		`instance=~"$instance",verb="POST"}[$__rate_interval])))`,
	"GET request latency": `histogram_quantile(0.99, sum by (verb, le) (rate(rest_client_request_duration_seconds_bucket{job="kube-proxy",` +
		`instance=~"$instance",verb="GET"}[$__rate_interval])))`,
	"Memory":     `process_resident_memory_bytes{job="kube-proxy",instance=~"$instance"}`,
	"CPU usage":  `rate(process_cpu_seconds_total{job="kube-proxy",instance=~"$instance"}[$__rate_interval])`,
	"Goroutines": `go_goroutines{job="kube-proxy",instance=~"$instance"}`,
}

// noSeries lists the selectors that match no series of a healthy node, neither with kube-proxy nor
// with Fairlead, and why.
var noSeries = map[string]string{
	"Kube API requests 3xx": "the API server does not redirect",
	"Kube API requests 4xx": "no request is denied",
	"Kube API requests 5xx": "no request fails",
	"GET request latency":   "watches have no duration",
}

// scrapeLabels returns the labels that Prometheus adds to each series of a target.
func scrapeLabels() map[string]string {
	return map[string]string{"job": "kube-proxy", "instance": "192.0.2.1:10249", "cluster": "c1"}
}

// series returns the label sets of all series in a scrape.
func series(families map[string]*dto.MetricFamily) []map[string]string {
	var all []map[string]string
	for name, f := range families {
		for _, m := range f.GetMetric() {
			base := scrapeLabels()
			for _, l := range m.GetLabel() {
				base[l.GetName()] = l.GetValue()
			}
			add := func(suffix string, more ...string) {
				s := map[string]string{labels.MetricName: name + suffix}
				for k, v := range base {
					s[k] = v
				}
				for i := 0; i < len(more); i += 2 {
					s[more[i]] = more[i+1]
				}
				all = append(all, s)
			}
			if h := m.GetHistogram(); h != nil {
				add("_sum")
				add("_count")
				for _, b := range h.GetBucket() {
					add("_bucket", "le", fmt.Sprint(b.GetUpperBound()))
				}
				continue
			}
			add("")
		}
	}
	up := scrapeLabels()
	up[labels.MetricName] = "up" // Prometheus adds it
	return append(all, up)
}

// TestDashboard parses each expression and checks that the scrape has series for each selector,
// with all labels that the expression groups by.
func TestDashboard(t *testing.T) {
	programs := map[string]*proxy{"kube-proxy": kubeProxy(t), "fairlead": fairlead(t)}
	for name, p := range programs {
		p.awaitProgrammed()
		// The Event about the start is a POST request.
		p.eventually(func() error {
			if !strings.Contains(p.get("/metrics"), `verb="POST"`) {
				return fmt.Errorf("%s has not sent a POST request", name)
			}
			return nil
		})
	}
	variables := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*", "$cluster", "c1")
	for name, p := range programs {
		all := series(parseMetrics(t, p.get("/metrics")))
		for title, text := range expressions {
			expression, err := parser.NewParser(parser.Options{}).ParseExpr(variables.Replace(text))
			if err != nil {
				t.Fatalf("%s: %v", title, err)
			}
			grouping := groupings(expression)
			found, selectors := 0, 0
			parser.Inspect(expression, func(node parser.Node, _ []parser.Node) error {
				v, ok := node.(*parser.VectorSelector)
				if !ok {
					return nil
				}
				selectors++
				for _, s := range all {
					if matchesAll(v.LabelMatchers, s) {
						found++
						for _, label := range grouping {
							if _, ok := s[label]; !ok {
								t.Errorf("%s: %s: %v lacks the label %s", name, title, s, label)
							}
						}
						return nil
					}
				}
				// kube-proxy has these series only after the first change of a pod.
				later := name == "kube-proxy" && strings.HasPrefix(title, "Network programming")
				if _, ok := noSeries[title]; !ok && !later {
					t.Errorf("%s: %s: no series for %s", name, title, v)
				}
				return nil
			})
			if _, ok := noSeries[title]; selectors == 0 || ok && found > 0 {
				t.Errorf("%s: %s: %d of %d selectors have series: delete it from noSeries", name, title, found, selectors)
			}
		}
	}
}

// groupings returns the labels that the expression's aggregations keep.
func groupings(expression parser.Expr) []string {
	var all []string
	parser.Inspect(expression, func(node parser.Node, _ []parser.Node) error {
		if a, ok := node.(*parser.AggregateExpr); ok && !a.Without {
			for _, label := range a.Grouping {
				if !slices.Contains(all, label) {
					all = append(all, label)
				}
			}
		}
		return nil
	})
	return all
}

func matchesAll(matchers []*labels.Matcher, series map[string]string) bool {
	return !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(series[m.Name]) })
}
