//go:build !ipvs

package bench_test

// others are none here: see ipvs_test.go.
func others() []backend { return nil }
