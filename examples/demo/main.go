// Command demo shows Fairlead at work on one machine, within a few seconds.
//
// It creates a node and seven pods, each of which is a network namespace: three front ends, three
// back ends and a Redis. The node runs the real fairlead, which reads the Services in the
// directory examples and one YAML file per pod. The front ends request http://backend by name,
// over a new connection for each request, while the demo deletes one back end and adds two.
// Finally a host outside the cluster uses a node port. The output reports what happened. The exit
// code is 1 if a request failed or anything else went wrong.
//
// The demo needs root, and no program besides fairlead; it uses redis-server if that is installed.
// With -mode=ipvs it needs a kernel with IPVS. The flag -vm sets a command that runs the demo in a
// virtual machine if the kernel does not support the mode.
//
// The demo removes everything it creates, however it ends. Only SIGKILL leaves a temporary
// directory, and with -keep the names under /run/netns and /etc/netns, which the next run removes.
// If the demo dies, the kernel kills the processes that it started.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/ipvs"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// options are the values of the flags.
type options struct {
	mode     string
	vm       string
	keep     bool
	requests int
	fairlead string
	services string
	name     string
}

// minRequests requests make it unlikely, with a probability below 1 in 10,000, that one of five
// back ends gets no request.
const minRequests = 50

// demoTimeout is the maximum duration of the demo, which usually takes a few seconds. It does not
// include the wait with -keep.
const demoTimeout = 60 * time.Second

// Exit codes besides 0. As in a shell, the number of a signal is added to exitSignal.
const (
	exitFailed = 1
	exitUsage  = 2
	exitSignal = 128
)

// signalError reports that a signal has ended the demo.
type signalError struct{ signal syscall.Signal }

func (i signalError) Error() string { return "interrupted: " + i.signal.String() }

// errProblems reports that something went wrong. The problems are already printed.
var errProblems = errors.New("the demo found problems")

// errCleanup reports that the cleanup failed and something may be left behind.
var errCleanup = errors.New("clean up")

// run implements main and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var o options
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.mode, "mode", backend.Names()[0], "fairlead's mode: "+strings.Join(backend.Names(), " or "))
	flags.StringVar(&o.vm, "vm", "", "shell `command` that runs the demo in a virtual machine, used if this kernel does not support the mode")
	flags.BoolVar(&o.keep, "keep", false, "keep everything running until Ctrl-C, for inspection")
	flags.IntVar(&o.requests, "requests", 300, "number of requests to count before the first change and after each change")
	flags.StringVar(&o.fairlead, "fairlead", "bin/fairlead", "path of the fairlead binary")
	flags.StringVar(&o.services, "services", "examples", "directory with backend.yaml, redis.yaml and public.yaml")
	flags.StringVar(&o.name, "name", "fairlead-demo", "prefix of the names of namespaces, with -keep")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return exitUsage
	}
	if flags.NArg() > 0 {
		_, _ = fmt.Fprintf(stderr, "demo: unexpected argument %q\n", flags.Arg(0))
		return exitUsage
	}
	ctx, stop := withSignals(ctx)
	defer stop()
	err := o.run(ctx, stdout)
	var signalled signalError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, ipvs.ErrNotSupported) && o.vm != "":
		_, _ = fmt.Fprintf(stderr, "demo: %v: running in an emulated virtual machine, which is slow: %s\n", err, o.vm)
		err := syscall.Exec("/bin/sh", []string{"sh", "-c", o.vm}, os.Environ()) //nolint:gosec // the user sets the command
		_, _ = fmt.Fprintf(stderr, "demo: run the shell: %v\n", err)
	case errors.Is(err, errCleanup):
		_, _ = fmt.Fprintln(stderr, "demo:", err)
	case errors.Is(err, errProblems):
	case errors.As(err, &signalled):
		_, _ = fmt.Fprintf(stderr, "demo: %v; everything is removed\n", signalled)
		return exitSignal + int(signalled.signal)
	default:
		_, _ = fmt.Fprintln(stderr, "demo:", err)
	}
	return exitFailed
}

// withSignals returns a context that is canceled with a [signalError] when a signal asks the demo
// to end, or when its output is a closed pipe. Later signals have no effect, so that they do not
// disturb the cleanup.
func withSignals(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	go func() {
		select {
		case s := <-signals:
			if s, ok := s.(syscall.Signal); ok {
				cancel(signalError{s})
			}
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel(nil)
	}
}

// run creates the cluster, runs the scenario, and removes everything.
func (o options) run(ctx context.Context, out io.Writer) (err error) {
	if err := o.validate(); err != nil {
		return err
	}
	if err := o.checkSupported(); err != nil { //nolint:contextcheck // opening a backend takes no context
		return err
	}
	lock, err := removeLeftovers(ctx, o.name, o.keep)
	if err != nil {
		return err
	}
	var u cleanupStack
	u.add(lock)
	defer func() {
		// Deferred, to clean up after a panic too.
		if undoErr := u.run(); undoErr != nil {
			err = errors.Join(err, fmt.Errorf("%w: %w", errCleanup, undoErr))
		}
	}()
	timed, cancel := context.WithTimeoutCause(ctx, demoTimeout, fmt.Errorf("the demo did not finish within %v", demoTimeout))
	defer cancel()
	c, err := newCluster(timed, o, &u)
	if err == nil {
		s := scenario{cluster: c, out: out, requests: o.requests}
		err = s.run(timed)
	}
	if o.keep && (err == nil || errors.Is(err, errProblems)) {
		c.printKeepHelp(out)
		<-ctx.Done()
		_, _ = fmt.Fprintln(out, "\nRemoving everything.")
		return err
	}
	if err != nil && timed.Err() != nil {
		// The error is most likely a consequence of the canceled context.
		return context.Cause(timed)
	}
	return err
}

// validate checks the flags and common mistakes, and returns errors that say how to fix them.
func (o options) validate() error {
	if os.Geteuid() != 0 {
		return errors.New("the demo creates network namespaces, which needs root: run it as root, for example with sudo")
	}
	if !slices.Contains(backend.Names(), o.mode) {
		return fmt.Errorf("-mode: unknown mode %q: use %s", o.mode, strings.Join(backend.Names(), " or "))
	}
	if o.requests < minRequests {
		return fmt.Errorf("-requests: %d requests may not reach every back end: use %d or more", o.requests, minRequests)
	}
	if _, err := os.Stat(o.fairlead); err != nil {
		return fmt.Errorf("%w: run `make build` first, in the root of the repository", err)
	}
	for _, service := range []string{backendApp, redisApp} {
		if _, err := os.Stat(filepath.Join(o.services, service+".yaml")); err != nil {
			return fmt.Errorf("%w: run the demo in the root of the repository", err)
		}
	}
	return nil
}

// checkSupported checks in a new network namespace whether the kernel supports the mode. If it
// does not, the error wraps [ipvs.ErrNotSupported] and names the missing feature.
func (o options) checkSupported() (err error) {
	if o.mode != backend.IPVS {
		return nil
	}
	ns, err := nettest.NewNamespace("")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ns.Close()) }()
	d, err := ipvs.Open(ipvs.Options{NetNS: ns.Fd()})
	if err != nil {
		return err
	}
	return d.Close()
}
