package bench

import (
	"context"
	"fmt"
	"slices"
	"time"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/statistics"
)

// Run measures Fairlead on this machine, in separate network namespaces that it removes before it
// returns. It needs CAP_NET_ADMIN and CAP_SYS_ADMIN. If ctx is done, Run returns the context's
// error.
func Run(ctx context.Context, o Options) (*result.Report, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	o = o.withDefaults()
	begin := time.Now()
	environment := result.DetectEnvironment()
	m := &measurements{system: o.Mode, environment: environment.Name}
	report := &result.Report{
		Schema: result.Schema, Time: begin.UTC().Truncate(time.Second), Command: o.Command, Version: o.Version,
		Environments: []result.Environment{environment},
		Systems:      []result.System{{Name: o.Mode, Version: o.Version}},
	}
	for _, stage := range []struct {
		parts []Part
		run   func(context.Context, Options, *measurements) error
	}{
		{[]Part{Update}, update},
		{[]Part{Start, Restart}, start},
		{[]Part{Churn}, churn},
		{[]Part{DataPath}, dataPath},
		{[]Part{Established}, establishedConnections},
		{[]Part{Fairness}, fairness},
		{[]Part{Memory}, memory},
	} {
		if !slices.ContainsFunc(stage.parts, o.includes) {
			continue
		}
		if err := stage.run(ctx, o, m); err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("measure %s: %w", stage.parts[0], err)
		}
	}
	report.Systems = append(report.Systems, m.systems...)
	if o.includes(DataPath) || o.includes(Established) {
		report.Systems = append(report.Systems, result.System{Name: result.Direct})
	}
	report.Measurements, report.Ratios, report.Notes, report.LeftOut = m.all, m.ratios, m.notes, m.leftOut
	report.TookSeconds = time.Since(begin).Seconds()
	return report, nil
}

func (o Options) includes(p Part) bool { return slices.Contains(o.Only, p) }

// measurements collects the results for one system.
type measurements struct {
	system      string
	environment string
	all         []result.Measurement
	ratios      []result.Ratio
	notes       []string
	// systems are additional systems.
	systems []result.System
	leftOut []result.LeftOut
}

// addSamples adds a measurement of m.system, unless samples and values are both empty.
func (m *measurements) addSamples(measure result.Measure, scenario result.Scenario, unit string, samples []float64, values ...result.Value) {
	m.add(m.system, measure, scenario, unit, samples, values...)
}

// add adds a measurement of the named system, unless samples and values are both empty. It omits
// more than [result.MaxSamples] samples.
func (m *measurements) add(
	system string, measure result.Measure, scenario result.Scenario, unit string, samples []float64, values ...result.Value,
) {
	if len(samples) == 0 && len(values) == 0 {
		return
	}
	measurement := result.Measurement{
		Measure: measure, System: system, Environment: m.environment, Scenario: scenario, Unit: unit,
		Distribution: statistics.Summarize(samples), Values: values,
	}
	if len(samples) <= result.MaxSamples {
		measurement.Samples = samples
	}
	m.all = append(m.all, measurement)
}

// leaveOut records why a measurement is not taken.
func (m *measurements) leaveOut(system string, measure result.Measure, reason string) {
	m.leftOut = append(m.leftOut, result.LeftOut{System: system, Measure: measure, Environment: m.environment, Reason: reason})
}

// namedSamples are the samples of a system.
type namedSamples struct {
	system  string
	samples []float64
}

// addPairedRatio adds the median of the ratios of samples that were taken in direct succession.
func (m *measurements) addPairedRatio(measure result.Measure, scenario result.Scenario, numerator, denominator namedSamples) error {
	interval, err := statistics.PairedRatio(numerator.samples, denominator.samples)
	if err != nil {
		return fmt.Errorf("compare %s: %w", measure, err)
	}
	m.ratios = append(m.ratios, result.Ratio{
		Measure: measure, Statistic: "paired-p50", Environment: m.environment, Scenario: scenario,
		Numerator: numerator.system, Denominator: denominator.system, Interval: interval,
		NumeratorSamples: len(numerator.samples), DenominatorSamples: len(denominator.samples), Method: statistics.Method,
	})
	return nil
}

func (m *measurements) addNote(text string) { m.notes = append(m.notes, text) }
