package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/bench"
	"fairlead.io/fairlead/bench/compare"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/bench/table"
)

// compareFlags are the flags of `fairlead-bench compare`.
type compareFlags struct {
	systems       []string
	fairlead      string
	kubeProxy     string
	kubeProxyArgs []string
	fairleadArgs  []string
	batchPeriods  []time.Duration
	only          []string
	json          string
	html, svg     string
	dir           string
	environment   string
	quiet         bool
	vm            vmFlags
	command       []string
	options       compare.Options
}

// availableSystems returns all systems that can be compared.
func (f *compareFlags) availableSystems() []system.System {
	var all []system.System
	for _, m := range bench.Modes() {
		all = append(all, system.Fairlead{Binary: f.fairlead, Mode: m, Args: f.fairleadArgs})
	}
	for _, m := range []string{"nftables", "ipvs", "iptables"} {
		all = append(all, system.KubeProxy{Binary: f.kubeProxy, Mode: m, Args: f.kubeProxyArgs})
	}
	return all
}

// variants returns the system, or a Fairlead system with each of the batch periods.
func (f *compareFlags) variants(s system.System) []system.System {
	fairlead, ok := s.(system.Fairlead)
	if !ok || len(f.batchPeriods) == 0 {
		return []system.System{s}
	}
	var all []system.System
	for _, period := range f.batchPeriods {
		fairlead.BatchPeriod = &period
		all = append(all, fairlead)
	}
	return all
}

func compareCommand() *cobra.Command {
	f := &compareFlags{options: compare.DefaultOptions(), fairlead: "bin/fairlead", kubeProxy: ".cache/kube-proxy/kube-proxy"}
	cmd := &cobra.Command{
		Use:   "compare",
		Short: "Compare Fairlead with kube-proxy",
		Long: `Compare the modes of Fairlead and kube-proxy on this machine. Each system has its own
network namespaces and its own API server, and measurements of the systems alternate.
Effects are measured with packets, and resources with /proc. The command needs root, and
for kube-proxy the programs that kube-proxy runs: nft, or iptables and ipset.

Systems that the kernel of this machine does not support run in a virtual machine
("make vm" builds it), together with Fairlead's mode nft and kube-proxy's mode nftables.
Their results are marked as emulated, and ratios are computed separately. Systems that
cannot run at all are left out, with the reason in the result.`,
		Example: `  fairlead-bench compare --json=result.json
  fairlead-bench compare --systems=nft,kube-proxy-nftables --services=1000,10000 --samples=50
  fairlead-bench compare --only=churn --rates=1000
  fairlead-bench compare --only=churn --systems=nft --batch-periods=0s,8ms,50ms`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.command = append([]string{cmd.CommandPath()}, changedFlags(cmd)...)
			return runCompare(cmd.Context(), f, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	var names []string
	for _, s := range f.availableSystems() {
		names = append(names, s.Name())
	}
	var parts []string
	for _, p := range compare.Parts() {
		parts = append(parts, string(p))
	}
	o := &f.options
	flags := cmd.Flags()
	flags.StringSliceVar(&f.systems, "systems", names, "systems to compare")
	flags.StringVar(&f.fairlead, "fairlead", f.fairlead, "path of the fairlead binary; \"make build\" builds it")
	flags.StringVar(&f.kubeProxy, "kube-proxy", f.kubeProxy, "path of the kube-proxy binary; \"make kube-proxy\" builds it")
	flags.StringSliceVar(&f.kubeProxyArgs, "kube-proxy-args", nil, "additional arguments for kube-proxy, such as --nftables-min-sync-period=0s")
	flags.StringSliceVar(&f.fairleadArgs, "fairlead-args", nil, "additional arguments for fairlead run")
	flags.DurationSliceVar(&f.batchPeriods, "batch-periods", nil, "values of fairlead's --batch-period to compare with each other (default: only its default)")
	flags.IntSliceVar(&o.Services, "services", o.Services, "numbers of Services to measure with")
	flags.IntVar(&o.Endpoints, "endpoints", o.Endpoints, "number of endpoints of each Service")
	flags.IntVar(&o.Samples, "samples", o.Samples, "number of measurements of each kind of change")
	flags.IntVar(&o.Starts, "starts", o.Starts, "number of cold starts of each system")
	flags.DurationVar(&o.StartLimit, "start-limit", o.StartLimit, "maximum duration of a cold start; slower systems are left out, also with the later numbers of Services")
	flags.Float64SliceVar(&o.Rates, "rates", o.Rates, "rates of churn in changes per second")
	flags.DurationVar(&o.Duration, "churn-time", o.Duration, "duration of each round of churn")
	flags.IntVar(&o.Rounds, "rounds", o.Rounds, "number of rounds of churn for each system")
	flags.DurationVar(&o.SettleTime, "settle", o.SettleTime, "minimum time between two measured changes of a system")
	flags.DurationVar(&o.ProbeInterval, "probe-interval", o.ProbeInterval,
		"minimum time between two packets that show a change; 0 occupies a processor for a short time")
	flags.StringSliceVar(&f.only, "only", parts, "parts of the comparison to run")
	flags.StringVar(&o.ControlPlane, "apiserver", "", "`directory` with etcd and kube-apiserver to start for each system, such as .cache/controlplane of \"make controlplane\" (default: API servers in this process)")
	flags.StringVar(&f.json, "json", "", "`file` for the result as JSON; - writes to standard output")
	flags.StringVar(&f.html, "html", "", "`file` for an HTML page with charts")
	flags.StringVar(&f.svg, "svg", "", "`directory` for the charts as SVG and PNG")
	flags.StringVar(&f.dir, "logs", "", "`directory` for the logs of the systems (default: a temporary directory, removed at the end)")
	flags.StringVar(&f.environment, "environment", "", "name of this environment in the result (default: native, or a name like vm-6.12 if the processor is emulated)")
	flags.BoolVar(&f.quiet, "quiet", false, "do not show progress")
	f.vm.register(flags)
	completeWith(cmd, "systems", names...)
	completeWith(cmd, "only", parts...)
	_ = cmd.MarkFlagFilename("fairlead")
	_ = cmd.MarkFlagFilename("kube-proxy")
	_ = cmd.MarkFlagDirname("apiserver")
	_ = cmd.MarkFlagFilename("json", "json")
	_ = cmd.MarkFlagFilename("html", "html")
	_ = cmd.MarkFlagDirname("svg")
	_ = cmd.MarkFlagDirname("logs")
	return cmd
}

func runCompare(ctx context.Context, f *compareFlags, stdout, stderr io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("fairlead-bench compare creates network namespaces: run it as root")
	}
	o := f.options
	for _, name := range f.systems {
		available := f.availableSystems()
		i := slices.IndexFunc(available, func(s system.System) bool { return s.Name() == name })
		if i < 0 {
			return fmt.Errorf("--systems: unknown system %q", name)
		}
		if fairlead, ok := available[i].(system.Fairlead); ok {
			if _, err := fairlead.Path(); err != nil {
				return fmt.Errorf("--fairlead: %w: build it with `make build`", err)
			}
		}
		o.Systems = append(o.Systems, f.variants(available[i])...)
	}
	for _, p := range f.only {
		o.Parts = append(o.Parts, compare.Part(p))
	}
	o.Environment = result.DetectEnvironment()
	if f.environment != "" {
		o.Environment.Name = f.environment
	}
	o.Dir = f.dir
	if o.Dir == "" {
		if o.Dir, err = os.MkdirTemp("", "fairlead-bench-"); err != nil {
			return fmt.Errorf("create the directory for logs: %w", err)
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.Dir)) }()
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return fmt.Errorf("--logs: %w", err)
	}
	begin := time.Now()
	o.Progress = func(line string) {
		if f.quiet {
			return
		}
		_, _ = fmt.Fprintf(stderr, "%6.1fs %s\n", time.Since(begin).Seconds(), line)
	}
	r, err := f.compareAll(ctx, o)
	if r == nil {
		return err
	}
	r.Command, r.Version = f.command, version
	return errors.Join(err, f.write(r, stdout))
}

// write writes the result to the configured files, and as a table to stdout.
func (f *compareFlags) write(r *result.Report, stdout io.Writer) error {
	if f.json == "-" {
		return errors.Join(r.Write(stdout), writePage(r, f.html), writePictures(r, f.svg))
	}
	err := writeFile(f.json, r.Write)
	if err != nil {
		err = fmt.Errorf("--json: %w", err)
	}
	return errors.Join(err, writePage(r, f.html), writePictures(r, f.svg), table.Write(stdout, r))
}
