package monitoring_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"go.yaml.in/yaml/v2"
)

const (
	chartDir       = repository + "/deploy/chart/fairlead"
	operationsPage = repository + "/docs/operations.md"
	runbookPrefix  = "https://fairlead.io/docs/operations.md#"
)

// readOwnExpressions returns the expressions of Fairlead's alerts and of its dashboard, by title.
// It checks that each alert has annotations and a section in docs/operations.md.
func readOwnExpressions(t *testing.T) map[string]string {
	t.Helper()
	read := func(file string) []byte {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.UnmarshalStrict(read(filepath.Join(chartDir, "rules", "fairlead.yaml")), &rules); err != nil {
		t.Fatal(err)
	}
	page := string(read(operationsPage))
	all := map[string]string{}
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			title := "alert " + rule.Alert
			if all[title] != "" {
				t.Errorf("two alerts have the name %s", rule.Alert)
			}
			all[title] = rule.Expr
			if rule.Annotations["summary"] == "" || rule.Annotations["description"] == "" || rule.Labels["severity"] == "" {
				t.Errorf("%s: labels %v, annotations %v; want a severity, a summary and a description", title, rule.Labels, rule.Annotations)
			}
			if got, want := rule.Annotations["runbook_url"], runbookPrefix+strings.ToLower(rule.Alert); got != want {
				t.Errorf("%s: runbook %s, want %s", title, got, want)
			}
			if !strings.Contains(page, "\n### "+rule.Alert+"\n") {
				t.Errorf("%s has no section in docs/operations.md", title)
			}
		}
	}
	for line := range strings.Lines(page) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "### Fairlead"); ok && all["alert Fairlead"+name] == "" {
			t.Errorf("docs/operations.md describes the alert Fairlead%s, which does not exist", name)
		}
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(read(filepath.Join(chartDir, "dashboards", "fairlead.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			all["panel "+panel.Title+": "+target.Expr] = target.Expr
		}
	}
	return all
}

// TestOwnAlertsAndDashboard parses each expression of Fairlead's alerts and dashboard, and checks
// that a scrape has series for each selector.
func TestOwnAlertsAndDashboard(t *testing.T) {
	expressions := readOwnExpressions(t)
	p := fairlead(t, "--service-metrics=default/*", "--flow-offload=software")
	p.awaitProgrammed()
	// The counter of drift begins with the first repair.
	if err := p.net.Node.Do(func() error { return exec.Command("nft", "delete", "table", "ip", "fairlead").Run() }); err != nil {
		t.Fatal(err)
	}
	p.eventually(func() error {
		if !strings.Contains(p.get("/metrics"), `reason="drift"`) {
			return errors.New("the deleted table is not repaired")
		}
		return nil
	})
	all := series(parseMetrics(t, p.get("/metrics")))
	variables := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*", "$job", ".*")
	for title, text := range expressions {
		expression, err := parser.NewParser(parser.Options{}).ParseExpr(variables.Replace(text))
		if err != nil {
			t.Errorf("%s: %v", title, err)
			continue
		}
		grouping := groupings(expression)
		parser.Inspect(expression, func(node parser.Node, _ []parser.Node) error {
			v, ok := node.(*parser.VectorSelector)
			if !ok {
				return nil
			}
			found := matching(v.LabelMatchers, all)
			if found == nil {
				t.Errorf("%s: no series for %s", title, v)
				return nil
			}
			for _, label := range grouping {
				if _, ok := found[label]; !ok {
					t.Errorf("%s: %v lacks the label %s", title, found, label)
				}
			}
			return nil
		})
	}
}

// matching returns the first of the label sets that all matchers match, or nil.
func matching(matchers []*labels.Matcher, all []map[string]string) map[string]string {
	for _, s := range all {
		if matchesAll(matchers, s) {
			return s
		}
	}
	return nil
}
