package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"fairlead.io/fairlead/test/cluster/internal/lab"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// Suite runs end-to-end tests in a cluster.
type Suite struct {
	Lab     *lab.Lab
	Cluster *topology.Cluster
	// Directory gets Ginkgo's report and the output of the tests.
	Directory string
	// Processes is the number of tests that run at the same time. Serial tests run alone.
	Processes int
	// Focus is a regular expression of names. Empty means all tests of sig-network.
	Focus string
	// Labels is a label filter of Ginkgo; empty selects all.
	Labels string
	// Exclusions are the tests not to run.
	Exclusions []Exclusion
}

// Names of files in the directory.
const (
	reportFile = "report.json"
	listFile   = "list.json"
	outputFile = "output.log"
)

// all matches all tests of sig-network.
const all = `\[sig-network\]`

func (s *Suite) focus() string {
	if s.Focus != "" {
		return s.Focus
	}
	return all
}

func (s *Suite) program(name string) string { return filepath.Join(s.Cluster.Programs, name) }

// List returns the names of all tests of sig-network in the program.
func (s *Suite) List(ctx context.Context) ([]string, error) {
	path := filepath.Join(s.Directory, listFile)
	cmd := exec.CommandContext(ctx, s.program("e2e.test"), "--ginkgo.dry-run", "--ginkgo.json-report="+path, "--ginkgo.focus="+all,
		"--provider=skeleton", "--kubeconfig=/nonexistent") //nolint:gosec // our own program
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("list the tests: %w\n%s", err, out)
	}
	tests, err := readReportFile(path)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(tests))
	for _, t := range tests {
		names = append(names, t.Name)
	}
	return names, nil
}

// Run runs the tests and returns the results. Failed tests are not an error.
func (s *Suite) Run(ctx context.Context) ([]Test, error) {
	report := filepath.Join(s.Directory, reportFile)
	if err := os.Remove(report); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	cmd, err := s.Lab.Command(ctx, "", s.arguments()...)
	if err != nil {
		return nil, err
	}
	output, err := os.Create(filepath.Join(s.Directory, outputFile))
	if err != nil {
		return nil, err
	}
	defer output.Close() //nolint:errcheck // the command has its own descriptor
	cmd.Stdout, cmd.Stderr = output, output
	runErr := cmd.Run()
	if exit := (*exec.ExitError)(nil); runErr != nil && !errors.As(runErr, &exit) {
		return nil, runErr
	}
	tests, err := readReportFile(report)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("see %s", output.Name()), runErr, err)
	}
	return tests, nil
}

func (s *Suite) arguments() []string {
	args := []string{
		s.program("ginkgo"), "--procs=" + strconv.Itoa(s.Processes), "--no-color", "--timeout=3h", "--poll-progress-after=0",
		"--json-report=" + reportFile, "--output-dir=" + s.Directory, "--focus=" + s.focus(),
	}
	if s.Labels != "" {
		args = append(args, "--label-filter="+s.Labels)
	}
	for _, e := range s.Exclusions {
		args = append(args, "--skip="+e.Pattern.String())
	}
	return append(args, s.program("e2e.test"), "--",
		"--kubeconfig="+s.Lab.Kubeconfig(), "--kubectl-path="+s.program("kubectl"), "--provider=skeleton",
		"--num-nodes="+strconv.Itoa(s.Cluster.Nodes), "--report-dir="+s.Directory, "--disable-log-dump")
}

// Failed returns the names of the tests that failed in the last run.
func (s *Suite) Failed() ([]string, error) {
	tests, err := readReportFile(filepath.Join(s.Directory, reportFile))
	if err != nil {
		return nil, fmt.Errorf("read the results of the last run: %w", err)
	}
	var names []string
	for _, t := range tests {
		if t.Result == Failed {
			names = append(names, t.Name)
		}
	}
	return names, nil
}

// Exactly returns a regular expression that matches only these names of tests. Ginkgo matches the
// name of the suite before them as well.
func Exactly(names []string) string {
	quoted := make([]string, 0, len(names))
	for _, name := range names {
		quoted = append(quoted, regexp.QuoteMeta(name))
	}
	return "(^| )(" + strings.Join(quoted, "|") + ")$"
}

func readReportFile(path string) ([]Test, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read-only
	return ReadReport(f)
}
