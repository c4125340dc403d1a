// Package conformance evaluates runs of Kubernetes' end-to-end tests of sig-network: it reads
// Ginkgo's report, checks which tests did not run, and keeps the results of all proxies in a
// Markdown document.
package conformance

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Result is the result of a test.
type Result string

// Results. A test that is not part of a run has no result.
const (
	Passed  Result = "pass"
	Failed  Result = "FAIL"
	Skipped Result = "skipped"
	// PassedAlone is the result of a test that failed in the run and passed when it ran again,
	// while no other test ran.
	PassedAlone Result = "pass alone"
)

// Test is a test with its result.
type Test struct {
	// Name has the names of the test and of its containers, as Ginkgo matches them.
	Name string
	// Labels are the labels of the test and its containers.
	Labels []string
	Result Result
	// Message is the reason of a failure, or of a test that skipped itself.
	Message string
	Time    time.Duration
}

// Conformance reports whether clusters must pass the test to be called Kubernetes.
func (t Test) Conformance() bool { return slices.Contains(t.Labels, "Conformance") }

// spec is the part of types.SpecReport of Ginkgo that Tests needs.
type spec struct {
	ContainerHierarchyTexts  []string
	ContainerHierarchyLabels [][]string
	LeafNodeType             string
	LeafNodeText             string
	LeafNodeLabels           []string
	State                    string
	RunTime                  time.Duration
	NumAttempts              int
	Failure                  struct {
		Message  string
		Location struct {
			FileName   string
			LineNumber int
		}
	}
}

// ReadReport reads the tests in a JSON report of Ginkgo that a run selected. They include tests
// that skipped themselves.
func ReadReport(r io.Reader) ([]Test, error) {
	var suites []struct{ SpecReports []spec }
	if err := json.NewDecoder(r).Decode(&suites); err != nil {
		return nil, fmt.Errorf("read Ginkgo's report: %w", err)
	}
	var tests []Test
	for _, suite := range suites {
		for _, s := range suite.SpecReports {
			if t, ok := s.test(); ok {
				tests = append(tests, t)
			}
		}
	}
	slices.SortFunc(tests, func(a, b Test) int { return strings.Compare(a.Name, b.Name) })
	return tests, nil
}

// test returns the test, unless the run did not select it or it is not a test.
func (s spec) test() (Test, bool) {
	t := Test{Name: strings.Join(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), " "), Time: s.RunTime, Message: s.Failure.Message}
	for _, labels := range append(slices.Clone(s.ContainerHierarchyLabels), s.LeafNodeLabels) {
		t.Labels = append(t.Labels, labels...)
	}
	switch s.State {
	case "passed":
		t.Result = Passed
	case "skipped", "pending":
		// A test that the filters exclude has no message.
		t.Result = Skipped
		if t.Message == "" {
			return Test{}, false
		}
	default: // failed, panicked, interrupted, aborted, timedout
		t.Result = Failed
		t.Message = fmt.Sprintf("%s: %s (%s:%d)", s.State, t.Message, s.Failure.Location.FileName, s.Failure.Location.LineNumber)
	}
	return t, s.LeafNodeType == "It"
}

// Count returns the number of tests with a result.
func Count(tests []Test, result Result) int {
	n := 0
	for _, t := range tests {
		if t.Result == result {
			n++
		}
	}
	return n
}
