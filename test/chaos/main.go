// Program chaos disturbs a node that runs Fairlead, opens connections to Services
// all the time, and checks that no more is lost than the disturbance itself loses.
//
//	chaos [-faults=REGEXP] [-time=20s] [-services=1000] [flags]
//
// The node, its pods and a host outside are network namespaces (internal/nettest).
// Fairlead is the real binary, and follows a real kube-apiserver, or with
// -api=feed a server in this process, which virtual machines have the time for.
// Endpoints of the Services come and go throughout, at -changes a second.
//
// Clients in a pod, on the node and outside open TCP, UDP and SCTP connections over
// IPv4 and IPv6 to cluster IPs and node ports, with session affinity and without.
// Others keep TCP connections open and use them. The report has a line for each
// fault: how many connections there were, how many failed, how many open
// ones broke, and for how long an endpoint got connections after it was removed.
// A disturbance such as `nft flush ruleset` loses connections by its nature: those
// which overlap it, or the [repairTime] after it, have a column of their own and may
// fail. All others may not. The exit status is 1 if a fault exceeds its limits.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	binary    string
	other     string
	kubeProxy string
	mode      string
	api       string
	faults    string
	args      string
	time      time.Duration
	services  int
	changes   int
	rate      int
	open      int
	jumpClock bool
	keepLogs  bool
}

func main() {
	var o options
	flag.StringVar(&o.binary, "binary", "bin/fairlead", "path of the Fairlead binary")
	flag.StringVar(&o.other, "other-binary", "bin/fairlead-schematest", "path of another version of the Fairlead binary")
	flag.StringVar(&o.kubeProxy, "kube-proxy", ".cache/kube-proxy/kube-proxy", "path of the kube-proxy binary")
	flag.StringVar(&o.mode, "mode", "nft", "Fairlead's mode: nft or ipvs")
	flag.StringVar(&o.api, "api", "real", "API server: real (etcd and kube-apiserver) or feed (in this process)")
	flag.StringVar(&o.faults, "faults", ".", "regular expression of the faults to cause")
	flag.StringVar(&o.args, "args", "", "further flags of fairlead run, separated by spaces")
	flag.DurationVar(&o.time, "time", 20*time.Second, "duration of each fault")
	flag.IntVar(&o.services, "services", 200, "number of further Services, which no client connects to")
	flag.IntVar(&o.changes, "changes", 50, "changes of endpoints a second")
	flag.IntVar(&o.rate, "rate", 100, "connections a second that each client opens at most")
	flag.IntVar(&o.open, "open", 20, "TCP connections that stay open, for each family")
	flag.BoolVar(&o.jumpClock, "jump-clock", false, "set the time of day too; only in a virtual machine of bin/vm")
	flag.BoolVar(&o.keepLogs, "keep-logs", false, "keep the folder with the logs of all programs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	exceeded, err := run(ctx, &o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
	if exceeded {
		os.Exit(1)
	}
}

// run causes the faults one after the other and prints the report. It returns
// whether one exceeded its limits.
func run(ctx context.Context, o *options) (exceeded bool, err error) {
	if os.Geteuid() != 0 {
		return false, errors.New("not root: the program makes network namespaces and programs the kernel in them")
	}
	if own, err := inVirtualMachine(); err != nil {
		return false, err
	} else if o.jumpClock && !own {
		return false, errors.New("-jump-clock: this is no virtual machine of bin/vm, and others use its clock")
	}
	pattern, err := regexp.Compile(o.faults)
	if err != nil {
		return false, fmt.Errorf("-faults: %w", err)
	}
	t, err := newTestbed(ctx, o)
	defer func() { err = errors.Join(err, t.close()) }()
	if err != nil {
		return false, err
	}
	kernel, err := kernelRelease()
	if err != nil {
		return false, err
	}
	fmt.Printf("Linux %s, %d processors, mode %s, %d Services, %d changes a second, %s for each fault\n\n",
		kernel, runtime.NumCPU(), o.mode, len(t.services)+o.services, o.changes, o.time)
	fmt.Println(tableHeader)
	report := &report{testbed: t}
	for _, f := range faults() {
		if !pattern.MatchString(f.name) {
			continue
		}
		if reason := f.unavailable(t); reason != "" {
			fmt.Println(f.skippedRow(reason))
			continue
		}
		record, err := t.injectFault(ctx, f)
		report.finishLast()
		if err != nil {
			return false, fmt.Errorf("%s: %w", f.name, err)
		}
		report.fault, report.record = f, record
	}
	time.Sleep(connectTimeout) // until no connection waits
	report.finishLast()
	fmt.Println(fault{name: "all"}.tableRow(report.total))
	if report.exceeded {
		o.keepLogs = true
	}
	return report.exceeded, nil
}

// report prints the line of each fault once the next one has ended: only then is
// known what became of all connections.
type report struct {
	testbed  *testbed
	fault    fault
	record   *record // of the fault; nil before the first
	total    result
	exceeded bool
}

func (p *report) finishLast() {
	if p.record == nil {
		return
	}
	r := p.testbed.recorder.snapshot(p.record)
	fmt.Println(p.fault.tableRow(r))
	for _, problem := range p.fault.violations(r) {
		p.exceeded = true
		fmt.Fprintf(os.Stderr, "chaos: %s: %s\n", p.fault.name, problem)
	}
	for _, failure := range r.examples {
		fmt.Fprintf(os.Stderr, "chaos: %s: for example: %s\n", p.fault.name, failure)
	}
	p.total.add(r)
}
