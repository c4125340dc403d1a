package table_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/table"
)

func TestWrite(t *testing.T) {
	scenario := result.Scenario{Services: 10_000, Endpoints: 10}
	changed := scenario
	changed.Change = result.ScaleUp
	busy := changed
	busy.Rate = 1000
	distribution := &result.Distribution{N: 200, Min: 1e-5, Mean: 3e-5, P50: 2.1e-5, P90: 0.000145, P99: 0.0123, Max: 1.5}
	report := &result.Report{
		Schema: 1, Time: time.Date(2025, 1, 31, 12, 0, 0, 0, time.UTC), TookSeconds: 93.5,
		Command: []string{"fairlead-bench", "--samples=200"}, Version: "v1.2.3",
		Environments: []result.Environment{
			{
				Name:    "native",
				Machine: result.Machine{CPU: "A processor", CPUs: 2, MemoryBytes: 25_276_030_976, Architecture: "amd64"},
				Kernel:  "6.18.44", OS: "Debian GNU/Linux 13", Load: 0.5, APIServer: "v1.33.1",
			},
			{Name: "vm-6.1", Emulated: true, Machine: result.Machine{CPU: "QEMU", CPUs: 1, MemoryBytes: 1 << 30}, Kernel: "6.1"},
		},
		Measurements: []result.Measurement{
			{Measure: result.UpdateAck, System: "nft", Environment: "native", Scenario: changed, Unit: "s", Distribution: distribution},
			{
				Measure: result.Churn, System: "nft", Environment: "native", Scenario: busy, Unit: "s", Distribution: distribution,
				Values: []result.Value{{Name: "cpu", Unit: "s", Value: 0.61}, {Name: "commits", Unit: "1", Value: 3486}},
			},
			{Measure: result.UpdateAck, System: "ipvs", Environment: "vm-6.1", Scenario: changed, Unit: "s", Distribution: distribution},
			{
				Measure: result.Memory, System: "nft", Environment: "native", Scenario: scenario,
				Values: []result.Value{{Name: "resident", Unit: "B", Value: 59.8e6}},
			},
		},
		Ratios: []result.Ratio{{
			Measure: result.UpdateAck, Statistic: "p50", Environment: "native", Scenario: changed,
			Numerator: "kube-proxy-nftables", Denominator: "nft",
			Interval: result.Interval{Ratio: 310.52, Low: 9.1, High: 341.9, Confidence: 0.95},
		}, {
			Measure: result.UpdateAck, Statistic: "p50", Environment: "vm-6.1", Scenario: changed, Numerator: "nft", Denominator: "ipvs",
			Interval: result.Interval{Ratio: 1.5, Low: 1, High: 2, Confidence: 0.95},
		}},
		LeftOut: []result.LeftOut{
			{System: "ipvs", Measure: result.Memory, Environment: "native", Reason: "the kernel does not support IPVS"},
			{System: "ipvs", Environment: "native", Reason: "the kernel does not support IPVS"},
		},
		Notes: []string{"A note."},
	}
	const want = `fairlead-bench --samples=200
Fairlead v1.2.3, 2025-01-31 12:00 UTC, 94 s
native: 2 × A processor, 25.3 GB of memory, Linux 6.18.44, Debian GNU/Linux 13, load 0.50
native: with a real kube-apiserver v1.33.1 for each system
vm-6.1: 1 × QEMU, 1.07 GB of memory, Linux 6.1, load 0.00, processor emulated: times are meaningless, ratios unreliable

update-ack: time from the event to the kernel's acknowledgement
  system                   scenario              p50      p90     p99      max     n
  nft                      scale-up, 10000 × 10  21.0 µs  145 µs  12.3 ms  1.50 s  200
  ipvs (vm-6.1, emulated)  scale-up, 10000 × 10  21.0 µs  145 µs  12.3 ms  1.50 s  200

churn: time from an event to its effect, under churn
  system  scenario                      p50      p90     p99      max     n
  nft     scale-up, 10000 × 10, 1000/s  21.0 µs  145 µs  12.3 ms  1.50 s  200  cpu 610 ms, commits 3486

memory: memory held
  system  scenario
  nft     10000 × 10  resident 59.8 MB

ratios with their 95 % confidence intervals
  measure         scenario                                         ratio  interval
  update-ack p50  scale-up, 10000 × 10  kube-proxy-nftables / nft  311    9.10 to 342
  update-ack p50  scale-up, 10000 × 10  nft / ipvs                 1.50   1 to 2  vm-6.1, emulated

not measured: ipvs memory native: the kernel does not support IPVS
not measured: ipvs native: the kernel does not support IPVS

A note.
`
	var b strings.Builder
	if err := table.Write(&b, report); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestNumber(t *testing.T) {
	for want, tc := range map[string]struct {
		v    float64
		unit string
	}{
		"0 s":         {0, "s"},
		"1.50 s":      {1.5, "s"},
		"-1.50 s":     {-1.5, "s"},
		"93.0 s":      {93, "s"},
		"12.3 ms":     {0.01234, "s"},
		"21.0 µs":     {0.000021, "s"},
		"0.5 µs":      {5e-7, "s"},
		"3":           {3, "1"},
		"999 B":       {999, "B"},
		"1.50 kB":     {1500, "B"},
		"1.28 GB/s":   {1.28e9, "B/s"},
		"20408/s":     {20407.6, "1/s"},
		"0.00123":     {0.0012345, "1"},
		"4.00 apples": {4, "apples"},
	} {
		if got := table.Number(tc.v, tc.unit); got != want {
			t.Errorf("%g %s: got %q, want %q", tc.v, tc.unit, got, want)
		}
	}
}

var errFull = errors.New("full")

type fullWriter struct{}

func (fullWriter) Write([]byte) (int, error) { return 0, errFull }

func TestWriteFails(t *testing.T) {
	if err := table.Write(fullWriter{}, &result.Report{}); !errors.Is(err, errFull) {
		t.Errorf("error %v, want the writer's error", err)
	}
}
