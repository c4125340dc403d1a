package compare

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/rig"
)

// pauseMin and pauseMax bound the time between two changes of which the effect is
// looked at, under churn. It is drawn at random: in step with a system that
// gathers changes for a while, each look would see the same part of that while.
const (
	pauseMin = 50 * time.Millisecond
	pauseMax = 150 * time.Millisecond
)

// churn has endpoints replaced at a rate, for one system at a time.
func (c *comparison) churn(ctx context.Context, nodes []*node, services int, rate float64) error {
	scenario := result.Scenario{Change: result.ReplaceEndpoint, Services: services, Endpoints: c.Endpoints, Rate: rate}
	for i := range c.Rounds {
		for _, n := range rotated(nodes, i) {
			if err := n.settle(ctx, c.Settle); err != nil {
				return err
			}
			if err := c.churnOf(ctx, n, scenario); err != nil {
				return fmt.Errorf("%s under churn: %w", n.sys.Name(), err)
			}
			n.settled = time.Now()
		}
	}
	return nil
}

func (c *comparison) churnOf(ctx context.Context, n *node, scenario result.Scenario) error {
	ctx, cancel := n.whileRunning(ctx)
	defer cancel()
	before, err := n.usage()
	if err != nil {
		return err
	}
	begin := time.Now()
	feeding, stop := context.WithTimeout(ctx, c.Duration)
	defer stop()
	type fed struct {
		changes int
		err     error
	}
	done := make(chan fed, 1)
	go func() {
		changes, err := n.feed(ctx, feeding.Done(), scenario.Rate)
		done <- fed{changes, err}
	}()
	var lags []float64
	looks := 0
	look := func() error {
		i, giveBack := n.take()
		defer giveBack()
		event, by := n.replace(ctx, i, true)
		looks++
		took, err := n.see(ctx, event, func(ctx context.Context) (rig.Sighting, error) {
			return n.probe.FirstArrival(ctx, event.at, n.services[i].Addr(), rig.At(by))
		})
		if err != nil {
			return err
		}
		lags = append(lags, took.Seconds())
		return nil
	}
	for feeding.Err() == nil {
		if err := look(); err != nil {
			return err
		}
		_ = sleep(feeding, pauseMin+rand.N(pauseMax-pauseMin)) // the loop ends then
	}
	f := <-done
	if f.err != nil {
		return f.err
	}
	// When this is seen so is all that went before.
	if err := look(); err != nil {
		return err
	}
	took := time.Since(begin)
	after, err := n.usage()
	if err != nil {
		return err
	}
	changes := f.changes + looks
	cpu := after.CPU() - before.CPU()
	for _, lag := range lags {
		c.sample(n, result.Churn, scenario, "s", lag)
	}
	c.sample(n, result.ChurnCPU, scenario, "s", cpu.Seconds()/float64(changes))
	m := c.measurement(n.sys.Name(), result.Churn, scenario)
	add(m, "cpu", "s", cpu.Seconds())
	add(m, "duration", "s", took.Seconds())
	add(m, "changes", "1", float64(changes))
	m.Values = set(m.Values, "resident", "B", float64(after.Resident))
	c.progress("%s: %d changes in %s took %s of processor time, %.1f µs each; %d MB resident",
		n.sys.Name(), changes, took.Round(10*time.Millisecond), cpu, cpu.Seconds()*1e6/float64(changes), after.Resident/1e6)
	return nil
}

// add adds to a value of the measurement.
func add(m *result.Measurement, name, unit string, v float64) {
	old, _ := m.Value(name)
	m.Values = set(m.Values, name, unit, old.Value+v)
}

func set(values []result.Value, name, unit string, v float64) []result.Value {
	for i := range values {
		if values[i].Name == name {
			values[i].Value = v
			return values
		}
	}
	return append(values, result.Value{Name: name, Unit: unit, Value: v})
}

// mean makes another sample part of a value that is the mean of as many as the
// measurement has samples.
func mean(m *result.Measurement, name, unit string, v float64) {
	old, _ := m.Value(name)
	m.Values = set(m.Values, name, unit, old.Value+(v-old.Value)/float64(len(m.Samples)))
}

// writers is how many requests are made at a time where many are made.
const writers = 16

// feed replaces endpoints of Services drawn at random, at a rate, until end. It returns
// how many, when all are answered.
func (n *node) feed(ctx context.Context, end <-chan struct{}, rate float64) (changes int, err error) {
	const shortest = time.Millisecond
	ticker := time.NewTicker(max(shortest, time.Duration(float64(time.Second)/rate)))
	defer ticker.Stop()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(min(writers, len(n.services)/2)) // each has one that it changes, and so has who looks
	begin := time.Now()
	for {
		select {
		case <-end:
			return changes, group.Wait()
		case <-ctx.Done():
			return changes, group.Wait()
		case <-ticker.C:
		}
		for due := int(time.Since(begin).Seconds() * rate); changes < due && ctx.Err() == nil; changes++ {
			group.Go(func() error {
				i, giveBack := n.take()
				defer giveBack()
				event, _ := n.replace(ctx, i, false)
				return event.wait()
			})
		}
	}
}
