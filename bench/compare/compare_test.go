package compare_test

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/bench/compare"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/internal/flowoffload"
	"fairlead.io/fairlead/internal/nettest"
)

// buildFairlead builds the node agent and returns its path.
func buildFairlead(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fairlead")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", path, "fairlead.io/fairlead/cmd/fairlead").CombinedOutput()
	if err != nil {
		t.Fatalf("build fairlead: %v\n%s", err, out)
	}
	return path
}

// renamed is a system under another name, to compare a system with itself.
type renamed struct {
	system.System
	name string
}

func (r renamed) Name() string { return r.name }

// unavailableSystem cannot run on this machine.
type unavailableSystem struct{}

func (unavailableSystem) Name() string { return "absent" }

func (unavailableSystem) Start(context.Context, system.Environment) (system.Instance, error) {
	return nil, &system.UnavailableError{Reason: "it is not installed"}
}

// crashingSystem exits immediately after its start.
type crashingSystem struct{}

func (crashingSystem) Name() string { return "broken" }

func (crashingSystem) Start(_ context.Context, env system.Environment) (system.Instance, error) {
	return system.StartProcess(env, "broken", "/bin/sh", "-c", "echo cannot start; exit 3")
}

// idleSystem programs nothing.
type idleSystem struct{}

func (idleSystem) Name() string { return "idle" }

func (idleSystem) Start(_ context.Context, env system.Environment) (system.Instance, error) {
	return system.StartProcess(env, "idle", "/bin/sleep", "60")
}

func smallOptions(t *testing.T, systems ...system.System) compare.Options {
	t.Helper()
	o := compare.DefaultOptions()
	o.Systems, o.Services, o.Endpoints = systems, []int{20}, 3
	o.Samples, o.Starts, o.Rounds = 3, 3, 3
	o.Duration, o.SettleTime, o.Rates = 300*time.Millisecond, 10*time.Millisecond, []float64{50}
	o.Environment, o.Dir = result.DetectEnvironment(), t.TempDir()
	o.Progress = func(line string) { t.Log(line) }
	return o
}

// TestRun measures two systems in all parts. Systems that cannot run are left out, with the
// reason.
func TestRun(t *testing.T) {
	path := buildFairlead(t)
	fairlead := system.Fairlead{Binary: path, Mode: "nft"}
	r, err := compare.Run(t.Context(), smallOptions(t, fairlead, renamed{fairlead, "other"}, unavailableSystem{}, crashingSystem{}))
	if err != nil {
		t.Fatal(err)
	}
	size := result.Scenario{Services: 20, Endpoints: 3}
	with := func(change result.Change, rate float64) result.Scenario {
		s := size
		s.Change, s.Rate = change, rate
		return s
	}
	for _, want := range []struct {
		measure  result.Measure
		scenario result.Scenario
		samples  int
	}{
		{result.ColdStartAnswer, size, 3},
		{result.ColdStartCPU, size, 3},
		{result.Memory, size, 3},
		{result.PeakMemory, size, 3},
		{result.UpdatePacket, with(result.ReplaceEndpoint, 0), 3},
		{result.UpdatePacket, with(result.ReplaceOnlyEndpoint, 0), 3},
		{result.UpdatePacket, with(result.ScaleUp, 0), 3},
		{result.UpdatePacket, with(result.ScaleDown, 0), 3},
		{result.UpdatePacket, with(result.CreateService, 0), 3},
		{result.UpdatePacket, with(result.DeleteService, 0), 3},
		{result.ChurnCPU, with(result.ReplaceEndpoint, 50), 3},
		{result.Churn, with(result.ReplaceEndpoint, 50), 6}, // at least
	} {
		for _, name := range []string{"nft", "other"} {
			m := r.Find(want.measure, name, result.Native, want.scenario)
			switch {
			case m == nil:
				t.Errorf("no measurement %s of %s in %+v", want.measure, name, want.scenario)
			case len(m.Samples) < want.samples || want.measure != result.Churn && len(m.Samples) > want.samples:
				t.Errorf("%s of %s has %d samples, want %d", want.measure, name, len(m.Samples), want.samples)
			case m.Distribution == nil || m.Distribution.Max > 1e10 || m.Distribution.Min < 0:
				t.Errorf("%s of %s: implausible distribution %+v", want.measure, name, m.Distribution)
			}
		}
		// The processor times may be shorter than one clock tick.
		if want.measure != result.ChurnCPU && want.measure != result.ColdStartCPU && !slices.ContainsFunc(r.Ratios, func(q result.Ratio) bool {
			return q.Measure == want.measure && q.Scenario == want.scenario && q.Numerator == "other" && q.Denominator == "nft" && q.Low <= q.Ratio && q.Ratio <= q.High
		}) {
			t.Errorf("no ratio of %s in %+v", want.measure, want.scenario)
		}
	}
	if m := r.Find(result.WakeUp, result.Direct, result.Native, size); m == nil || len(m.Samples) != 3 || m.Distribution.Min <= 0 || m.Distribution.Max > 1 {
		t.Errorf("%s: %+v", result.WakeUp, m)
	}
	for _, want := range []struct {
		destination result.Destination
		systems     []string
	}{
		{result.OneService, []string{"nft", "other"}},
		{result.RandomServices, []string{"nft", "other"}},
		{result.NoService, []string{"nft", "other", result.Direct}},
	} {
		scenario := size
		scenario.Destination = want.destination
		for _, name := range want.systems {
			for _, measure := range []result.Measure{result.FirstPacket, result.Connect} {
				if m := r.Find(measure, name, result.Native, scenario); m == nil || len(m.Samples) != 3 || m.Distribution.Min <= 0 || m.Distribution.Max > 1 {
					t.Errorf("%s of %s, %s: %+v", measure, name, want.destination, m)
				}
			}
		}
	}
	established := []string{"nft", "other", result.Direct}
	if flowtables := flowoffload.Check(nettest.NamespaceT(t).Fd()); flowtables == nil {
		established = append(established, "nft-flow-offload")
		for _, measure := range []result.Measure{result.PacketTime, result.TransferTime} {
			if !slices.ContainsFunc(r.Ratios, func(q result.Ratio) bool {
				return q.Measure == measure && q.Numerator == "nft" && q.Denominator == "nft-flow-offload"
			}) {
				t.Errorf("no ratio of %s", measure)
			}
		}
	} else if !slices.ContainsFunc(r.LeftOut, func(l result.LeftOut) bool {
		return l.System == "nft-flow-offload" && l.Measure == result.PacketTime && strings.HasPrefix(l.Reason, "not supported by this kernel: ")
	}) {
		t.Errorf("the kernel has no flowtables (%v), left out: %+v", flowtables, r.LeftOut)
	}
	for _, name := range established {
		for _, measure := range []result.Measure{result.PacketTime, result.TransferTime} {
			if m := r.Find(measure, name, result.Native, size); m == nil || len(m.Samples) != 3 || m.Distribution.Min <= 0 || m.Distribution.Max > 60 {
				t.Errorf("%s of %s: %+v", measure, name, m)
			}
		}
	}
	reasons := map[string]string{}
	for _, l := range r.LeftOut {
		if l.Measure != "" {
			continue // above
		}
		reasons[l.System] = l.Reason
	}
	if reasons["absent"] != "it is not installed" || !strings.Contains(reasons["broken"], "cannot start") || len(reasons) != 2 {
		t.Errorf("wrong systems are left out: %q", reasons)
	}
}

// TestRunInterrupted checks that the report has the samples that were taken before the
// interruption.
func TestRunInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := smallOptions(t, system.Fairlead{Binary: buildFairlead(t), Mode: "nft"})
	o.Samples = 1000
	o.Progress = func(line string) {
		if strings.HasPrefix(line, "update: sample 11 ") {
			cancel()
		}
	}
	r, err := compare.Run(ctx, o)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", err)
	}
	scenario := result.Scenario{Services: 20, Endpoints: 3, Change: result.ReplaceEndpoint}
	if m := r.Find(result.UpdatePacket, "nft", result.Native, scenario); m == nil || m.Distribution == nil || m.Distribution.N != 10 {
		t.Errorf("after ten samples the measurement is %+v", m)
	}
}

func TestRunInvalidOptions(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*compare.Options)
		want   string
	}{
		"no systems":       {func(o *compare.Options) { o.Systems = nil }, "no systems"},
		"duplicate system": {func(o *compare.Options) { o.Systems = append(o.Systems, o.Systems...) }, "duplicate system"},
		"too few":          {func(o *compare.Options) { o.Services = []int{1} }, "too few"},
		"unknown part":     {func(o *compare.Options) { o.Parts = []compare.Part{"x"} }, "unknown part"},
		"no samples":       {func(o *compare.Options) { o.Samples = 0 }, "1 or more"},
		"no rate":          {func(o *compare.Options) { o.Rates = []float64{0} }, "must be greater than 0"},
		"none can run":     {func(*compare.Options) {}, "no system can run here"},
		"endpoints":        {func(o *compare.Options) { o.Endpoints = 0 }, "1 to 100"},
		"no Services":      {func(o *compare.Options) { o.Services = nil }, "no number of Services"},
		"no API server":    {func(o *compare.Options) { o.ControlPlane = "/nowhere" }, "--apiserver: no etcd in /nowhere: run `make controlplane`"},
		"no duration":      {func(o *compare.Options) { o.Duration = 0 }, "--churn-time must be greater than 0"},
	} {
		t.Run(name, func(t *testing.T) {
			o := smallOptions(t, unavailableSystem{})
			test.change(&o)
			if _, err := compare.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
}

// TestStartLimit checks that a system whose start takes too long is left out, with that reason.
func TestStartLimit(t *testing.T) {
	o := smallOptions(t, idleSystem{})
	o.StartLimit = 100 * time.Millisecond
	r, err := compare.Run(t.Context(), o)
	if err == nil || len(r.LeftOut) != 1 {
		t.Fatalf("error %v, left out %v; want an error and one system left out", err, r.LeftOut)
	}
	if got, want := r.LeftOut[0].Reason, "not all of 20 Services answered within 100ms"; got != want {
		t.Errorf("the reason is %q, want %q", got, want)
	}
}
