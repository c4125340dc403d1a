package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"fairlead.io/fairlead/bench/compare"
	"fairlead.io/fairlead/bench/report"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/internal/nettest"
)

// vmFlags configure the comparison in a virtual machine, of systems that this machine's kernel
// cannot run.
type vmFlags struct {
	command           string
	services, samples int
}

// Limits in a virtual machine, where everything takes longer.
const (
	vmStarts, vmRounds = 3, 3 // the minimum for a ratio
	vmDuration         = 3 * time.Second
	vmStartLimit       = 10 * time.Minute
)

func (v *vmFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&v.command, "vm", "bin/vm run -kernel=6.12",
		"`command` of test/vm for systems that this kernel cannot run; \"make vm\" builds it; if empty, these systems are left out")
	flags.IntVar(&v.services, "vm-services", 200, "number of Services in the virtual machine")
	flags.IntVar(&v.samples, "vm-samples", 5, "number of measurements of each kind of change in the virtual machine")
}

// referenceSystems returns the systems that also run in the virtual machine, as a base for ratios.
func referenceSystems() []string { return []string{system.ModeNFT, "kube-proxy-nftables"} }

// partition divides systems by where they run.
type partition struct {
	native, vm []system.System
	// unsupported lists the systems of vm that this kernel cannot run, with the reasons.
	unsupported []result.LeftOut
}

// partitionSystems checks for each system whether the kernel of this environment can run it.
func partitionSystems(ctx context.Context, systems []system.System, environment string) (_ *partition, err error) {
	node, err := nettest.NewNamespace("")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	d := &partition{}
	for _, s := range systems {
		var checkErr error
		if c, ok := s.(system.Checker); ok {
			checkErr = c.Check(ctx, node)
		}
		unavailable, ok := errors.AsType[*system.UnavailableError](checkErr)
		switch {
		case checkErr != nil && !ok:
			return nil, fmt.Errorf("check whether %s can run here: %w", s.Name(), checkErr)
		case checkErr == nil:
			d.native = append(d.native, s)
			if slices.Contains(referenceSystems(), s.Name()) {
				d.vm = append(d.vm, s)
			}
		case unavailable.KernelLacksSupport:
			d.vm = append(d.vm, s)
			d.unsupported = append(d.unsupported, result.LeftOut{System: s.Name(), Environment: environment, Reason: unavailable.Reason})
		default:
			d.native = append(d.native, s) // compare.Run leaves it out; another kernel would not help
		}
	}
	return d, nil
}

// compareAll compares systems on this machine and, if its kernel does not support every system, in
// a virtual machine. Errors of the virtual machine appear in the report only.
func (f *compareFlags) compareAll(ctx context.Context, o compare.Options) (*result.Report, error) {
	d, err := partitionSystems(ctx, o.Systems, o.Environment.Name)
	if err != nil {
		return nil, err
	}
	if len(d.unsupported) == 0 {
		return compare.Run(ctx, o)
	}
	vm := f.vm.options(o, d.vm)
	if err := vm.Validate(); err != nil {
		return nil, fmt.Errorf("in the virtual machine: %w", err)
	}
	var reports []*result.Report
	if o.Systems = d.native; len(d.native) > 0 {
		var r *result.Report
		if r, err = compare.Run(ctx, o); r == nil {
			return nil, err
		}
		reports = append(reports, r)
	}
	if ctx.Err() == nil {
		vmReport, outcome := f.runInVM(ctx, vm)
		if vmReport != nil {
			reports = append(reports, vmReport)
		}
		for i := range d.unsupported {
			d.unsupported[i].Reason += "; " + outcome
			o.Progress(d.unsupported[i].System + ": " + d.unsupported[i].Reason)
		}
		err = errors.Join(err, context.Cause(ctx))
	}
	if len(reports) == 0 {
		return nil, errors.Join(errors.New("no system can run here"), err)
	}
	all, mergeErr := report.Merge(reports...)
	if mergeErr != nil {
		all, err = reports[0], errors.Join(err, mergeErr)
	}
	all.LeftOut = append(all.LeftOut, d.unsupported...)
	all.TookSeconds = time.Since(all.Time).Seconds()
	return all, err
}

// options returns the options for a comparison of systems in a virtual machine.
func (v *vmFlags) options(o compare.Options, systems []system.System) compare.Options {
	o.Systems, o.Services, o.Samples = systems, []int{v.services}, v.samples
	o.Starts, o.Rounds, o.Duration = min(o.Starts, vmStarts), min(o.Rounds, vmRounds), min(o.Duration, vmDuration)
	o.StartLimit = max(o.StartLimit, vmStartLimit)
	return o
}

// runInVM compares systems in a virtual machine. It returns the report, or nil if nothing was
// measured, and a description of the outcome.
func (f *compareFlags) runInVM(ctx context.Context, o compare.Options) (*result.Report, string) {
	command := f.vm.command
	if command == "" {
		return nil, "--vm is empty, so it does not run in a virtual machine"
	}
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Sprintf("find this program: %v", err)
	}
	args := []string{program, "compare", "--json=-", "--vm="}
	addList := func(flag string, values ...string) {
		var b strings.Builder
		w := csv.NewWriter(&b)
		_ = w.Write(values) // writing to memory does not fail
		w.Flush()
		args = append(args, "--"+flag+"="+strings.TrimSuffix(b.String(), "\n"))
	}
	var names []string
	paths := map[string]string{} // of the systems' programs, by flag
	for _, s := range o.Systems {
		names = append(names, s.Name())
		var flag, path string
		switch s := s.(type) {
		case system.Fairlead:
			flag = "fairlead"
			path, err = s.Path()
		case system.KubeProxy:
			flag = "kube-proxy"
			path, err = s.Path()
		}
		if err != nil {
			return nil, fmt.Sprintf("--%s: %v", flag, err)
		}
		paths[flag] = path
	}
	addList("systems", names...)
	for _, flag := range slices.Sorted(maps.Keys(paths)) {
		args = append(args, "--"+flag+"="+paths[flag])
	}
	if len(f.kubeProxyArgs) > 0 {
		addList("kube-proxy-args", f.kubeProxyArgs...)
	}
	if len(f.fairleadArgs) > 0 {
		addList("fairlead-args", f.fairleadArgs...)
	}
	addList("only", f.only...)
	var rates []string
	for _, r := range o.Rates {
		rates = append(rates, strconv.FormatFloat(r, 'g', -1, 64))
	}
	addList("rates", rates...)
	args = append(
		args,
		fmt.Sprintf("--services=%d", o.Services[0]), fmt.Sprintf("--endpoints=%d", o.Endpoints), fmt.Sprintf("--samples=%d", o.Samples),
		fmt.Sprintf("--starts=%d", o.Starts), fmt.Sprintf("--rounds=%d", o.Rounds), "--churn-time="+o.Duration.String(), "--settle="+o.SettleTime.String(),
		"--start-limit="+o.StartLimit.String(),
	)
	o.Progress(strings.Join(names, ", ") + ": running in an emulated virtual machine, which takes minutes")
	vm := compare.VM{
		Command: command, Program: append([]string{"-with=" + strings.Join(slices.Sorted(maps.Values(paths)), ",")}, args...),
		Progress: func(line string) { o.Progress("vm: " + line) },
	}
	r, err := vm.Run(ctx)
	switch {
	case r == nil:
		return nil, fmt.Sprintf("it does not run in a virtual machine either: %v", err)
	case err != nil:
		return r, fmt.Sprintf("measurements in the virtual machine %s are incomplete: %v", r.Environments[0].Name, err)
	default:
		return r, "it was measured in the virtual machine " + r.Environments[0].Name
	}
}
