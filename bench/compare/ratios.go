package compare

import (
	"slices"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/statistics"
)

// fairleadSystems are the systems that others are compared with.
func fairleadSystems() []string { return []string{"nft", "ipvs"} }

// minSamples is how many samples of each a ratio needs: of fewer its interval would say
// that it is surer than it is.
const minSamples = 3

// ratios compares each system with Fairlead's, where they were measured under the
// same circumstances.
func ratios(measurements []result.Measurement) []result.Ratio {
	var list []result.Ratio
	for i := range measurements {
		of := &measurements[i]
		for j := range measurements {
			to := &measurements[j]
			if i == j || !slices.Contains(fairleadSystems(), to.System) || of.Measure != to.Measure ||
				of.Environment != to.Environment || of.Scenario != to.Scenario || min(len(of.Samples), len(to.Samples)) < minSamples {
				continue
			}
			name, statistic := "p50", statistics.Quantile(0.5)
			if of.Measure == result.ChurnCPU || of.Measure == result.ColdStartCPU {
				name, statistic = "mean", statistics.Mean
			}
			interval, err := statistics.Ratio(of.Samples, to.Samples, statistic)
			if err != nil {
				continue // too fast for the clock, or no samples
			}
			list = append(list, result.Ratio{
				Measure: of.Measure, Statistic: name, Environment: of.Environment, Scenario: of.Scenario,
				Numerator: of.System, Denominator: to.System, Interval: interval,
				NumeratorSamples: len(of.Samples), DenominatorSamples: len(to.Samples), Method: statistics.Method,
			})
		}
	}
	return list
}
