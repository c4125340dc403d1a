package compare

import (
	"slices"
	"testing"

	"fairlead.io/fairlead/bench/result"
)

// TestRatiosWithinEnvironment checks that results of different environments are not compared with
// each other.
func TestRatiosWithinEnvironment(t *testing.T) {
	t.Parallel()
	scenario := result.Scenario{Services: 10, Endpoints: 1}
	var list []result.Measurement
	for _, environment := range []string{result.Native, "vm-6.12"} {
		for _, system := range []string{"nft", "ipvs", "kube-proxy-nftables"} {
			if environment == result.Native && system == "ipvs" {
				continue // a kernel without IPVS
			}
			list = append(list, result.Measurement{
				Measure: result.Memory, System: system, Environment: environment, Scenario: scenario, Unit: "B", Samples: []float64{1, 2, 3},
			})
		}
	}
	var got []string
	for _, r := range ratios(list) {
		got = append(got, r.Environment+": "+r.Numerator+" / "+r.Denominator)
	}
	slices.Sort(got)
	want := []string{
		"native: kube-proxy-nftables / nft",
		"vm-6.12: ipvs / nft", "vm-6.12: kube-proxy-nftables / ipvs", "vm-6.12: kube-proxy-nftables / nft", "vm-6.12: nft / ipvs",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got ratios %q, want %q", got, want)
	}
}
