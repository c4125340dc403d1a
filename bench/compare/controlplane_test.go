package compare_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"fairlead/bench/compare"
	"fairlead/bench/result"
	"fairlead/bench/system"
	"fairlead/test/controlplane"
)

// programs is the folder of a real control plane's programs.
func programs(t *testing.T) string {
	t.Helper()
	dir, err := controlplane.Programs("")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// With a real API server all is measured as with those in this process. A system that
// cannot run is left out, and its API server serves the next.
func TestRealAPIServer(t *testing.T) {
	o := small(t, absent{}, system.Fairlead{Binary: binary(t), Mode: "nft", Release: "v1"})
	o.ControlPlane = programs(t)
	o.Starts, o.Rounds = 2, 1 // a start on a second node, which the API server is joined with after the first
	opened := 0
	o.Progress = func(line string) {
		t.Log(line)
		if strings.Contains(line, "its API server has all") {
			opened++
		}
	}
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	r, err := compare.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if opened != 1 {
		t.Errorf("%d API servers were opened, want one", opened)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("left behind are %v, %v", left, err)
	}
	if e := r.Environments[0]; !strings.HasPrefix(e.APIServer, "v1.") {
		t.Errorf("the API server is %q, want a version of Kubernetes", e.APIServer)
	}
	size := result.Scenario{Services: 20, Endpoints: 3}
	for _, want := range []struct {
		measure result.Measure
		change  result.Change
		rate    float64
		samples int
	}{
		{result.ColdStartAnswer, "", 0, 2},
		{result.UpdatePacket, result.ReplaceEndpoint, 0, 3},
		{result.UpdatePacket, result.ScaleUp, 0, 3},
		{result.UpdatePacket, result.ScaleDown, 0, 3},
		{result.UpdatePacket, result.CreateService, 0, 3},
		{result.UpdatePacket, result.DeleteService, 0, 3},
		{result.Churn, result.ReplaceEndpoint, 50, 2}, // at least
	} {
		scenario := size
		scenario.Change, scenario.Rate = want.change, want.rate
		m := r.Find(want.measure, "nft", result.Native, scenario)
		if m == nil || len(m.Samples) < want.samples {
			t.Errorf("%s in %+v: got %+v, want %d samples", want.measure, scenario, m, want.samples)
			continue
		}
		// Neither is measured before the API server has answered.
		if request, ok := m.Value("request"); want.measure == result.UpdatePacket && (!ok || request.Value <= 0 || request.Value > m.Distribution.Mean) {
			t.Errorf("%s in %+v: the API server took %+v to answer, and the change %gs", want.measure, scenario, request, m.Distribution.Mean)
		}
		if changes, _ := m.Value("changes"); want.measure == result.Churn && int(changes.Value) < len(m.Samples) {
			t.Errorf("%g changes, of which %d were looked at", changes.Value, len(m.Samples))
		}
	}
}

// When it is interrupted, API servers end and leave nothing.
func TestRealAPIServerInterrupted(t *testing.T) {
	o := small(t, system.Fairlead{Binary: "/bin/true", Mode: "nft"})
	o.ControlPlane = programs(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o.Progress = func(line string) {
		if strings.Contains(line, "its API server has all") {
			cancel()
		}
	}
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	if _, err := compare.Run(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want canceled", err)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("left behind are %v, %v", left, err)
	}
	running, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(running, func(link string) bool {
		dir, err := os.Readlink(link)
		return err == nil && strings.HasPrefix(dir, temp)
	}); i >= 0 {
		t.Errorf("there is still a process, %s", running[i])
	}
}
