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

// availableSystems returns the systems that can be compared.
func (f *compareFlags) availableSystems() []system.System {
	var all []system.System
	for _, m := range []string{"nft", "ipvs"} {
		all = append(all, system.Fairlead{Binary: f.fairlead, Mode: m, Args: f.fairleadArgs})
	}
	for _, m := range []string{"nftables", "ipvs", "iptables"} {
		all = append(all, system.KubeProxy{Binary: f.kubeProxy, Mode: m, Args: f.kubeProxyArgs})
	}
	return all
}

func compareCommand() *cobra.Command {
	f := &compareFlags{options: compare.DefaultOptions(), fairlead: "bin/fairlead", kubeProxy: ".cache/kube-proxy/kube-proxy"}
	cmd := &cobra.Command{
		Use:   "compare",
		Short: "Measure Fairlead and kube-proxy against each other",
		Long: `Measure Fairlead's modes and kube-proxy's against each other on this machine, each
in network namespaces of its own and fed by an API server of its own, in turns.
What is measured is seen by packets and in /proc. Needs root, and for kube-proxy
the programs that it runs: nft, or iptables and ipset.

A system that this machine's kernel cannot run runs in a virtual machine, if there is
one (make vm), with Fairlead's mode nft and kube-proxy's mode nftables beside it. Its
figures are marked as emulated, and ratios are only taken within it. A system that
does not run at all is left out, and the result says why.`,
		Example: `  fairlead-bench compare --json=result.json
  fairlead-bench compare --systems=nft,kube-proxy-nftables --services=1000,10000 --samples=50
  fairlead-bench compare --only=churn --rates=1000`,
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
	flags.StringSliceVar(&f.systems, "systems", names, "what to compare")
	flags.StringVar(&f.fairlead, "fairlead", f.fairlead, "path of Fairlead's binary; `make build` builds it")
	flags.StringVar(&f.kubeProxy, "kube-proxy", f.kubeProxy, "path of kube-proxy's binary; `make kube-proxy` builds it")
	flags.StringSliceVar(&f.kubeProxyArgs, "kube-proxy-args", nil, "further arguments for kube-proxy, such as --nftables-min-sync-period=0s")
	flags.StringSliceVar(&f.fairleadArgs, "fairlead-args", nil, "further arguments for fairlead run")
	flags.IntSliceVar(&o.Services, "services", o.Services, "numbers of Services to measure with, one after the other")
	flags.IntVar(&o.Endpoints, "endpoints", o.Endpoints, "endpoints of each Service")
	flags.IntVar(&o.Samples, "samples", o.Samples, "how often each kind of change is measured")
	flags.IntVar(&o.Starts, "starts", o.Starts, "how many cold starts of each system are measured")
	flags.DurationVar(&o.StartLimit, "start-limit", o.StartLimit, "how long a cold start may take; who takes longer is left out from that number of Services on")
	flags.Float64SliceVar(&o.Rates, "rates", o.Rates, "changes a second, for churn")
	flags.DurationVar(&o.Duration, "churn-time", o.Duration, "how long each round of churn lasts")
	flags.IntVar(&o.Rounds, "rounds", o.Rounds, "rounds of churn of each system")
	flags.DurationVar(&o.SettleTime, "settle", o.SettleTime, "time that a system has after a change until the next is measured")
	flags.StringSliceVar(&f.only, "only", parts, "parts of the comparison")
	flags.StringVar(&o.ControlPlane, "apiserver", "", "folder with etcd and kube-apiserver, to start for each system, such as .cache/controlplane of make controlplane; without, API servers are in this process")
	flags.StringVar(&f.json, "json", "", "file to write the result to, as JSON; - is standard output")
	flags.StringVar(&f.html, "html", "", "file to write a page with charts to")
	flags.StringVar(&f.svg, "svg", "", "folder to write the charts to, as SVG and PNG")
	flags.StringVar(&f.dir, "logs", "", "folder for the systems' logs, which is kept; without, they go")
	flags.StringVar(&f.environment, "environment", "", "name for where this is in the result (default native, or such as vm-6.12 where the processor is emulated)")
	flags.BoolVar(&f.quiet, "quiet", false, "do not tell what is going on")
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
		return errors.New("fairlead-bench compare makes network namespaces, which needs root")
	}
	o := f.options
	for _, name := range f.systems {
		all := f.availableSystems()
		i := slices.IndexFunc(all, func(s system.System) bool { return s.Name() == name })
		if i < 0 {
			return fmt.Errorf("--systems: there is no %q", name)
		}
		if fairlead, ok := all[i].(system.Fairlead); ok {
			if _, err := fairlead.Path(); err != nil {
				return fmt.Errorf("--fairlead: %w: build it with `make build`", err)
			}
		}
		o.Systems = append(o.Systems, all[i])
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
			return fmt.Errorf("make a folder for logs: %w", err)
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

// write writes the result where that was asked for, and as a table.
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
