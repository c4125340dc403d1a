package conformance

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Document contains the results of all proxies. Its Markdown is written for readers, and read
// back when another run adds its results.
type Document struct {
	// Conformance has the [Conformance] tests, and Other all other tests. Oldest has the
	// [Conformance] tests of the oldest release of Kubernetes.
	Conformance, Oldest, Other []Column
}

// Column is the last run of a group of tests with a proxy.
type Column struct {
	Run
	// Results are the results by the name of the test.
	Results map[string]Result
}

// Run describes a run.
type Run struct {
	// Proxy names the proxy and its mode, as in [Proxies].
	Proxy string
	// Version is the version of the proxy, and Kubernetes the one of the cluster and the tests.
	Version, Kubernetes string
	// Kernel is the release of the kernel.
	Kernel string
	// Date has the form 2006-01-02.
	Date string
}

// Proxies returns the columns of a document.
func Proxies() []string { return []string{"Fairlead nft", "Fairlead ipvs", kubeProxy} }

const kubeProxy = "kube-proxy"

// Oldest is the oldest release of Kubernetes that Fairlead supports.
const Oldest = "1.29"

const (
	notRun       = "–"
	introduction = `# Conformance

Kubernetes' end-to-end tests of sig-network, in a real cluster whose only Service proxy is the one in the column. ` + "`make conformance`" + `
writes this page: it starts the cluster on one machine, runs the tests, and replaces the results of that proxy. Fairlead comes
from its Helm chart with the default values. [cluster.md](cluster.md) describes the cluster.

    make conformance                        # the [Conformance] tests
    make conformance PROXY=kube-proxy       # the same tests against kube-proxy
    make conformance MODE=ipvs              # the same tests against Fairlead's mode ipvs; UM=1 if the kernel has no IPVS
    make conformance KUBERNETES=1.29        # the oldest supported Kubernetes: its control plane, nodes and [Conformance] tests
    make conformance FULL=1                 # all tests of sig-network that can run on one machine

` + "`test/cluster/internal/conformance/skipped.txt`" + ` lists the tests that FULL=1 skips, with the reason of each. A run fails if the list is not
complete. FULL=1 also sets ` + "`nodePortAddresses`" + ` and ` + "`podLabels`" + ` in Fairlead's chart, because some tests need them. "–" means that a test was not part of the last run.

"pass alone" means that a test failed while others ran at the same time, for example because the machine was too busy for its time
limits. It passed when it ran again alone: ` + "`make conformance ARGS=-failed`" + `, with the other variables of the run.
`
	conformanceHeading = "## [Conformance] tests"
	oldestHeading      = "## [Conformance] tests of Kubernetes " + Oldest
	otherHeading       = "## Other tests"
	runHeader          = "run"
	testHeader         = "test"
)

// newDocument returns a document without results.
func newDocument() *Document {
	d := &Document{}
	for _, proxy := range Proxies() {
		d.Conformance = append(d.Conformance, Column{Run: Run{Proxy: proxy}, Results: map[string]Result{}})
		d.Other = append(d.Other, Column{Run: Run{Proxy: proxy}, Results: map[string]Result{}})
		if proxy != kubeProxy {
			d.Oldest = append(d.Oldest, Column{Run: Run{Proxy: proxy}, Results: map[string]Result{}})
		}
	}
	return d
}

// Parse reads a document that [Document.Markdown] has written. An empty text is a document without
// results.
func Parse(markdown string) (*Document, error) {
	d := newDocument()
	var columns []Column
	header := ""
	for line := range strings.Lines(markdown) {
		line = strings.TrimSpace(line)
		switch line {
		case conformanceHeading:
			columns = d.Conformance
		case oldestHeading:
			columns = d.Oldest
		case otherHeading:
			columns = d.Other
		}
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|-") {
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		if len(cells) != 1+len(columns) {
			return nil, fmt.Errorf("table row %q: %d columns, want %d", line, len(cells), 1+len(columns))
		}
		for i, cell := range cells {
			cells[i] = strings.TrimSpace(cell)
		}
		if cells[0] == runHeader || cells[0] == testHeader {
			header = cells[0]
			continue
		}
		for i := range columns {
			if err := columns[i].parse(header, cells[0], cells[i+1]); err != nil {
				return nil, fmt.Errorf("table row %q: %w", line, err)
			}
		}
	}
	return d, nil
}

func (c *Column) parse(header, key, value string) error {
	if value == notRun {
		return nil
	}
	if header == testHeader {
		c.Results[unescape(key)] = Result(value)
		return nil
	}
	if key == passedRow {
		return nil // computed
	}
	field, ok := c.fields()[key]
	if !ok {
		return errors.New("unknown row")
	}
	*field = value
	return nil
}

const passedRow = "passed"

// runRows are the rows that describe a run, in order.
func runRows() []string { return []string{"version", "Kubernetes", "kernel", "date"} }

// fields returns the fields of the rows of a run.
func (r *Run) fields() map[string]*string {
	return map[string]*string{"version": &r.Version, "Kubernetes": &r.Kubernetes, "kernel": &r.Kernel, "date": &r.Date}
}

// Update replaces the results of a proxy: those of the [Conformance] tests if the run has any, and
// those of other tests if it has any.
func (d *Document) Update(run Run, tests []Test) error {
	columns, i, err := d.find(run)
	if err != nil {
		return err
	}
	conformance, other := map[string]Result{}, map[string]Result{}
	for _, t := range tests {
		if t.Conformance() {
			conformance[t.Name] = t.Result
		} else {
			other[t.Name] = t.Result
		}
	}
	if len(conformance) > 0 {
		columns[i] = Column{Run: run, Results: conformance}
	}
	if len(other) > 0 {
		d.Other[i] = Column{Run: run, Results: other}
	}
	return nil
}

// find returns the columns of the [Conformance] tests of the run's release of Kubernetes, and the
// index of its proxy.
func (d *Document) find(run Run) (columns []Column, i int, err error) {
	columns = d.Conformance
	if strings.HasPrefix(run.Kubernetes, "v"+Oldest+".") {
		columns = d.Oldest
	}
	i = slices.IndexFunc(columns, func(c Column) bool { return c.Proxy == run.Proxy })
	if i < 0 {
		return nil, 0, fmt.Errorf("no column for %s with Kubernetes %s", run.Proxy, run.Kubernetes)
	}
	return columns, i, nil
}

// UpdateFailed replaces the results of tests that failed in the last run of the same versions, and
// that have run again alone.
func (d *Document) UpdateFailed(run Run, tests []Test) error {
	columns, i, err := d.find(run)
	if err != nil {
		return err
	}
	for _, t := range tests {
		c := d.Other[i]
		if t.Conformance() {
			c = columns[i]
		}
		if c.Results[t.Name] != Failed || c.Version != run.Version || c.Kubernetes != run.Kubernetes {
			return fmt.Errorf("%s: the document has no failure of %s %s with Kubernetes %s", t.Name, run.Proxy, run.Version, run.Kubernetes)
		}
		if t.Result == Passed {
			c.Results[t.Name] = PassedAlone
		}
	}
	return nil
}

// Markdown returns the document.
func (d *Document) Markdown() string {
	var b strings.Builder
	b.WriteString(introduction)
	writeSection(&b, conformanceHeading, d.Conformance)
	writeSection(&b, oldestHeading, d.Oldest)
	writeSection(&b, otherHeading, d.Other)
	return b.String()
}

func writeSection(b *strings.Builder, heading string, columns []Column) {
	names := testNames(columns)
	if len(names) == 0 {
		return
	}
	b.WriteString("\n" + heading + "\n\n")
	writeHeader(b, runHeader, columns)
	for _, name := range runRows() {
		writeRow(b, name, columns, func(c Column) string { return *c.fields()[name] })
	}
	writeRow(b, passedRow, columns, Column.passed)
	b.WriteString("\n")
	writeHeader(b, testHeader, columns)
	for _, name := range names {
		writeRow(b, escape(name), columns, func(c Column) string { return string(c.Results[name]) })
	}
}

func writeHeader(b *strings.Builder, first string, columns []Column) {
	writeRow(b, first, columns, func(c Column) string { return c.Proxy })
	b.WriteString(strings.Repeat("|---", 1+len(columns)) + "|\n")
}

func writeRow(b *strings.Builder, first string, columns []Column, cell func(Column) string) {
	b.WriteString("| " + first + " |")
	for _, c := range columns {
		text := cell(c)
		if text == "" {
			text = notRun
		}
		b.WriteString(" " + text + " |")
	}
	b.WriteString("\n")
}

func (c Column) passed() string {
	if len(c.Results) == 0 {
		return ""
	}
	passed := 0
	for _, r := range c.Results {
		if r == Passed || r == PassedAlone {
			passed++
		}
	}
	return fmt.Sprintf("%d of %d", passed, len(c.Results))
}

// testNames returns the names of all tests, sorted.
func testNames(columns []Column) []string {
	var names []string
	for _, c := range columns {
		for name := range c.Results {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// prefix is common to the names of all tests.
const prefix = "[sig-network] "

const separator = "&#124;" // a | in a table

func escape(name string) string {
	return strings.ReplaceAll(strings.TrimPrefix(name, prefix), "|", separator)
}

func unescape(cell string) string { return prefix + strings.ReplaceAll(cell, separator, "|") }

// ErrNoTests means that a run selected no tests, for example because of a wrong filter.
var ErrNoTests = errors.New("no test ran")

// Check returns an error that lists the failed tests, or ErrNoTests.
func Check(tests []Test) error {
	if Count(tests, Passed)+Count(tests, Failed) == 0 {
		return ErrNoTests
	}
	var errs []error
	for _, t := range tests {
		if t.Result == Failed {
			errs = append(errs, fmt.Errorf("%s: %s", t.Name, t.Message))
		}
	}
	return errors.Join(errs...)
}
