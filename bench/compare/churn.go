package compare

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
)

// observeIntervalMin and observeIntervalMax bound the time between two changes of which the effect is
// looked at, under churn. It is drawn at random: in step with a system that
// gathers changes for a while, each look would see the same part of that while.
const (
	observeIntervalMin = 50 * time.Millisecond
	observeIntervalMax = 150 * time.Millisecond
)

// churn has endpoints replaced at a rate, for one system at a time.
func (c *comparison) churn(ctx context.Context, nodes []*node, services int, rate float64) error {
	scenario := result.Scenario{Change: result.ReplaceEndpoint, Services: services, Endpoints: c.Endpoints, Rate: rate}
	for i := range c.Rounds {
		for _, n := range rotated(nodes, i) {
			if err := n.waitSettled(ctx, c.SettleTime); err != nil {
				return err
			}
			if err := c.churnSystem(ctx, n, scenario); err != nil {
				return fmt.Errorf("%s under churn: %w", n.sys.Name(), err)
			}
			n.settledAt = time.Now()
		}
	}
	return nil
}

func (c *comparison) churnSystem(ctx context.Context, n *node, scenario result.Scenario) error {
	ctx, cancel := n.contextWhileRunning(ctx)
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
		changes, err := n.churn(ctx, feeding.Done(), scenario.Rate)
		done <- fed{changes, err}
	}()
	var lags []float64
	looks := 0
	look := func() error {
		i, giveBack := n.acquireService()
		defer giveBack()
		event, by := n.replaceEndpoint(ctx, i, true)
		looks++
		took, err := n.observe(ctx, event, func(ctx context.Context) (testbed.Observation, error) {
			return n.probe.FirstArrival(ctx, event.sentAt, n.services[i].Addr(), testbed.ToEndpoint(by))
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
		_ = sleep(feeding, observeIntervalMin+rand.N(observeIntervalMax-observeIntervalMin)) // the loop ends then
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
		c.addSample(n, result.Churn, scenario, "s", lag)
	}
	c.addSample(n, result.ChurnCPU, scenario, "s", cpu.Seconds()/float64(changes))
	m := c.measurement(n.sys.Name(), result.Churn, scenario)
	addToValue(m, "cpu", "s", cpu.Seconds())
	addToValue(m, "duration", "s", took.Seconds())
	addToValue(m, "changes", "1", float64(changes))
	m.Values = setValue(m.Values, "resident", "B", float64(after.Resident))
	c.progress("%s: %d changes in %s took %s of processor time, %.1f µs each; %d MB resident",
		n.sys.Name(), changes, took.Round(10*time.Millisecond), cpu, cpu.Seconds()*1e6/float64(changes), after.Resident/1e6)
	return nil
}

// addToValue adds to a value of the measurement.
func addToValue(m *result.Measurement, name, unit string, v float64) {
	old, _ := m.Value(name)
	m.Values = setValue(m.Values, name, unit, old.Value+v)
}

func setValue(values []result.Value, name, unit string, v float64) []result.Value {
	for i := range values {
		if values[i].Name == name {
			values[i].Value = v
			return values
		}
	}
	return append(values, result.Value{Name: name, Unit: unit, Value: v})
}

// updateMean makes another sample part of a value that is the mean of as many as the
// measurement has samples.
func updateMean(m *result.Measurement, name, unit string, v float64) {
	old, _ := m.Value(name)
	m.Values = setValue(m.Values, name, unit, old.Value+(v-old.Value)/float64(len(m.Samples)))
}

// maxConcurrentRequests is how many requests are made at a time where many are made.
const maxConcurrentRequests = 16

// churn replaces endpoints of Services drawn at random, at a rate, until end. It returns
// how many, when all are answered.
func (n *node) churn(ctx context.Context, end <-chan struct{}, rate float64) (changes int, err error) {
	const shortest = time.Millisecond
	ticker := time.NewTicker(max(shortest, time.Duration(float64(time.Second)/rate)))
	defer ticker.Stop()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(min(maxConcurrentRequests, len(n.services)/2)) // each has one that it changes, and so has who looks
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
				i, giveBack := n.acquireService()
				defer giveBack()
				event, _ := n.replaceEndpoint(ctx, i, false)
				return event.wait()
			})
		}
	}
}
