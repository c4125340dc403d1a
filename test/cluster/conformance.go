package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/test/cluster/internal/conformance"
	"fairlead.io/fairlead/test/cluster/internal/lab"
	"fairlead.io/fairlead/test/cluster/internal/topology"
	"fairlead.io/fairlead/test/controlplane"
)

type conformanceOptions struct {
	*startOptions

	full     bool
	focus    string
	failed   bool
	procs    int
	version  string
	document string
	results  string
	keep     bool
}

// fullValues are the values of the chart for the tests that need more than the defaults: tests of
// node ports on loopback addresses, and a test that finds the proxy's pods by kube-proxy's label.
const fullValues = `
config: {nodePortAddresses: [primary, localhost], metricsBindAddress: "0.0.0.0:10249"}
podLabels: {k8s-app: kube-proxy}
`

func addConformanceFlags(flags *flag.FlagSet) *conformanceOptions {
	o := &conformanceOptions{startOptions: addStartFlags(flags)}
	flags.BoolVar(&o.full, "full", false, "run all tests of sig-network that can run on one machine")
	flags.StringVar(&o.focus, "focus", "", "`regular expression` of the tests to run; the results are not recorded")
	flags.BoolVar(&o.failed, "failed", false, "run only the tests that failed in the last run, one at a time, and add their results to that run's")
	flags.IntVar(&o.procs, "procs", 6, "`number` of tests that run at the same time")
	flags.StringVar(&o.version, "version", "unknown", "`version` of Fairlead")
	flags.StringVar(&o.document, "document", "docs/conformance.md", "`file` to record the results in; empty does not record")
	flags.StringVar(&o.results, "results", "bin/conformance", "`directory` for the reports and the logs of the tests")
	flags.BoolVar(&o.keep, "keep", false, "keep the cluster running at the end")
	return o
}

// runConformance starts a cluster, runs the tests, records the results and ends the cluster.
func runConformance(ctx context.Context, state string, o *conformanceOptions) (err error) {
	if o.full && o.kubernetes != "" {
		return fmt.Errorf("full: skipped.txt lists tests of the newest Kubernetes, not of %s", o.kubernetes)
	}
	l, err := lab.Open(state)
	if err != nil {
		return err
	}
	if o.full && o.cluster.Values == "" && o.cluster.Proxy == topology.Fairlead {
		o.cluster.Values = fullValues
	}
	cluster, err := o.prepare(ctx)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.results, 0o755); err != nil {
		return err
	}
	if o.results, err = resolve(o.results); err != nil {
		return err
	}
	if err := l.Start(ctx, cluster, os.Stderr); err != nil {
		return err
	}
	if !o.keep {
		defer func() { err = errors.Join(err, l.Stop()) }()
	}
	return o.test(ctx, l, cluster)
}

// test runs the tests in a running cluster.
func (o *conformanceOptions) test(ctx context.Context, l *lab.Lab, cluster *topology.Cluster) error {
	exclusions, err := conformance.Exclusions(kernelHasSCTP())
	if err != nil {
		return err
	}
	if o.kubernetes != "" {
		exclusions = nil // see runConformance
	}
	suite := &conformance.Suite{Lab: l, Cluster: cluster, Directory: o.results, Processes: o.procs, Focus: o.focus}
	failed, err := o.failedTests(suite)
	if err != nil {
		return err
	}
	// A new version of Kubernetes may have new tests that an exclusion matches.
	names, err := suite.List(ctx)
	if err != nil {
		return err
	}
	if err := conformance.CheckExclusions(exclusions, names); err != nil {
		return err
	}
	switch {
	case o.failed:
		suite.Focus, suite.Processes = conformance.Exactly(failed), 1
	case o.full:
		suite.Exclusions = exclusions
	case o.focus == "":
		suite.Labels = "Conformance"
	}
	began := time.Now()
	tests, err := suite.Run(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("%d passed, %d failed, %d skipped themselves, after %s; see %s\n", conformance.Count(tests, conformance.Passed),
		conformance.Count(tests, conformance.Failed), conformance.Count(tests, conformance.Skipped), time.Since(began).Round(time.Second), o.results)
	errs := []error{conformance.Check(tests)}
	switch {
	case o.failed:
		errs = append(errs, o.record(ctx, cluster, tests))
	case o.focus == "":
		errs = append(errs, conformance.CheckSkipped(suite.Exclusions, tests), o.record(ctx, cluster, tests))
	}
	return errors.Join(errs...)
}

// failedTests returns the tests to run again, none without the option.
func (o *conformanceOptions) failedTests(suite *conformance.Suite) ([]string, error) {
	if !o.failed {
		return nil, nil
	}
	if o.focus != "" {
		return nil, errors.New("failed: -focus selects tests as well; use one of them")
	}
	names, err := suite.Failed()
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("failed: no test failed in the last run, see %s", o.results)
	}
	return names, err
}

// record replaces the results of the proxy in the document.
func (o *conformanceOptions) record(ctx context.Context, cluster *topology.Cluster, tests []conformance.Test) error {
	if o.document == "" || cluster.Proxy == topology.NoProxy {
		return nil
	}
	text, err := os.ReadFile(o.document)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	document, err := conformance.Parse(string(text))
	if err != nil {
		return fmt.Errorf("%s: %w", o.document, err)
	}
	kubernetes, err := controlplane.Version(ctx, cluster.ControlPlane)
	if err != nil {
		return err
	}
	run := conformance.Run{
		Proxy: "Fairlead " + cluster.Mode, Version: o.version, Kubernetes: kubernetes,
		Kernel: kernelRelease(), Date: time.Now().UTC().Format(time.DateOnly),
	}
	if cluster.Proxy == topology.KubeProxy {
		run.Proxy, run.Version = topology.KubeProxy, kubernetes+" "+cluster.Mode
	}
	update := document.Update
	if o.failed {
		update = document.UpdateFailed
	}
	if err := update(run, tests); err != nil {
		return err
	}
	return os.WriteFile(o.document, []byte(document.Markdown()), 0o644)
}

// kernelRelease returns the release without the distribution's suffix, such as 6.12.48.
func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "unknown"
	}
	release, _, _ := strings.Cut(unix.ByteSliceToString(name.Release[:]), "-")
	return release
}

func kernelHasSCTP() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return false
	}
	return unix.Close(fd) == nil
}
