package dataplane_test

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"iter"
	"log"
	"maps"
	"net/netip"
	"os"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// printer is a backend that prints each change and programs nothing. The tests of the laws run
// against it, see forEachHistory.
type printer struct {
	out io.Writer
	// state simulates the kernel. A real backend reads it from the kernel.
	state dataplane.State
	lines int
	// schedulers lists the supported values of ServiceSpec.Scheduler. The backend's entry in
	// internal/backend lists them too.
	schedulers []string
}

var _ dataplane.Dataplane = (*printer)(nil)

func newPrinter(out io.Writer, schedulers ...string) *printer {
	return &printer{out: out, state: dataplane.State{}, schedulers: schedulers}
}

// Replace writes the difference between the state and the Services.
func (p *printer) Replace(ctx context.Context, _ dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	failed := map[dataplane.Key]error{}
	// A nil Binding removes the frontend, unless a Service has it.
	desired := map[dataplane.Frontend]*dataplane.Binding{}
	for f := range p.state {
		desired[f] = nil
	}
	complete := 0
	for s := range services {
		if p.addDesired(desired, s, failed) {
			complete++
		}
	}
	p.write(desired)
	if progress != nil {
		progress(complete)
	}
	return keyedError("replace", failed)
}

// Apply processes only the frontends of the changes. It removes every Old before it adds any New,
// because a frontend may move from one Service to another (law 3).
func (p *printer) Apply(ctx context.Context, changes []dataplane.Change) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	failed := map[dataplane.Key]error{}
	desired := map[dataplane.Frontend]*dataplane.Binding{}
	for _, c := range changes {
		if c.Old != nil {
			for _, f := range c.Old.Frontends {
				desired[f] = nil
			}
		}
	}
	for _, c := range changes {
		if c.New != nil {
			p.addDesired(desired, c.New, failed)
		}
	}
	p.write(desired)
	return keyedError("apply", failed)
}

// addDesired adds the frontends of a Service and returns true. If the backend cannot program the
// Service, it records an error and returns false.
func (p *printer) addDesired(desired map[dataplane.Frontend]*dataplane.Binding, s *dataplane.Service, failed map[dataplane.Key]error) bool {
	if s.Scheduler != "" && !slices.Contains(p.schedulers, s.Scheduler) {
		failed[s.Key] = fmt.Errorf("scheduler %s: %w", s.Scheduler, dataplane.ErrUnsupported)
		return false
	}
	for _, f := range s.Frontends {
		desired[f] = &dataplane.Binding{Service: s.Key.Service(), ServiceSpec: s.ServiceSpec}
	}
	return true
}

func keyedError(op string, failed map[dataplane.Key]error) error {
	if len(failed) == 0 {
		return nil
	}
	return &dataplane.Error{Op: op, Failed: failed}
}

// write prints a line for each frontend that changes and nothing for equal ones (law 4).
func (p *printer) write(desired map[dataplane.Frontend]*dataplane.Binding) {
	for _, f := range slices.SortedFunc(maps.Keys(desired), dataplane.Frontend.Compare) {
		had, ok := p.state[f]
		b := desired[f]
		switch {
		case b == nil && ok:
			p.print("- %s", f)
			delete(p.state, f)
		case b != nil && (!ok || !had.Equal(*b)):
			p.print("+ %s of %s: %s", f, b.Service, b.ServiceSpec)
			p.state[f] = *b
		case b != nil:
			p.state[f] = *b // the name of the Service may have changed
		}
	}
}

func (p *printer) print(format string, args ...any) {
	p.lines++
	_, _ = fmt.Fprintf(p.out, format+"\n", args...)
}

// Read returns a copy of the state.
func (p *printer) Read(ctx context.Context) (dataplane.State, error) {
	return maps.Clone(p.state), ctx.Err()
}

// Drift returns nil, a channel that never receives a value: no other program changes the state.
func (p *printer) Drift() <-chan struct{} { return nil }

// Close leaves the state in place.
func (p *printer) Close() error { return nil }

// A backend translates Services and makes no Kubernetes decisions. See docs/writing-a-backend.md
// for the other parts of a Fairlead backend.
func Example_backend() {
	web := func(endpoints ...string) *dataplane.Service {
		var list []dataplane.Endpoint
		for _, e := range endpoints {
			list = append(list, dataplane.Endpoint{Addr: netip.MustParseAddrPort(e)})
		}
		s, err := dataplane.NewService(
			dataplane.Key{Namespace: "shop", Name: "web", Family: dataplane.IPv4},
			[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort("10.96.0.10:80")}},
			dataplane.ServiceSpec{Endpoints: list},
		)
		if err != nil {
			log.Fatal(err)
		}
		return s
	}
	ctx := context.Background()
	var d dataplane.Dataplane = newPrinter(os.Stdout)
	one, two := web("10.0.0.1:8080"), web("10.0.0.1:8080", "10.0.0.2:8080")
	err := cmp.Or(
		d.Replace(ctx, dataplane.Node{}, slices.Values([]*dataplane.Service{one}), nil),
		d.Apply(ctx, []dataplane.Change{{Old: one, New: two}}),
		d.Apply(ctx, []dataplane.Change{{Old: two, New: two}}), // equal values: writes nothing
		d.Apply(ctx, []dataplane.Change{{Old: two}}),
	)
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// + 10.96.0.10:80/TCP of shop/web: [10.0.0.1:8080]
	// + 10.96.0.10:80/TCP of shop/web: [10.0.0.1:8080 10.0.0.2:8080]
	// - 10.96.0.10:80/TCP
}
