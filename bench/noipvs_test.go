//go:build !ipvs

package bench_test

// ipvsBackends returns no backend without the build tag ipvs, see ipvs_test.go.
func ipvsBackends() []backend { return nil }
