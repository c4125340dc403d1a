// Command demo shows Fairlead at work on one machine, in a few seconds.
//
// It makes a node and seven pods, each a network namespace with addresses of
// its own: three front ends, three back ends, and a Redis. The node runs the
// real fairlead, which is given the Services of the folder examples and a YAML
// file for each pod. The front ends ask for http://backend, by name and over a
// new connection for each request, while a back end is deleted and two are
// added, and at last a host outside uses a node port. What it prints is what happened: it exits with 1 if a request failed
// or anything else was not as it must be.
//
// It needs root, and no program besides fairlead: a redis-server is used where
// there is one. With -mode=ipvs it needs a kernel that has IPVS; -vm names a command
// that runs the demo in a virtual machine, for where the kernel has not. What it makes goes with it, however it ends, save for a
// temporary folder, and with -keep the names under /run/netns and /etc/netns,
// if it is killed with SIGKILL; the next run removes these. Processes that it
// starts are killed by the kernel if it dies.
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
	"syscall"
	"time"

	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/ipvs"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// options are the flags.
type options struct {
	mode     string
	vm       string
	keep     bool
	requests int
	fairlead string
	services string
	name     string
}

// minRequests make it unlikely, less than once in 10,000 runs, that one of
// five back ends is chosen for none of them.
const minRequests = 50

// The modes, as fairlead calls them.
const (
	modeNFT  = "nft"
	modeIPVS = "ipvs"
)

// demoTimeout is the time that the demo may take before it gives up, waiting with
// -keep aside. It takes a few seconds.
const demoTimeout = 60 * time.Second

// The exit codes besides 0. A signal adds its number to exitSignal, as in a
// shell.
const (
	exitFailed = 1
	exitUsage  = 2
	exitSignal = 128
)

// signalError says that a signal has ended the demo.
type signalError struct{ signal syscall.Signal }

func (i signalError) Error() string { return "interrupted: " + i.signal.String() }

// errProblems says that something was not as it must be; it has been printed.
var errProblems = errors.New("not everything was as it must be")

// errCleanup says that something may be left.
var errCleanup = errors.New("clean up")

// run is main with all that it depends on, and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var o options
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.mode, "mode", modeNFT, "how fairlead programs the kernel: nft or ipvs")
	flags.StringVar(&o.vm, "vm", "", "the shell's `command` that runs the demo in a virtual machine, for when this kernel cannot run the mode")
	flags.BoolVar(&o.keep, "keep", false, "leave everything running to look around, until Ctrl-C")
	flags.IntVar(&o.requests, "requests", 300, "requests to count before the first and after each change")
	flags.StringVar(&o.fairlead, "fairlead", "bin/fairlead", "the program to show")
	flags.StringVar(&o.services, "services", "examples", "the folder with backend.yaml, redis.yaml and public.yaml")
	flags.StringVar(&o.name, "name", "fairlead-demo", "with -keep, what the names of the namespaces begin with")
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
		_, _ = fmt.Fprintf(stderr, "demo: %v: running in a virtual machine, emulated, which is slow: %s\n", err, o.vm)
		err := syscall.Exec("/bin/sh", []string{"sh", "-c", o.vm}, os.Environ()) //nolint:gosec // the caller's choice
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

// withSignals returns a context that ends with the cause [signalError] when
// somebody wants the demo to end, or nobody reads its output. Later signals
// are without effect, so that cleaning up is not disturbed.
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

// run makes the cluster, tells the story, and removes everything.
func (o options) run(ctx context.Context, out io.Writer) (err error) {
	if err := o.validate(); err != nil {
		return err
	}
	if err := o.checkSupported(); err != nil {
		return err
	}
	lock, err := removeLeftovers(ctx, o.name, o.keep)
	if err != nil {
		return err
	}
	var u cleanupStack
	u.add(lock)
	defer func() {
		// Deferred, so that a panic is followed by it too.
		if undoErr := u.run(); undoErr != nil {
			err = errors.Join(err, fmt.Errorf("%w: %w", errCleanup, undoErr))
		}
	}()
	timed, cancel := context.WithTimeoutCause(ctx, demoTimeout, fmt.Errorf("the demo was not done after %v", demoTimeout))
	defer cancel()
	c, err := newCluster(timed, o, &u)
	if err == nil {
		s := scenario{cluster: c, out: out, requests: o.requests}
		err = s.run(timed)
	}
	if o.keep && (err == nil || errors.Is(err, errProblems)) {
		c.printKeepHelp(out)
		<-ctx.Done()
		_, _ = fmt.Fprintln(out, "\nEnding, and removing everything.")
		return err
	}
	if err != nil && timed.Err() != nil {
		// What failed did so because of that, most likely.
		return context.Cause(timed)
	}
	return err
}

// validate finds out early, and says what to do about, what people forget.
func (o options) validate() error {
	if os.Geteuid() != 0 {
		return errors.New("it makes network namespaces, which only root may: run it as root, for example with sudo")
	}
	if o.mode != modeNFT && o.mode != modeIPVS {
		return fmt.Errorf("-mode: want %s or %s, not %q", modeNFT, modeIPVS, o.mode)
	}
	if o.requests < minRequests {
		return fmt.Errorf("-requests: %d are too few to see each back end get some: use %d or more", o.requests, minRequests)
	}
	if _, err := os.Stat(o.fairlead); err != nil {
		return fmt.Errorf("%w: run `make build` first, in the folder that Makefile is in", err)
	}
	for _, service := range []string{backendApp, redisApp} {
		if _, err := os.Stat(filepath.Join(o.services, service+".yaml")); err != nil {
			return fmt.Errorf("%w: run the demo in the folder that Makefile is in", err)
		}
	}
	return nil
}

// checkSupported asks the kernel whether it can run the mode, in a namespace made for
// that. If not, the error says what it lacks, and is an [ipvs.ErrNotSupported].
func (o options) checkSupported() (err error) {
	if o.mode != modeIPVS {
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
