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

// vmFlags say how systems are compared that this machine's kernel cannot run.
type vmFlags struct {
	command           string
	services, samples int
}

// In a virtual machine everything takes longer.
const (
	vmStarts, vmRounds = 3, 3 // no more than a ratio needs
	vmDuration         = 3 * time.Second
	vmStartLimit       = 10 * time.Minute
)

func (v *vmFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&v.command, "vm", "bin/vm run -kernel=6.12",
		"`command` of test/vm, for systems that this kernel cannot run; \"make vm\" builds it; empty leaves them out")
	flags.IntVar(&v.services, "vm-services", 200, "number of Services in the virtual machine")
	flags.IntVar(&v.samples, "vm-samples", 5, "how often each kind of change is measured in the virtual machine")
}

// referenceSystems are the systems that run in a virtual machine too, so that there are
// ratios to them.
func referenceSystems() []string { return []string{"nft", "kube-proxy-nftables"} }

// partition are systems by where they run.
type partition struct {
	native, vm []system.System
	// unsupported are those of vm that this kernel cannot run, with the reasons.
	unsupported []result.LeftOut
}

// partitionSystems asks each system whether the kernel of this environment can run it.
func partitionSystems(ctx context.Context, systems []system.System, environment string) (_ *partition, err error) {
	node, err := nettest.NewNamespace("")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	d := &partition{}
	for _, s := range systems {
		var why error
		if c, ok := s.(system.Checker); ok {
			why = c.Check(ctx, node)
		}
		unavailable, known := errors.AsType[*system.UnavailableError](why)
		switch {
		case why != nil && !known:
			return nil, fmt.Errorf("whether %s can run here: %w", s.Name(), why)
		case why == nil:
			d.native = append(d.native, s)
			if slices.Contains(referenceSystems(), s.Name()) {
				d.vm = append(d.vm, s)
			}
		case unavailable.KernelLacksSupport:
			d.vm = append(d.vm, s)
			d.unsupported = append(d.unsupported, result.LeftOut{System: s.Name(), Environment: environment, Reason: unavailable.Reason})
		default:
			d.native = append(d.native, s) // which leaves it out, as another kernel would
		}
	}
	return d, nil
}

// compareAll compares the systems on this machine, and in a virtual machine those that its
// kernel cannot run. What goes wrong with the latter is in the report alone.
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
		inside, why := f.runInVM(ctx, vm)
		if inside != nil {
			reports = append(reports, inside)
		}
		for i := range d.unsupported {
			d.unsupported[i].Reason += "; " + why
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

// options are the options in a virtual machine, in which systems are compared.
func (v *vmFlags) options(o compare.Options, systems []system.System) compare.Options {
	o.Systems, o.Services, o.Samples = systems, []int{v.services}, v.samples
	o.Starts, o.Rounds, o.Duration = min(o.Starts, vmStarts), min(o.Rounds, vmRounds), min(o.Duration, vmDuration)
	o.StartLimit = max(o.StartLimit, vmStartLimit)
	return o
}

// runInVM compares in a virtual machine. It returns nil if there is none or nothing was
// measured, and in words what became of it.
func (f *compareFlags) runInVM(ctx context.Context, o compare.Options) (*result.Report, string) {
	command := f.vm.command
	if command == "" {
		return nil, "without --vm it does not run in a virtual machine"
	}
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Sprintf("find the program itself: %v", err)
	}
	args := []string{program, "compare", "--json=-", "--vm="}
	list := func(flag string, values ...string) {
		var b strings.Builder
		w := csv.NewWriter(&b)
		_ = w.Write(values) // to memory
		w.Flush()
		args = append(args, "--"+flag+"="+strings.TrimSuffix(b.String(), "\n"))
	}
	var names []string
	paths := map[string]string{} // of the systems' programs, by the flag
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
	list("systems", names...)
	for _, flag := range slices.Sorted(maps.Keys(paths)) {
		args = append(args, "--"+flag+"="+paths[flag])
	}
	if len(f.kubeProxyArgs) > 0 {
		list("kube-proxy-args", f.kubeProxyArgs...)
	}
	if len(f.fairleadArgs) > 0 {
		list("fairlead-args", f.fairleadArgs...)
	}
	list("only", f.only...)
	var rates []string
	for _, r := range o.Rates {
		rates = append(rates, strconv.FormatFloat(r, 'g', -1, 64))
	}
	list("rates", rates...)
	args = append(
		args,
		fmt.Sprintf("--services=%d", o.Services[0]), fmt.Sprintf("--endpoints=%d", o.Endpoints), fmt.Sprintf("--samples=%d", o.Samples),
		fmt.Sprintf("--starts=%d", o.Starts), fmt.Sprintf("--rounds=%d", o.Rounds), "--churn-time="+o.Duration.String(), "--settle="+o.SettleTime.String(),
		"--start-limit="+o.StartLimit.String(),
	)
	o.Progress(strings.Join(names, ", ") + ": in a virtual machine, emulated, which takes minutes")
	vm := compare.VM{
		Command: command, Program: append([]string{"-with=" + strings.Join(slices.Sorted(maps.Values(paths)), ",")}, args...),
		Progress: func(line string) { o.Progress("vm: " + line) },
	}
	r, err := vm.Run(ctx)
	switch {
	case r == nil:
		return nil, fmt.Sprintf("nor does it run in a virtual machine: %v", err)
	case err != nil:
		return r, fmt.Sprintf("in the virtual machine %s not all was measured: %v", r.Environments[0].Name, err)
	default:
		return r, "it was measured in the virtual machine " + r.Environments[0].Name
	}
}
