// Program chaos injects faults into a node that runs Fairlead, continuously opens connections
// to Services, and checks that only the connections that the fault itself breaks are lost.
//
//	chaos [-faults=REGEXP] [-time=20s] [-services=1000] [flags]
//
// The node, its pods and an outside host are network namespaces (internal/nettest). Fairlead
// is the real binary. It watches a real kube-apiserver, or with -api=feed a server in this
// process, which is fast enough for emulated virtual machines. The endpoints of the Services
// change throughout, at -changes per second.
//
// Clients in a pod, on the node and outside open TCP, UDP and SCTP connections over IPv4 and
// IPv6 to cluster IPs and node ports, with and without session affinity. Other clients keep
// TCP connections open and use them. The report has a line for each fault: the number of
// connections, of failed connections and of broken open connections, and for how long a
// removed endpoint got connections.
//
// A disturbance such as `nft flush ruleset` inevitably loses connections. Connections that
// overlap it, or the [repairTime] after it, may fail and have their own column. No other
// connection may fail. The exit status is 1 if a fault exceeds its limits.
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

	"fairlead.io/fairlead/bench/system"
)

// options holds the values of the flags.
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
	flag.StringVar(&o.other, "other-binary", "bin/fairlead-schematest", "path of a Fairlead binary with another schema version")
	flag.StringVar(&o.kubeProxy, "kube-proxy", ".cache/kube-proxy/kube-proxy", "path of the kube-proxy binary")
	flag.StringVar(&o.mode, "mode", system.ModeNFT, "mode of Fairlead: "+system.ModeNFT+" or "+system.ModeIPVS)
	flag.StringVar(&o.api, "api", "real", "API server: real (etcd and kube-apiserver) or feed (in this process)")
	flag.StringVar(&o.faults, "faults", ".", "regular expression that selects faults by name")
	flag.StringVar(&o.args, "args", "", "additional flags of fairlead run, separated by spaces")
	flag.DurationVar(&o.time, "time", 20*time.Second, "duration of each fault")
	flag.IntVar(&o.services, "services", 200, "number of additional Services that no client connects to")
	flag.IntVar(&o.changes, "changes", 50, "changes of endpoints per second")
	flag.IntVar(&o.rate, "rate", 100, "maximum number of connections per second of each client")
	flag.IntVar(&o.open, "open", 20, "number of TCP connections to keep open, per target")
	flag.BoolVar(&o.jumpClock, "jump-clock", false, "also set the system clock; only in a virtual machine of bin/vm")
	flag.BoolVar(&o.keepLogs, "keep-logs", false, "keep the directory with the logs of all programs")
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

// run injects the faults one after the other and prints the report. It returns whether a
// fault exceeded its limits.
func run(ctx context.Context, o *options) (exceeded bool, err error) {
	if os.Geteuid() != 0 {
		return false, errors.New("must run as root to create and program network namespaces")
	}
	if own, err := inVirtualMachine(); err != nil {
		return false, err
	} else if o.jumpClock && !own {
		return false, errors.New("-jump-clock: not in a virtual machine of bin/vm; other programs use this clock")
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
	fmt.Printf("Linux %s, %d processors, mode %s, %d Services, %d changes per second, %s per fault\n\n",
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
	time.Sleep(connectTimeout) // until no connection is pending
	report.finishLast()
	fmt.Println(fault{name: "all"}.tableRow(report.total))
	if report.exceeded {
		o.keepLogs = true
	}
	return report.exceeded, nil
}

// report prints the line of each fault after the next fault has ended: only then is the
// result of all connections known.
type report struct {
	testbed  *testbed
	fault    fault
	record   *record // of the fault; nil before the first fault
	total    result
	exceeded bool
}

// finishLast prints the line of the last fault.
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
		fmt.Fprintf(os.Stderr, "chaos: %s: example: %s\n", p.fault.name, failure)
	}
	p.total.add(r)
}
