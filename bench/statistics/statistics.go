// Package statistics sums up what benchmarks measure, and says how sure one can be
// of it.
package statistics

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"

	"gonum.org/v1/gonum/stat"
	"gonum.org/v1/gonum/stat/distuv"

	"fairlead.io/fairlead/bench/result"
)

// Summarize returns the distribution of the samples, nil if there are none. It
// leaves them in their order.
func Summarize(samples []float64) *result.Distribution {
	if len(samples) == 0 {
		return nil
	}
	sorted := slices.Sorted(slices.Values(samples))
	return &result.Distribution{
		N: len(sorted), Min: sorted[0], Mean: stat.Mean(sorted, nil), Max: sorted[len(sorted)-1],
		P50: quantile(sorted, 0.5), P90: quantile(sorted, 0.9), P99: quantile(sorted, 0.99),
	}
}

// quantile interpolates between sorted samples, so that the median of two is the
// middle between them.
func quantile(sorted []float64, p float64) float64 {
	at := p * float64(len(sorted)-1)
	i := int(at)
	if i+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// Quantile is a statistic for [Ratio]: the p-th quantile, with p from 0 to 1.
func Quantile(p float64) func(sorted []float64) float64 {
	return func(sorted []float64) float64 { return quantile(sorted, p) }
}

// Mean is a statistic for [Ratio].
func Mean(sorted []float64) float64 { return stat.Mean(sorted, nil) }

// confidence is that of intervals, and resamplings how often a bootstrap draws.
const (
	confidence  = 0.95
	resamplings = 2000
)

// Method is the name of what [Ratio] and [PairedRatio] do, for [result.Ratio].
const Method = "bootstrap"

// Ratio returns the ratio of a statistic of numerator to that of denominator, with
// its confidence interval by the percentile bootstrap: the samples of each are
// drawn anew, with replacement, many times. The samples are taken to be independent.
// The same samples give the same interval. Without samples of each it is an error.
func Ratio(numerator, denominator []float64, statistic func(sorted []float64) float64) (result.Interval, error) {
	if len(numerator) == 0 || len(denominator) == 0 {
		return result.Interval{}, errors.New("a ratio needs samples of both")
	}
	n, d := slices.Sorted(slices.Values(numerator)), slices.Sorted(slices.Values(denominator))
	below := statistic(d)
	if below == 0 {
		return result.Interval{}, errors.New("a ratio needs a denominator other than 0")
	}
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // so that it can be repeated
	ratios := make([]float64, 0, resamplings)
	again := [2][]float64{make([]float64, len(n)), make([]float64, len(d))}
	for range resamplings {
		resample(random, n, again[0])
		resample(random, d, again[1])
		if under := statistic(again[1]); under != 0 {
			ratios = append(ratios, statistic(again[0])/under)
		}
	}
	slices.Sort(ratios)
	return result.Interval{
		Ratio: statistic(n) / below, Confidence: confidence,
		Low: quantile(ratios, (1-confidence)/2), High: quantile(ratios, (1+confidence)/2),
	}, nil
}

// PairedRatio returns the median of the ratios of samples of numerator to those of
// denominator at the same place, with its confidence interval by the percentile
// bootstrap of the pairs. It is for samples that were taken in turns, so that what the
// machine did meanwhile is in both. It is an error if they are not as many, or if there are none,
// or one of the denominator is 0.
func PairedRatio(numerator, denominator []float64) (result.Interval, error) {
	if len(numerator) != len(denominator) || len(numerator) == 0 {
		return result.Interval{}, fmt.Errorf("a ratio of pairs needs as many samples of both: got %d and %d", len(numerator), len(denominator))
	}
	ratios := make([]float64, len(numerator))
	for i, n := range numerator {
		if denominator[i] == 0 {
			return result.Interval{}, errors.New("a ratio needs a denominator other than 0")
		}
		ratios[i] = n / denominator[i]
	}
	return Ratio(ratios, []float64{1}, Quantile(0.5))
}

// resample fills into with samples drawn from sorted ones, sorted. It counts how often each is
// drawn, since sorting would take most of the time.
func resample(random *rand.Rand, sorted, into []float64) {
	drawn := make([]int, len(sorted))
	for range into {
		drawn[random.IntN(len(sorted))]++
	}
	i := 0
	for at, times := range drawn {
		for range times {
			into[i] = sorted[at]
			i++
		}
	}
}

// Fit is the outcome of a chi-squared test.
type Fit struct {
	ChiSquared       float64
	DegreesOfFreedom int
	// P is how likely counts that differ as much, or more, are by chance.
	P float64
}

// FitUniform tests whether counts are those of equally likely outcomes. It needs
// at least two counts, and five of each on average.
func FitUniform(counts []int) (Fit, error) {
	var sum int
	for _, c := range counts {
		sum += c
	}
	const least = 5 // below, the statistic is not distributed as chi-squared is
	if len(counts) < 2 || sum < least*len(counts) {
		return Fit{}, fmt.Errorf("a chi-squared test needs two counts or more, and %d of each on average: got %d of %d", least, sum, len(counts))
	}
	observed, expected := make([]float64, len(counts)), make([]float64, len(counts))
	for i, c := range counts {
		observed[i], expected[i] = float64(c), float64(sum)/float64(len(counts))
	}
	fit := Fit{ChiSquared: stat.ChiSquare(observed, expected), DegreesOfFreedom: len(counts) - 1}
	fit.P = distuv.ChiSquared{K: float64(fit.DegreesOfFreedom)}.Survival(fit.ChiSquared)
	return fit, nil
}
