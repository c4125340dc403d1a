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

// Options configures a comparison.
type Options struct {
	// Systems are the systems to compare. Their names must differ.
	Systems []system.System
	// Services are the numbers of Services to measure with, in order. Endpoints is the number of
	// endpoints of each Service.
	Services  []int
	Endpoints int
	// Parts are the parts to measure. Empty means all parts.
	Parts []Part
	// Samples is the number of measurements of each kind of change, and Starts the number of cold
	// starts of each system.
	Samples, Starts int
	// StartLimit is the maximum duration of a cold start. A system that takes longer is left out,
	// also with the later numbers of Services.
	StartLimit time.Duration
	// Rates are the rates of churn in changes per second. Each of Rounds rounds of churn lasts for
	// Duration.
	Rates    []float64
	Duration time.Duration
	Rounds   int
	// SettleTime is the minimum time between two measured changes of a system.
	SettleTime time.Duration
	// ProbeInterval is the minimum time between two packets that show changes.
	ProbeInterval time.Duration
	// ControlPlane is a directory with the programs etcd and kube-apiserver, which are started for
	// each system. If it is empty, systems watch API servers in this process.
	ControlPlane string
	// Environment describes this machine. Run adds the version of kube-apiserver.
	Environment result.Environment
	// Dir is a directory for logs.
	Dir string
	// Progress, if not nil, is called with lines for people that describe the current step.
	Progress func(line string)
}

// Part identifies a part of the comparison.
type Part string

// Parts of the comparison. Cold starts also measure memory.
const (
	Update    Part = "update"
	ColdStart Part = "coldstart"
	Churn     Part = "churn"
	Memory    Part = "memory"
	// DataPath measures the first packets of connections, and connect(2).
	DataPath Part = "data-path"
	// Established measures packets of established connections, also with flow offload.
	Established Part = "established"
)

// Parts returns all parts.
func Parts() []Part { return []Part{ColdStart, Memory, Update, Churn, DataPath, Established} }

// DefaultOptions returns the defaults of `fairlead-bench compare`, except for the systems.
func DefaultOptions() Options {
	return Options{
		Services: []int{10_000}, Endpoints: 10, Samples: 30, Starts: 5, StartLimit: 2 * time.Minute,
		Rates: []float64{100, 1000}, Duration: 10 * time.Second, Rounds: 3, SettleTime: 2 * time.Second,
	}
}

// Validate returns an error that lists all invalid options.
func (o *Options) Validate() error {
	var errs []error
	if len(o.Systems) == 0 {
		errs = append(errs, errors.New("--systems: no systems to compare"))
	}
	names := map[string]bool{}
	for _, s := range o.Systems {
		if names[s.Name()] {
			errs = append(errs, fmt.Errorf("--systems: duplicate system %s", s.Name()))
		}
		names[s.Name()] = true
	}
	for _, p := range o.Parts {
		if !slices.Contains(Parts(), p) {
			errs = append(errs, fmt.Errorf("--only: unknown part %q: use one or more of %v", p, Parts()))
		}
	}
	if len(o.Services) == 0 {
		errs = append(errs, errors.New("--services: no number of Services"))
	}
	for _, n := range o.Services {
		// Each sample changes different Services.
		if n < 10 {
			errs = append(errs, fmt.Errorf("--services: %d Services are too few: use 10 or more", n))
		}
	}
	if o.Endpoints < 1 || o.Endpoints > 100 {
		errs = append(errs, fmt.Errorf("--endpoints: invalid value %d: must be from 1 to 100", o.Endpoints))
	}
	if o.Samples < 1 || o.Starts < 1 || o.Rounds < 1 {
		errs = append(errs, errors.New("--samples, --starts and --rounds must be 1 or more"))
	}
	if o.StartLimit <= 0 {
		errs = append(errs, errors.New("--start-limit must be greater than 0"))
	}
	if o.Duration <= 0 || o.SettleTime < 0 || o.ProbeInterval < 0 {
		errs = append(errs, errors.New("--churn-time must be greater than 0, and --settle and --probe-interval must not be negative"))
	}
	for _, r := range o.Rates {
		if r <= 0 {
			errs = append(errs, fmt.Errorf("--rates: invalid value %v: must be greater than 0", r))
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

// sleep waits for the duration d, or returns the cause if ctx is done earlier.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
