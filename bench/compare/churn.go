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

// observeIntervalMin and observeIntervalMax bound the time between two changes under churn whose
// effect is observed. The time is random, so that it is not in step with a system that coalesces
// changes for a fixed period: otherwise each observation would fall into the same part of that
// period.
const (
	observeIntervalMin = 50 * time.Millisecond
	observeIntervalMax = 150 * time.Millisecond
)

// churn replaces endpoints at a rate, on one system at a time.
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

// churnSystem runs one round of churn on a system.
func (c *comparison) churnSystem(ctx context.Context, n *node, scenario result.Scenario) error {
	ctx, cancel := n.contextWhileRunning(ctx)
	defer cancel()
	before, err := n.usage()
	if err != nil {
		return err
	}
	begin := time.Now()
	churning, stop := context.WithTimeout(ctx, c.Duration)
	defer stop()
	type outcome struct {
		changes int
		err     error
	}
	done := make(chan outcome, 1)
	go func() {
		changes, err := n.churn(ctx, churning.Done(), scenario.Rate)
		done <- outcome{changes, err}
	}()
	var latencies []float64
	observations := 0
	observe := func() error {
		i, release := n.acquireService()
		defer release()
		event, by := n.replaceEndpoint(ctx, i, true)
		observations++
		took, err := n.observe(ctx, event, func(ctx context.Context) (testbed.Observation, error) {
			return n.probe.FirstArrival(ctx, event.sentAt, n.services[i].Addr(), testbed.ToEndpoint(by))
		})
		if err != nil {
			return err
		}
		latencies = append(latencies, took.Seconds())
		return nil
	}
	for churning.Err() == nil {
		if err := observe(); err != nil {
			return err
		}
		_ = sleep(churning, observeIntervalMin+rand.N(observeIntervalMax-observeIntervalMin)) // the loop condition checks for the end
	}
	churned := <-done
	if churned.err != nil {
		return churned.err
	}
	// The effect of this last change implies the effects of all earlier changes.
	if err := observe(); err != nil {
		return err
	}
	took := time.Since(begin)
	after, err := n.usage()
	if err != nil {
		return err
	}
	changes := churned.changes + observations
	cpu := after.CPU() - before.CPU()
	for _, latency := range latencies {
		c.addSample(n, result.Churn, scenario, "s", latency)
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

// addToValue adds v to a value of the measurement.
func addToValue(m *result.Measurement, name, unit string, v float64) {
	old, _ := m.Value(name)
	m.Values = setValue(m.Values, name, unit, old.Value+v)
}

// setValue sets the value with the given name and returns the values.
func setValue(values []result.Value, name, unit string, v float64) []result.Value {
	for i := range values {
		if values[i].Name == name {
			values[i].Value = v
			return values
		}
	}
	return append(values, result.Value{Name: name, Unit: unit, Value: v})
}

// updateMean includes v in a value that is the mean over the samples of the measurement. The
// caller must have added the sample of v.
func updateMean(m *result.Measurement, name, unit string, v float64) {
	old, _ := m.Value(name)
	m.Values = setValue(m.Values, name, unit, old.Value+(v-old.Value)/float64(len(m.Samples)))
}

// maxConcurrentRequests limits concurrent requests to an API server.
const maxConcurrentRequests = 16

// churn replaces endpoints of random Services at a rate until end is closed. It returns the number
// of changes after the API server has answered all requests.
func (n *node) churn(ctx context.Context, end <-chan struct{}, rate float64) (changes int, err error) {
	const minPeriod = time.Millisecond
	ticker := time.NewTicker(max(minPeriod, time.Duration(float64(time.Second)/rate)))
	defer ticker.Stop()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(min(maxConcurrentRequests, len(n.services)/2)) // each request, and the observer, needs a separate Service
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
				i, release := n.acquireService()
				defer release()
				event, _ := n.replaceEndpoint(ctx, i, false)
				return event.wait()
			})
		}
	}
}
