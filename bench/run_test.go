package bench_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/bench"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
)

// smallOptions returns options that measure everything within a few seconds.
func smallOptions() bench.Options {
	return bench.Options{
		Services: 20, Endpoints: 3, Samples: 10, Rates: []float64{100, 5000}, ChurnTime: 200 * time.Millisecond,
		Sizes: []int{1, 20}, ThroughputTime: 20 * time.Millisecond, Version: "v0", Command: []string{"fairlead-bench"},
	}
}

// TestRun measures everything once. It checks that the report is complete and its figures
// plausible, and that Run leaves no files open.
func TestRun(t *testing.T) {
	before := openFiles(t)
	o := smallOptions()
	var progress []string
	o.Progress = func(line string) { progress = append(progress, line) }
	report, err := bench.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if left := openFiles(t); len(left) > len(before) {
		t.Errorf("Run left files open: got %q, want %q", left, before)
	}
	if len(progress) < len(bench.Parts()) {
		t.Errorf("Progress was called %d times: %q", len(progress), progress)
	}
	const starts = 3
	base := result.Scenario{Services: 20, Endpoints: 3}
	type key struct {
		measure  result.Measure
		system   string
		scenario result.Scenario
	}
	want := map[key]int{ // samples
		{result.ColdStartComplete, "nft", base}: starts,
		{result.ColdStartAnswer, "nft", base}:   starts,
		{result.Restart, "nft", base}:           starts,
		{result.Fairness, "nft", base}:          3,
		{result.Memory, "nft", base}:            0,
	}
	for _, change := range []result.Change{
		result.ReplaceEndpoint, result.ScaleUp, result.ScaleDown, result.CreateService, result.DeleteService,
	} {
		for _, measure := range []result.Measure{result.UpdateAck, result.UpdatePacket} {
			want[key{measure, "nft", result.Scenario{Change: change, Services: 20, Endpoints: 3}}] = o.Samples
		}
	}
	for rate, changes := range map[float64]int{100: 20, 5000: 1000} {
		want[key{result.Churn, "nft", result.Scenario{Change: result.ReplaceEndpoint, Services: 20, Endpoints: 3, Rate: rate}}] = changes
	}
	for _, name := range []string{"nft", result.Direct} {
		for _, n := range o.Sizes {
			size := result.Scenario{Services: n, Endpoints: 3}
			want[key{result.Connect, name, size}] = o.Samples
			want[key{result.ConnectRate, name, size}] = o.Samples
			want[key{result.Throughput, name, size}] = starts
		}
	}
	established := []string{"nft", result.Direct}
	if len(report.LeftOut) == 0 {
		established = append(established, "nft-flow-offload")
	}
	for _, l := range report.LeftOut {
		if l.System != "nft-flow-offload" || !strings.HasPrefix(l.Reason, "not supported by this kernel: ") {
			t.Errorf("left out: %+v", l)
		}
	}
	for _, name := range established {
		want[key{result.PacketTime, name, base}], want[key{result.TransferTime, name, base}] = o.Samples, o.Samples
	}
	got := map[key]int{}
	for _, m := range report.Measurements {
		k := key{m.Measure, m.System, m.Scenario}
		if _, twice := got[k]; twice {
			t.Errorf("duplicate measurement %v", k)
		}
		got[k] = len(m.Samples)
		// Fairness counts connections. Packets may show some changes before any time has passed.
		for _, s := range m.Samples {
			if s < 0 || m.Unit == "s" && s > 60 || s == 0 && m.Unit != "1" {
				t.Errorf("%v: implausible sample %g %s", k, s, m.Unit)
			}
		}
		if d := m.Distribution; d != nil && (d.N != len(m.Samples) || !slices.IsSorted([]float64{d.Min, d.P50, d.P90, d.P99, d.Max})) {
			t.Errorf("%v: wrong distribution %+v of %d samples", k, d, len(m.Samples))
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("number of samples by measurement (-want +got):\n%s", diff)
	}
	for _, r := range report.Ratios {
		if r.Ratio <= 0 || r.Low > r.Ratio || r.High < r.Ratio {
			t.Errorf("inconsistent ratio %+v", r)
		}
	}
	if m := report.Find(result.Fairness, "nft", result.Native, base); m != nil {
		if p, ok := m.Value("p-value"); !ok || p.Value < 1e-6 {
			t.Errorf("connections are not distributed evenly: %+v", m)
		}
	}
	if m := report.Find(result.Memory, "nft", result.Native, base); m != nil {
		for _, name := range []string{"resident", "peak-resident", "kernel"} {
			if _, ok := m.Value(name); !ok {
				t.Errorf("the memory measurement has no value %q", name)
			}
		}
	}
	var file bytes.Buffer
	if err := report.Write(&file); err != nil {
		t.Fatal(err)
	}
	again, err := result.Read(&file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(report, again); diff != "" {
		t.Errorf("report after Write and Read (-want +got):\n%s", diff)
	}
}

// TestRunInterrupted cancels the context in each part: Run must return soon with the context's
// error and leave no files open.
func TestRunInterrupted(t *testing.T) {
	type test struct {
		options bench.Options
		during  string // cancel at the first line of progress that contains this
	}
	tests := map[string]test{}
	for _, part := range bench.Parts() {
		o := smallOptions()
		o.Only, o.Samples, o.ChurnTime = []bench.Part{part}, 1_000_000, time.Hour
		tests[string(part)] = test{o, ""}
	}
	slow := smallOptions()
	slow.Only, slow.Rates, slow.ChurnTime = []bench.Part{bench.Churn}, []float64{1e-3}, time.Hour
	tests["churn between changes"] = test{slow, ""}
	slow = smallOptions()
	slow.Only, slow.ThroughputTime = []bench.Part{bench.DataPath}, time.Hour
	tests["transfer"] = test{slow, "transfer"}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			before := openFiles(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var interrupted time.Time
			tc.options.Progress = func(line string) {
				if interrupted.IsZero() && strings.Contains(line, tc.during) {
					interrupted = time.Now().Add(100 * time.Millisecond)
					time.AfterFunc(time.Until(interrupted), cancel)
				}
			}
			_, err := bench.Run(ctx, tc.options)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, want context.Canceled", err)
			}
			if took := time.Since(interrupted); took > 5*time.Second {
				t.Errorf("Run took %s to return", took)
			}
			if left := openFiles(t); len(left) > len(before) {
				t.Errorf("Run left files open: got %q, want %q", left, before)
			}
		})
	}
}

// TestModes checks the modes of package system against the backends.
func TestModes(t *testing.T) {
	if want := []string{system.ModeNFT, system.ModeIPVS}; !slices.Equal(bench.Modes(), want) {
		t.Errorf("got modes %q, want %q", bench.Modes(), want)
	}
}

func TestRunInvalidOptions(t *testing.T) {
	for name, tc := range map[string]struct {
		options bench.Options
		want    string
	}{
		"mode":            {bench.Options{Mode: "iptables"}, `--mode: unknown mode "iptables": use nft or ipvs`},
		"part":            {bench.Options{Only: []bench.Part{"speed"}}, `--only: unknown part "speed": use one or more of update,start`},
		"services":        {bench.Options{Services: -1}, "--services: invalid value -1"},
		"many services":   {bench.Options{Services: 1_000_000}, "1000000 Services of 10 endpoints need too many addresses: use at most 800000"},
		"endpoints":       {bench.Options{Endpoints: -1}, "--endpoints: invalid value -1"},
		"samples":         {bench.Options{Samples: -5}, "--samples: invalid value -5"},
		"size":            {bench.Options{Sizes: []int{0}}, "--data-path-services: invalid value 0"},
		"rate":            {bench.Options{Rates: []float64{0}}, "--rates: invalid value 0"},
		"churn time":      {bench.Options{ChurnTime: -time.Second}, "--churn-time: invalid duration -1s"},
		"throughput time": {bench.Options{ThroughputTime: -time.Second}, "--throughput-time: invalid duration -1s"},
		"several errors":  {bench.Options{Mode: "x", Samples: -1}, "--samples: invalid value -1"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := bench.Run(t.Context(), tc.options); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

// openFiles returns the network namespaces and sockets that this process has open.
func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err == nil && (strings.HasPrefix(link, "net:") || strings.HasPrefix(link, "socket:") || strings.HasPrefix(link, "/proc")) {
			list = append(list, link)
		}
	}
	return list
}
