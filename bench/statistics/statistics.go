// Package statistics summarizes benchmark results and computes confidence intervals.
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

// Summarize returns the distribution of the samples, or nil without samples. It does not change
// the order of samples.
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

// quantile interpolates between sorted samples: the median of two samples is their mean.
func quantile(sorted []float64, p float64) float64 {
	at := p * float64(len(sorted)-1)
	i := int(at)
	if i+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// Quantile returns a statistic for [Ratio]: the p-th quantile, with p from 0 to 1.
func Quantile(p float64) func(sorted []float64) float64 {
	return func(sorted []float64) float64 { return quantile(sorted, p) }
}

// Mean returns the arithmetic mean. It is a statistic for [Ratio].
func Mean(sorted []float64) float64 { return stat.Mean(sorted, nil) }

// confidence is the confidence level of intervals. resamplings is the number of resamplings of the
// bootstrap.
const (
	confidence  = 0.95
	resamplings = 2000
)

// Method is the name of the method of [Ratio] and [PairedRatio], for [result.Ratio].
const Method = "bootstrap"

// Ratio returns the ratio of a statistic of numerator to the same statistic of denominator. Its
// confidence interval is the percentile bootstrap: the samples of both are drawn again many times,
// with replacement. Ratio assumes that the samples are independent. The same samples give the same
// interval. Ratio returns an error if either has no samples.
func Ratio(numerator, denominator []float64, statistic func(sorted []float64) float64) (result.Interval, error) {
	if len(numerator) == 0 || len(denominator) == 0 {
		return result.Interval{}, errors.New("compute ratio: no samples of the numerator or the denominator")
	}
	n, d := slices.Sorted(slices.Values(numerator)), slices.Sorted(slices.Values(denominator))
	base := statistic(d)
	if base == 0 {
		return result.Interval{}, errors.New("compute ratio: denominator is 0")
	}
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // a fixed seed makes the interval reproducible
	ratios := make([]float64, 0, resamplings)
	resampled := [2][]float64{make([]float64, len(n)), make([]float64, len(d))}
	for range resamplings {
		resample(random, n, resampled[0])
		resample(random, d, resampled[1])
		if divisor := statistic(resampled[1]); divisor != 0 {
			ratios = append(ratios, statistic(resampled[0])/divisor)
		}
	}
	slices.Sort(ratios)
	return result.Interval{
		Ratio: statistic(n) / base, Confidence: confidence,
		Low: quantile(ratios, (1-confidence)/2), High: quantile(ratios, (1+confidence)/2),
	}, nil
}

// PairedRatio returns the median of the ratios of pairs: the i-th sample of numerator divided by
// the i-th sample of denominator. Its confidence interval is the percentile bootstrap of the
// pairs. PairedRatio is for samples taken alternately, so that other activity on the machine
// affects both. It returns an error if the numbers of samples differ or are 0, or if a denominator
// is 0.
func PairedRatio(numerator, denominator []float64) (result.Interval, error) {
	if len(numerator) != len(denominator) || len(numerator) == 0 {
		return result.Interval{}, fmt.Errorf("compute paired ratio: got %d samples of the numerator and %d of the denominator, want equal numbers above 0", len(numerator), len(denominator))
	}
	ratios := make([]float64, len(numerator))
	for i, n := range numerator {
		if denominator[i] == 0 {
			return result.Interval{}, errors.New("compute ratio: denominator is 0")
		}
		ratios[i] = n / denominator[i]
	}
	return Ratio(ratios, []float64{1}, Quantile(0.5))
}

// resample fills into with samples drawn from sorted, in sorted order. It counts how often each
// sample is drawn instead of sorting, which would take most of the time.
func resample(random *rand.Rand, sorted, into []float64) {
	drawn := make([]int, len(sorted))
	for range into {
		drawn[random.IntN(len(sorted))]++
	}
	i := 0
	for index, count := range drawn {
		for range count {
			into[i] = sorted[index]
			i++
		}
	}
}

// Fit is the result of a chi-squared test.
type Fit struct {
	ChiSquared       float64
	DegreesOfFreedom int
	// P is the probability of equal or larger deviations by chance.
	P float64
}

// FitUniform tests whether counts fit equally likely outcomes. It needs at least two counts with a
// mean of at least five.
func FitUniform(counts []int) (Fit, error) {
	var sum int
	for _, c := range counts {
		sum += c
	}
	const minMean = 5 // with a smaller mean, the statistic does not follow the chi-squared distribution
	if len(counts) < 2 || sum < minMean*len(counts) {
		return Fit{}, fmt.Errorf("chi-squared test: got %d counts with the sum %d, want at least two counts with a mean of at least %d", len(counts), sum, minMean)
	}
	observed, expected := make([]float64, len(counts)), make([]float64, len(counts))
	for i, c := range counts {
		observed[i], expected[i] = float64(c), float64(sum)/float64(len(counts))
	}
	fit := Fit{ChiSquared: stat.ChiSquare(observed, expected), DegreesOfFreedom: len(counts) - 1}
	fit.P = distuv.ChiSquared{K: float64(fit.DegreesOfFreedom)}.Survival(fit.ChiSquared)
	return fit, nil
}
