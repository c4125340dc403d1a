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

// Part is a part of what [Run] measures.
type Part string

// The parts.
const (
	Update   Part = "update"    // how long one change takes
	Start    Part = "start"     // on a new node
	Restart  Part = "restart"   // with everything programmed
	Churn    Part = "churn"     // many changes, for a while
	DataPath Part = "data-path" // connections through Services, and direct ones
	Fairness Part = "fairness"  // how connections spread over endpoints
	Memory   Part = "memory"    // of the program and of the kernel
)

// Parts are all parts, in the order in which they are measured.
func Parts() []Part { return []Part{Update, Start, Restart, Churn, DataPath, Fairness, Memory} }

// Modes are the backends that can be measured, the default first.
func Modes() []string { return backend.Names() }

// Options say what [Run] measures. The zero value stands for the defaults.
type Options struct {
	// Mode is the backend, one of [Modes].
	Mode string
	// Services is the number of Services, 10,000, and Endpoints that of each, 10.
	Services, Endpoints int
	// Samples is how often each kind of change is measured, 1,000 times, and how
	// many connections are; starts are measured a hundredth as often, from 3 to
	// 20 times.
	Samples int
	// Only are the parts to measure. Nil: all.
	Only []Part
	// Rates are the numbers of changes a second of [Churn], 100, 1,000 and 10,000,
	// and ChurnTime is how long each lasts, 10 s.
	Rates     []float64
	ChurnTime time.Duration
	// Sizes are the numbers of Services that the data path is measured with: 1,
	// 1,000, 10,000 and 100,000. ThroughputTime is how long each transfer
	// lasts, half a second.
	Sizes          []int
	ThroughputTime time.Duration
	// Progress is told what is under way, in words for people. It may be called often.
	Progress func(string)
	// Version and Command are those that the report names.
	Version string
	Command []string
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

// maxEndpoints is the number of endpoints that there are addresses for.
const maxEndpoints = 8_000_000

// Validate returns what is wrong with options, with all of it named as the flags of
// `fairlead-bench` are.
func (o Options) Validate() error {
	o = o.withDefaults()
	var errs []error
	if !slices.Contains(Modes(), o.Mode) {
		errs = append(errs, fmt.Errorf("--mode: unknown mode %q: use %s", o.Mode, strings.Join(Modes(), " or ")))
	}
	for _, part := range o.Only {
		if !slices.Contains(Parts(), part) {
			errs = append(errs, fmt.Errorf("--only: unknown part %q: use some of %s", part, PartNames()))
		}
	}
	for _, v := range []struct {
		flag  string
		value int
	}{{"services", o.Services}, {"endpoints", o.Endpoints}, {"samples", o.Samples}} {
		if v.value < 1 {
			errs = append(errs, fmt.Errorf("--%s: %d: use a number above 0", v.flag, v.value))
		}
	}
	for _, n := range append(slices.Clone(o.Sizes), o.Services) {
		if most := maxEndpoints / max(o.Endpoints, 1); n > most {
			errs = append(errs, fmt.Errorf("%d Services of %d endpoints: there are addresses for %d such Services", n, o.Endpoints, most))
		}
	}
	for _, n := range o.Sizes {
		if n < 1 {
			errs = append(errs, fmt.Errorf("--data-path-services: %d: use numbers above 0", n))
		}
	}
	for _, rate := range o.Rates {
		if rate <= 0 {
			errs = append(errs, fmt.Errorf("--rates: %g: use numbers above 0", rate))
		}
	}
	for _, v := range []struct {
		flag  string
		value time.Duration
	}{{"churn-time", o.ChurnTime}, {"throughput-time", o.ThroughputTime}} {
		if v.value < 0 {
			errs = append(errs, fmt.Errorf("--%s: %s: use a time above 0", v.flag, v.value))
		}
	}
	return errors.Join(errs...)
}

// PartNames returns the names of all parts, for people.
func PartNames() string {
	var names []string
	for _, p := range Parts() {
		names = append(names, string(p))
	}
	return strings.Join(names, ",")
}

// startCount is how often a start is measured.
func (o Options) startCount() int { return min(max(o.Samples/100, 3), 20) }

// openDataplane opens the backend in a network namespace.
func (o Options) openDataplane(netns int) (dataplane.Dataplane, error) {
	b, err := backend.ByName(o.Mode)
	if err != nil {
		return nil, err
	}
	return b.Dial(backend.Options{NetNS: netns, Logger: slog.New(slog.DiscardHandler)})
}
