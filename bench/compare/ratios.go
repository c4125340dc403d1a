package compare

import (
	"slices"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/statistics"
	"fairlead.io/fairlead/bench/system"
)

// fairleadSystems returns the systems that others are compared with.
func fairleadSystems() []string {
	return []string{system.ModeNFT, system.NFTFlowOffload, system.ModeIPVS}
}

// minSamples is the number of samples of each system that a ratio needs. Fewer samples give a
// confidence interval that is too narrow.
const minSamples = 3

// pairedMeasures returns the measures whose samples of all systems are taken in direct succession.
func pairedMeasures() []result.Measure {
	return []result.Measure{result.FirstPacket, result.Connect, result.PacketTime, result.TransferTime}
}

// ratios compares each system with Fairlead's systems in the same scenarios.
func ratios(measurements []result.Measurement) []result.Ratio {
	var list []result.Ratio
	for i := range measurements {
		numerator := &measurements[i]
		for j := range measurements {
			denominator := &measurements[j]
			if i == j || !slices.Contains(fairleadSystems(), denominator.System) || numerator.Measure != denominator.Measure ||
				numerator.Environment != denominator.Environment || numerator.Scenario != denominator.Scenario || min(len(numerator.Samples), len(denominator.Samples)) < minSamples {
				continue
			}
			name, statistic := "p50", statistics.Quantile(0.5)
			if numerator.Measure == result.ChurnCPU || numerator.Measure == result.ColdStartCPU {
				name, statistic = "mean", statistics.Mean
			}
			compare := statistics.Ratio
			if slices.Contains(pairedMeasures(), numerator.Measure) {
				name, compare = "paired-p50", func(a, b []float64, _ func([]float64) float64) (result.Interval, error) {
					return statistics.PairedRatio(a, b)
				}
			}
			interval, err := compare(numerator.Samples, denominator.Samples, statistic)
			if err != nil {
				continue // the denominator is 0: too fast for the clock
			}
			list = append(list, result.Ratio{
				Measure: numerator.Measure, Statistic: name, Environment: numerator.Environment, Scenario: numerator.Scenario,
				Numerator: numerator.System, Denominator: denominator.System, Interval: interval,
				NumeratorSamples: len(numerator.Samples), DenominatorSamples: len(denominator.Samples), Method: statistics.Method,
			})
		}
	}
	return list
}
