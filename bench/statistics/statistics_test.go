package statistics_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/statistics"
)

func TestSummarize(t *testing.T) {
	for name, tc := range map[string]struct {
		samples []float64
		want    *result.Distribution
	}{
		"no samples": {nil, nil},
		"one":        {[]float64{3}, &result.Distribution{N: 1, Min: 3, Mean: 3, P50: 3, P90: 3, P99: 3, Max: 3}},
		"two":        {[]float64{4, 2}, &result.Distribution{N: 2, Min: 2, Mean: 3, P50: 3, P90: 3.8, P99: 3.98, Max: 4}},
		"eleven": {
			[]float64{0, 100, 10, 90, 20, 80, 30, 70, 40, 60, 50},
			&result.Distribution{N: 11, Min: 0, Mean: 50, P50: 50, P90: 90, P99: 99, Max: 100},
		},
	} {
		t.Run(name, func(t *testing.T) {
			before := append([]float64(nil), tc.samples...)
			got := statistics.Summarize(tc.samples)
			if diff := cmp.Diff(tc.want, got, cmp.Comparer(near)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(before, tc.samples); diff != "" {
				t.Errorf("Summarize changed the samples (-before +after):\n%s", diff)
			}
		})
	}
}

func near(a, b float64) bool { return math.Abs(a-b) < 1e-9 }

// normal returns n normally distributed samples with the given mean.
func normal(random *rand.Rand, n int, mean float64) []float64 {
	samples := make([]float64, n)
	for i := range samples {
		samples[i] = mean * (1 + 0.1*random.NormFloat64())
	}
	return samples
}

// TestRatio checks with many pairs of samples, whose true ratio is 3, that the interval contains
// the ratio about as often as its confidence level promises.
func TestRatio(t *testing.T) {
	const pairs = 30
	random := rand.New(rand.NewPCG(7, 7))
	for name, statistic := range map[string]func([]float64) float64{
		"median": statistics.Quantile(0.5), "mean": statistics.Mean,
	} {
		t.Run(name, func(t *testing.T) {
			within := 0
			for range pairs {
				got, err := statistics.Ratio(normal(random, 80, 3), normal(random, 50, 1), statistic)
				if err != nil {
					t.Fatal(err)
				}
				if got.Confidence != 0.95 || got.Low > got.Ratio || got.High < got.Ratio || math.Abs(got.Ratio-3) > 0.5 {
					t.Fatalf("got %+v", got)
				}
				if got.Low <= 3 && 3 <= got.High {
					within++
				}
			}
			if within < 25 {
				t.Errorf("%d of %d intervals contain the true ratio, want about 95 %%", within, pairs)
			}
		})
	}
}

// TestPairedRatio checks that noise common to both samples does not widen the interval.
func TestPairedRatio(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 3))
	denominator := normal(random, 50, 1)
	numerator := make([]float64, len(denominator))
	for i := range denominator {
		denominator[i] *= float64(1 + i%7) // periods in which the machine is slow
		numerator[i] = 3 * denominator[i] * (1 + 0.01*random.NormFloat64())
	}
	got, err := statistics.PairedRatio(numerator, denominator)
	if err != nil {
		t.Fatal(err)
	}
	if got.Low < 2.95 || got.Low > 3.01 || got.High < 2.99 || got.High > 3.05 || got.Ratio < got.Low || got.Ratio > got.High {
		t.Errorf("got %+v, want about 3", got)
	}
	for name, tc := range map[string]struct{ numerator, denominator []float64 }{
		"no samples":        {nil, nil},
		"different lengths": {[]float64{1, 2}, []float64{1}},
		"denominator 0":     {[]float64{1, 2}, []float64{1, 0}},
	} {
		if got, err := statistics.PairedRatio(tc.numerator, tc.denominator); err == nil {
			t.Errorf("%s: got %+v and no error", name, got)
		}
	}
}

func TestRatioDeterministic(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	a, b := normal(random, 30, 2), normal(random, 30, 1)
	first, err := statistics.Ratio(a, b, statistics.Quantile(0.9))
	if err != nil {
		t.Fatal(err)
	}
	again, err := statistics.Ratio(a, b, statistics.Quantile(0.9))
	if err != nil || first != again {
		t.Errorf("got %+v and then %+v, error %v", first, again, err)
	}
}

func TestRatioInvalid(t *testing.T) {
	for name, tc := range map[string]struct{ numerator, denominator []float64 }{
		"no numerator":   {nil, []float64{1}},
		"no denominator": {[]float64{1}, nil},
		"denominator 0":  {[]float64{1}, []float64{0, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := statistics.Ratio(tc.numerator, tc.denominator, statistics.Mean); err == nil {
				t.Errorf("got %+v and no error", got)
			}
		})
	}
}

func TestFitUniform(t *testing.T) {
	for name, tc := range map[string]struct {
		counts []int
		want   statistics.Fit
	}{
		// Results of R's chisq.test.
		"dice":  {[]int{22, 24, 38, 30, 46, 44}, statistics.Fit{ChiSquared: 15.2941176470588, DegreesOfFreedom: 5, P: 0.00917889}},
		"equal": {[]int{10, 10}, statistics.Fit{ChiSquared: 0, DegreesOfFreedom: 1, P: 1}},
		"unfair": {
			[]int{200, 100}, statistics.Fit{ChiSquared: 33.3333333333333, DegreesOfFreedom: 1, P: 7.764e-09},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := statistics.FitUniform(tc.counts)
			if err != nil {
				t.Fatal(err)
			}
			near := func(a, b float64) bool { return a == b || math.Abs(a-b) <= 1e-3*math.Max(math.Abs(a), math.Abs(b)) }
			if diff := cmp.Diff(tc.want, got, cmp.Comparer(near)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestFitUniformInvalid(t *testing.T) {
	for name, counts := range map[string][]int{"no counts": nil, "one count": {100}, "mean too small": {2, 3, 4}} {
		t.Run(name, func(t *testing.T) {
			if got, err := statistics.FitUniform(counts); err == nil {
				t.Errorf("got %+v and no error", got)
			}
		})
	}
}
