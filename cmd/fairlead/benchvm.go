package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"fairlead/bench/compare"
	"fairlead/bench/report"
	"fairlead/bench/result"
	"fairlead/bench/system"
	"fairlead/internal/nettest"
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
)

func (v *vmFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&v.command, "vm", "bin/vm run -kernel=6.12",
		"`command` that runs systems in a virtual machine that this kernel cannot run; `make vm` builds it; empty leaves them out")
	flags.IntVar(&v.services, "vm-services", 200, "number of Services in the virtual machine")
	flags.IntVar(&v.samples, "vm-samples", 5, "how often each kind of change is measured in the virtual machine")
}

// references are the systems that run in a virtual machine too, so that there are
// ratios to them.
func references() []string { return []string{"nft", "kube-proxy-nftables"} }

// divided are systems by where they run.
type divided struct {
	native, vm []system.System
	// missed are those of vm that this kernel cannot run, with the reasons.
	missed []result.LeftOut
}

// divide asks each system whether this kernel can run it.
func divide(ctx context.Context, systems []system.System) (_ *divided, err error) {
	node, err := nettest.NewNamespace("")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	d := &divided{}
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
			if slices.Contains(references(), s.Name()) {
				d.vm = append(d.vm, s)
			}
		case unavailable.Kernel:
			d.vm = append(d.vm, s)
			d.missed = append(d.missed, result.LeftOut{System: s.Name(), Environment: result.Native, Reason: unavailable.Reason})
		default:
			d.native = append(d.native, s) // which leaves it out, as another kernel would
		}
	}
	return d, nil
}

// compareAll compares the systems on this machine, and in a virtual machine those that its
// kernel cannot run. What goes wrong with the latter is in the report alone.
func (f *compareFlags) compareAll(ctx context.Context, binary string, o compare.Options) (*result.Report, error) {
	d, err := divide(ctx, o.Systems)
	if err != nil {
		return nil, err
	}
	if len(d.missed) == 0 {
		return compare.Run(ctx, o)
	}
	var reports []*result.Report
	if o.Systems = d.native; len(d.native) > 0 {
		r, err := compare.Run(ctx, o)
		if err != nil {
			return r, err
		}
		reports = append(reports, r)
	}
	inside, why := f.vmRun(ctx, binary, o, d)
	if inside != nil {
		reports = append(reports, inside)
	}
	for i := range d.missed {
		d.missed[i].Environment = o.Environment.Name
		d.missed[i].Reason += "; " + why
		o.Progress(d.missed[i].System + " is left out: " + d.missed[i].Reason)
	}
	if len(reports) == 0 {
		return nil, errors.Join(errors.New("no system can run here"), context.Cause(ctx))
	}
	all, err := report.Merge(reports...)
	if err != nil {
		return reports[0], err
	}
	all.LeftOut = append(all.LeftOut, d.missed...)
	all.TookSeconds = time.Since(all.Time).Seconds()
	return all, context.Cause(ctx)
}

// vmRun compares in a virtual machine. It returns nil if there is none or nothing was
// measured, and in words what became of it.
func (f *compareFlags) vmRun(ctx context.Context, binary string, o compare.Options, d *divided) (*result.Report, string) {
	command := f.vm.command
	if command == "" {
		return nil, "without --vm it does not run in a virtual machine"
	}
	program, _, _ := strings.Cut(command, " ")
	if _, err := exec.LookPath(program); err != nil && strings.Contains(program, "/") { // else it may be the shell's own
		return nil, fmt.Sprintf("`make vm` builds a virtual machine that can run it, which --vm names (there is no %s)", program)
	}
	var with []string
	args := []string{binary, "bench", "compare", "--json=-", "--vm="}
	list := func(flag string, values ...string) {
		var b strings.Builder
		w := csv.NewWriter(&b)
		_ = w.Write(values) // to memory
		w.Flush()
		args = append(args, "--"+flag+"="+strings.TrimSuffix(b.String(), "\n"))
	}
	var names []string
	for _, s := range d.vm {
		names = append(names, s.Name())
		if k, ok := s.(system.KubeProxy); ok && with == nil {
			path, err := exec.LookPath(k.Binary)
			if err == nil {
				path, err = filepath.Abs(path)
			}
			if err != nil {
				return nil, err.Error()
			}
			with = []string{"-with=" + path}
			args = append(args, "--kube-proxy="+path)
		}
	}
	list("systems", names...)
	if len(f.kubeProxyArgs) > 0 {
		list("kube-proxy-args", f.kubeProxyArgs...)
	}
	if len(f.args) > 0 {
		list("fairlead-args", f.args...)
	}
	list("only", f.only...)
	var rates []string
	for _, r := range o.Rates {
		rates = append(rates, strconv.FormatFloat(r, 'g', -1, 64))
	}
	list("rate", rates...)
	args = append(
		args,
		fmt.Sprintf("--services=%d", f.vm.services), fmt.Sprintf("--endpoints=%d", o.Endpoints),
		fmt.Sprintf("--samples=%d", f.vm.samples), fmt.Sprintf("--starts=%d", min(o.Starts, vmStarts)),
		fmt.Sprintf("--rounds=%d", min(o.Rounds, vmRounds)), "--duration="+min(o.Duration, vmDuration).String(), "--settle="+o.Settle.String(),
	)
	o.Progress(strings.Join(names, ", ") + ": in a virtual machine, emulated, which takes minutes")
	vm := compare.VM{
		Command: command, Program: append(with, args...),
		Progress: func(line string) { o.Progress("vm: " + line) },
	}
	r, err := vm.Run(ctx)
	switch {
	case r == nil:
		return nil, fmt.Sprintf("in the virtual machine: %v", err)
	case err != nil:
		return r, fmt.Sprintf("in the virtual machine %s not all was measured: %v", r.Environments[0].Name, err)
	default:
		return r, "it was measured in the virtual machine " + r.Environments[0].Name
	}
}
