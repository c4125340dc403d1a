package compare

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/test/controlplane"
)

// Options say what to compare, and how thoroughly.
type Options struct {
	// Systems are what is compared, of different names.
	Systems []system.System
	// Services are the numbers of Services to measure with, one after the other,
	// and Endpoints the number of endpoints of each.
	Services  []int
	Endpoints int
	// Parts are what to measure; none means all.
	Parts []Part
	// Samples is how often each kind of change is measured, and Starts how many cold
	// starts of each system.
	Samples, Starts int
	// StartLimit is how long a cold start may take. A system that takes longer with
	// some number of Services is left out from there on.
	StartLimit time.Duration
	// Rates are the numbers of changes a second for churn, which lasts for Duration,
	// Rounds times.
	Rates    []float64
	Duration time.Duration
	Rounds   int
	// SettleTime is the time that a system has between two changes of which the effect is
	// measured.
	SettleTime time.Duration
	// ControlPlane is a folder with the programs etcd and kube-apiserver, which are then
	// started for each system. Without, systems follow API servers in this process.
	ControlPlane string
	// Environment is where this is. Run adds the version of kube-apiserver.
	Environment result.Environment
	// Dir is a folder for logs.
	Dir string
	// Progress is told what happens, for people. It may be nil.
	Progress func(line string)
}

// Part is a part of the comparison.
type Part string

// The parts. Each start of a cold start yields the memory too.
const (
	Update    Part = "update"
	ColdStart Part = "coldstart"
	Churn     Part = "churn"
	Memory    Part = "memory"
)

// Parts are all parts.
func Parts() []Part { return []Part{ColdStart, Memory, Update, Churn} }

// DefaultOptions are those that `fairlead-bench compare` has without flags, but for
// the systems.
func DefaultOptions() Options {
	return Options{
		Services: []int{10_000}, Endpoints: 10, Samples: 30, Starts: 5, StartLimit: 2 * time.Minute,
		Rates: []float64{100, 1000}, Duration: 10 * time.Second, Rounds: 3, SettleTime: 2 * time.Second,
	}
}

// Validate returns all that is wrong with the options.
func (o *Options) Validate() error {
	var errs []error
	if len(o.Systems) == 0 {
		errs = append(errs, errors.New("no systems to compare"))
	}
	names := map[string]bool{}
	for _, s := range o.Systems {
		if names[s.Name()] {
			errs = append(errs, fmt.Errorf("system %s is there twice", s.Name()))
		}
		names[s.Name()] = true
	}
	for _, p := range o.Parts {
		if !slices.Contains(Parts(), p) {
			errs = append(errs, fmt.Errorf("unknown part %q: use %v", p, Parts()))
		}
	}
	if len(o.Services) == 0 {
		errs = append(errs, errors.New("no number of Services"))
	}
	for _, n := range o.Services {
		// Each sample changes Services of its own.
		if n < 10 {
			errs = append(errs, fmt.Errorf("%d Services are too few: use 10 or more", n))
		}
	}
	if o.Endpoints < 1 || o.Endpoints > 100 {
		errs = append(errs, fmt.Errorf("%d endpoints a Service: use 1 to 100", o.Endpoints))
	}
	if o.Samples < 1 || o.Starts < 1 || o.Rounds < 1 {
		errs = append(errs, errors.New("the numbers of samples, starts and rounds must be 1 or more"))
	}
	if o.StartLimit <= 0 {
		errs = append(errs, errors.New("how long a start may take must be more than 0"))
	}
	if o.Duration <= 0 || o.SettleTime < 0 {
		errs = append(errs, errors.New("how long churn lasts must be more than 0, and the time to settle not less"))
	}
	for _, r := range o.Rates {
		if r <= 0 {
			errs = append(errs, fmt.Errorf("%v changes a second: use more than 0", r))
		}
	}
	if o.ControlPlane != "" {
		if _, err := controlplane.Programs(o.ControlPlane); err != nil {
			errs = append(errs, fmt.Errorf("--apiserver: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (o *Options) includes(p Part) bool { return len(o.Parts) == 0 || slices.Contains(o.Parts, p) }

func (o *Options) progress(format string, args ...any) {
	if o.Progress != nil {
		o.Progress(fmt.Sprintf(format, args...))
	}
}

// sleep waits, and returns the context's error if that is done before.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
