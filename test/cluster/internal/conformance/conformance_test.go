package conformance

import (
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const report = `[{"SpecReports": [
  {"ContainerHierarchyTexts": null, "LeafNodeType": "SynchronizedBeforeSuite", "State": "passed"},
  {"ContainerHierarchyTexts": ["[sig-network] Services"], "ContainerHierarchyLabels": [["sig-network"]], "LeafNodeType": "It",
   "LeafNodeText": "should serve [Conformance]", "LeafNodeLabels": ["Conformance"], "State": "passed", "RunTime": 2000000000},
  {"ContainerHierarchyTexts": ["[sig-network] Services"], "ContainerHierarchyLabels": [["sig-network"]], "LeafNodeType": "It",
   "LeafNodeText": "should fail", "State": "timedout", "Failure": {"Message": "timed out", "Location": {"FileName": "service.go", "LineNumber": 7}}},
  {"ContainerHierarchyTexts": ["[sig-network] Services"], "LeafNodeType": "It", "LeafNodeText": "needs GCE", "State": "skipped",
   "Failure": {"Message": "Only supported for providers [gce]"}},
  {"ContainerHierarchyTexts": ["[sig-storage] Volumes"], "LeafNodeType": "It", "LeafNodeText": "not selected", "State": "skipped"}
]}]`

func TestReadReport(t *testing.T) {
	t.Parallel()
	tests, err := ReadReport(strings.NewReader(report))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, test := range tests {
		got = append(got, string(test.Result)+" "+test.Name+" "+test.Time.String()+" "+test.Message)
	}
	want := []string{
		"skipped [sig-network] Services needs GCE 0s Only supported for providers [gce]",
		"FAIL [sig-network] Services should fail 0s timedout: timed out (service.go:7)",
		"pass [sig-network] Services should serve [Conformance] 2s ",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tests (-want +got):\n%s", diff)
	}
	if err := Check(tests); err == nil || err.Error() != "[sig-network] Services should fail: timedout: timed out (service.go:7)" {
		t.Errorf("error %v, want the failed test", err)
	}
}

// TestDocument checks that the results of other proxies, and of other groups of tests, stay when a
// run adds its results.
func TestDocument(t *testing.T) {
	t.Parallel()
	conformance := func(result Result) Test {
		return Test{Name: "[sig-network] A [Conformance]", Labels: []string{"Conformance"}, Result: result}
	}
	nft := Run{Proxy: "Fairlead nft", Version: "v0.1", Kubernetes: "v1.37.2", Kernel: "6.18", Date: "2026-11-30"}
	next := nft
	next.Version = "v0.2"
	oldest := nft
	oldest.Kubernetes = "v1.29.15"
	kubeProxy := Run{Proxy: "kube-proxy", Version: "v1.37.2 nftables", Kubernetes: "v1.37.2", Kernel: "6.18", Date: "2026-12-01"}

	markdown := ""
	for _, step := range []struct {
		run   Run
		tests []Test
	}{
		{nft, []Test{conformance(Passed), {Name: "[sig-network] B a|b", Result: Failed}, {Name: "[sig-network] C", Result: Passed}}},
		{kubeProxy, []Test{conformance(Skipped)}},
		{next, []Test{conformance(Failed)}},
		{oldest, []Test{conformance(Passed)}},
	} {
		d, err := Parse(markdown)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Update(step.run, step.tests); err != nil {
			t.Fatal(err)
		}
		markdown = d.Markdown()
		again, err := Parse(markdown)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(d, again); diff != "" {
			t.Errorf("document read back (-want +got):\n%s", diff)
		}
	}
	const want = `
## [Conformance] tests

| run | Fairlead nft | Fairlead ipvs | kube-proxy |
|---|---|---|---|
| version | v0.2 | – | v1.37.2 nftables |
| Kubernetes | v1.37.2 | – | v1.37.2 |
| kernel | 6.18 | – | 6.18 |
| date | 2026-11-30 | – | 2026-12-01 |
| passed | 0 of 1 | – | 0 of 1 |

| test | Fairlead nft | Fairlead ipvs | kube-proxy |
|---|---|---|---|
| A [Conformance] | FAIL | – | skipped |

## [Conformance] tests of Kubernetes 1.29

| run | Fairlead nft | Fairlead ipvs |
|---|---|---|
| version | v0.1 | – |
| Kubernetes | v1.29.15 | – |
| kernel | 6.18 | – |
| date | 2026-11-30 | – |
| passed | 1 of 1 | – |

| test | Fairlead nft | Fairlead ipvs |
|---|---|---|
| A [Conformance] | pass | – |

## Other tests

| run | Fairlead nft | Fairlead ipvs | kube-proxy |
|---|---|---|---|
| version | v0.1 | – | – |
| Kubernetes | v1.37.2 | – | – |
| kernel | 6.18 | – | – |
| date | 2026-11-30 | – | – |
| passed | 1 of 2 | – | – |

| test | Fairlead nft | Fairlead ipvs | kube-proxy |
|---|---|---|---|
| B a&#124;b | FAIL | – | – |
| C | pass | – | – |
`
	if diff := cmp.Diff(introduction+want, markdown); diff != "" {
		t.Errorf("document (-want +got):\n%s", diff)
	}
	d := newDocument()
	if err := d.Update(Run{Proxy: "other"}, nil); err == nil {
		t.Error("no error for a proxy without a column")
	}
}

// TestFailedTestsRunAgain checks that tests that ran again alone replace only failures of the same run.
func TestFailedTestsRunAgain(t *testing.T) {
	t.Parallel()
	run := Run{Proxy: "Fairlead nft", Version: "v0.1", Kubernetes: "v1.37.2", Kernel: "6.18", Date: "2026-11-30"}
	a := Test{Name: "[sig-network] A [Conformance]", Labels: []string{"Conformance"}, Result: Failed}
	b, c := Test{Name: "[sig-network] B", Result: Failed}, Test{Name: "[sig-network] C", Result: Passed}
	d := newDocument()
	if err := d.Update(run, []Test{a, b, c}); err != nil {
		t.Fatal(err)
	}
	again := func(t Test, result Result) Test { t.Result = result; return t }
	later := run
	later.Date = "2026-12-01"
	if err := d.UpdateFailed(later, []Test{again(a, Passed), again(b, Failed)}); err != nil {
		t.Fatal(err)
	}
	got := []any{d.Conformance[0], d.Other[0], d.Conformance[0].passed(), d.Other[0].passed()}
	want := []any{
		Column{Run: run, Results: map[string]Result{a.Name: PassedAlone}},
		Column{Run: run, Results: map[string]Result{b.Name: Failed, c.Name: Passed}},
		"1 of 1", "1 of 2",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	other := run
	other.Version = "v0.2"
	for name, err := range map[string]error{
		"a passed test":   d.UpdateFailed(run, []Test{again(c, Passed)}),
		"another version": d.UpdateFailed(other, []Test{again(b, Passed)}),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	names := []string{a.Name, "[sig-network] B (a|b)"}
	expression := regexp.MustCompile(Exactly(names))
	for name, want := range map[string]bool{names[0]: true, names[1]: true, "Kubernetes e2e suite " + names[1]: true, names[1] + " more": false, "[sig-network] B": false} {
		if got := expression.MatchString(name); got != want {
			t.Errorf("expression of %q matches %q: %t", names, name, got)
		}
	}
}

func TestExclusions(t *testing.T) {
	t.Parallel()
	for _, sctp := range []bool{false, true} {
		exclusions, err := Exclusions(sctp)
		if err != nil {
			t.Fatal(err)
		}
		const name = "[sig-network] Networking Granular Checks: Services should function for pod-Service: sctp [Feature:SCTPConnectivity]"
		if got := find(exclusions, name) == nil; got != sctp {
			t.Errorf("kernel with SCTP %t: test runs: %t", sctp, got)
		}
	}
	exclusions, err := parseExclusions(`
# comment
1||a\|b|reason
2|no-sctp|c|reason
`)
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckExclusions(exclusions, []string{"b", "c 1", "c 2", "d"}); err != nil {
		t.Error(err)
	}
	err = CheckExclusions(exclusions, []string{"a", "b", "c 1"})
	want := "skipped.txt: a|b: matches 2 tests, the list says 1\nskipped.txt: c: matches 1 tests, the list says 2"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if err := CheckSkipped(exclusions, []Test{{Name: "b", Result: Skipped}, {Name: "d", Result: Passed}}); err != nil {
		t.Error(err)
	}
	if err := CheckSkipped(exclusions, []Test{{Name: "d", Result: Skipped, Message: "no GCE"}}); err == nil {
		t.Error("no error for a test that skipped itself without a reason in the list")
	}
	for _, line := range []string{"x||a|reason", "1|windows|a|reason", "1||a(|reason", "1||a|", "1|a|reason"} {
		if _, err := parseExclusions(line); err == nil {
			t.Errorf("%q: no error", line)
		}
	}
}
