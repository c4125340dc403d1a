package bench

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
)

// Part identifies a part of the measurements of [Run].
type Part string

// Parts of the measurements.
const (
	Update   Part = "update"    // latency of one change
	Start    Part = "start"     // cold start on a new node
	Restart  Part = "restart"   // warm restart with everything programmed
	Churn    Part = "churn"     // latency at a fixed rate of changes
	DataPath Part = "data-path" // connections through a Service and direct
	Fairness Part = "fairness"  // distribution of connections over endpoints
	Memory   Part = "memory"    // memory of the process and of the kernel
	// Established measures packets of established connections, with and without flow offload.
	Established Part = "established"
)

// Parts returns all parts in the order in which Run measures them.
func Parts() []Part {
	return []Part{Update, Start, Restart, Churn, DataPath, Established, Fairness, Memory}
}

// Modes returns the backends that can be measured, the default first.
func Modes() []string { return backend.Names() }

// Options configures [Run]. Zero values select the defaults.
type Options struct {
	// Mode is the backend, one of [Modes]. The default is the first of them.
	Mode string
	// Services is the number of Services (default 10,000) and Endpoints the number of endpoints of
	// each (default 10).
	Services, Endpoints int
	// Samples is the number of measurements of each kind of change, and of connections (default
	// 1,000). Starts are measured Samples/100 times, at least 3 and at most 20 times.
	Samples int
	// Only lists the parts to measure. Nil means all parts.
	Only []Part
	// Rates are the rates of [Churn] in changes per second (default 100, 1,000 and 10,000).
	// ChurnTime is the duration of churn at each rate (default 10 s).
	Rates     []float64
	ChurnTime time.Duration
	// Sizes are the numbers of Services for [DataPath] (default 1, 1,000, 10,000 and 100,000).
	// ThroughputTime is the duration of each transfer (default 500 ms).
	Sizes          []int
	ThroughputTime time.Duration
	// Progress, if not nil, is called with a line for people that describes the current step. It
	// may be called often.
	Progress func(string)
	// Version and Command go into the report unchanged.
	Version string
	Command []string

	flowOffload bool
}

func (o Options) withDefaults() Options {
	def := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	def(&o.Services, 10_000)
	def(&o.Endpoints, 10)
	def(&o.Samples, 1000)
	if o.Mode == "" {
		o.Mode = Modes()[0]
	}
	if o.Only == nil {
		o.Only = Parts()
	}
	if o.Rates == nil {
		o.Rates = []float64{100, 1000, 10_000}
	}
	if o.ChurnTime == 0 {
		o.ChurnTime = 10 * time.Second
	}
	if o.Sizes == nil {
		o.Sizes = []int{1, 1000, 10_000, 100_000}
	}
	if o.ThroughputTime == 0 {
		o.ThroughputTime = 500 * time.Millisecond
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	return o
}

// maxEndpoints is the number of available endpoint addresses.
const maxEndpoints = 8_000_000

// Validate returns an error that lists all invalid options by the names of the flags of
// `fairlead-bench`.
func (o Options) Validate() error {
	o = o.withDefaults()
	var errs []error
	if !slices.Contains(Modes(), o.Mode) {
		errs = append(errs, fmt.Errorf("--mode: unknown mode %q: use %s", o.Mode, strings.Join(Modes(), " or ")))
	}
	for _, part := range o.Only {
		if !slices.Contains(Parts(), part) {
			errs = append(errs, fmt.Errorf("--only: unknown part %q: use one or more of %s", part, PartNames()))
		}
	}
	for _, v := range []struct {
		flag  string
		value int
	}{{"services", o.Services}, {"endpoints", o.Endpoints}, {"samples", o.Samples}} {
		if v.value < 1 {
			errs = append(errs, fmt.Errorf("--%s: invalid value %d: must be greater than 0", v.flag, v.value))
		}
	}
	for _, n := range append(slices.Clone(o.Sizes), o.Services) {
		if limit := maxEndpoints / max(o.Endpoints, 1); n > limit {
			errs = append(errs, fmt.Errorf("%d Services of %d endpoints need too many addresses: use at most %d Services", n, o.Endpoints, limit))
		}
	}
	for _, n := range o.Sizes {
		if n < 1 {
			errs = append(errs, fmt.Errorf("--data-path-services: invalid value %d: must be greater than 0", n))
		}
	}
	for _, rate := range o.Rates {
		if rate <= 0 {
			errs = append(errs, fmt.Errorf("--rates: invalid value %g: must be greater than 0", rate))
		}
	}
	for _, v := range []struct {
		flag  string
		value time.Duration
	}{{"churn-time", o.ChurnTime}, {"throughput-time", o.ThroughputTime}} {
		if v.value < 0 {
			errs = append(errs, fmt.Errorf("--%s: invalid duration %s: must not be negative", v.flag, v.value))
		}
	}
	return errors.Join(errs...)
}

// PartNames returns the names of all parts, separated by commas.
func PartNames() string {
	var names []string
	for _, p := range Parts() {
		names = append(names, string(p))
	}
	return strings.Join(names, ",")
}

// startCount returns how many starts are measured.
func (o Options) startCount() int { return min(max(o.Samples/100, 3), 20) }

// openDataplane opens the backend in a network namespace.
func (o Options) openDataplane(netns int) (dataplane.Dataplane, error) {
	b, err := backend.ByName(o.Mode)
	if err != nil {
		return nil, err
	}
	d, err := b.Dial(backend.Options{NetNS: netns, Logger: slog.New(slog.DiscardHandler)})
	if err != nil || !o.flowOffload {
		return d, err
	}
	return openOffloading(netns, d)
}
