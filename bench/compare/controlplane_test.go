package compare_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"fairlead.io/fairlead/bench/compare"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/test/controlplane"
)

// controlPlanePrograms returns the directory with the programs of a real control plane.
func controlPlanePrograms(t *testing.T) string {
	t.Helper()
	dir, err := controlplane.Programs("")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestRealAPIServer measures with real API servers. If a system cannot run, its API server serves
// the next system.
func TestRealAPIServer(t *testing.T) {
	o := smallOptions(t, unavailableSystem{}, system.Fairlead{Binary: buildFairlead(t), Mode: "nft"})
	o.ControlPlane = controlPlanePrograms(t)
	o.Starts, o.Rounds = 2, 1 // the second start attaches the API server to another node
	opened := 0
	o.Progress = func(line string) {
		t.Log(line)
		if strings.Contains(line, "an API server has started") {
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
		t.Errorf("%d API servers were started, want one", opened)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("files left behind: %v, error %v", left, err)
	}
	if e := r.Environments[0]; !strings.HasPrefix(e.APIServer, "v1.") {
		t.Errorf("the API server has version %q, want a version of Kubernetes", e.APIServer)
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
		{result.UpdatePacket, result.ReplaceOnlyEndpoint, 0, 3},
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
		if request, ok := m.Value("request"); want.measure == result.UpdatePacket && (!ok || request.Value <= 0) {
			t.Errorf("%s in %+v: implausible response time of the API server: %+v", want.measure, scenario, request)
		}
		if changes, _ := m.Value("changes"); want.measure == result.Churn && int(changes.Value) < len(m.Samples) {
			t.Errorf("%g changes, but %d of them were observed", changes.Value, len(m.Samples))
		}
	}
}

// TestRealAPIServerEnds checks that no programs and files are left after an interruption, or after
// an API server has crashed.
func TestRealAPIServerEnds(t *testing.T) {
	path := buildFairlead(t)
	for name, tc := range map[string]struct {
		at   string // prefix of the line of progress at which do is called
		do   func(t *testing.T, interrupt func())
		want string
	}{
		"interrupted while in use":             {"update: sample 11 ", func(_ *testing.T, interrupt func()) { interrupt() }, "interrupted"},
		"interrupted before the objects exist": {"20 Services ", func(_ *testing.T, interrupt func()) { interrupt() }, "interrupted"},
		"the API server crashes":               {"update: sample 11 ", func(t *testing.T, _ func()) { t.Helper(); killChild(t, "kube-apiserver") }, "endpointslices service-"},
	} {
		t.Run(name, func(t *testing.T) {
			o := smallOptions(t, system.Fairlead{Binary: path, Mode: "nft"})
			o.ControlPlane, o.Starts, o.Samples = controlPlanePrograms(t), 1, 1000
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			o.Progress = func(line string) {
				if strings.HasPrefix(line, tc.at) {
					tc.do(t, func() { cancel(errors.New("interrupted")) })
				}
			}
			temp := t.TempDir()
			t.Setenv("TMPDIR", temp)
			if _, err := compare.Run(ctx, o); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
			if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
				t.Errorf("files left behind: %v, error %v", left, err)
			}
			if left := children(t); len(left) > 0 {
				t.Errorf("programs still running: %v", left)
			}
		})
	}
}

// children returns the names of this process's children by process ID.
func children(t *testing.T) map[int]string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	all := map[int]string{}
	for _, path := range stats {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // the process has ended
		}
		// proc_pid_stat(5): pid (name) state ppid …
		before, after, _ := strings.Cut(string(data), ") ")
		number, name, _ := strings.Cut(before, " (")
		if fields := strings.Fields(after); len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			pid, err := strconv.Atoi(number)
			if err != nil {
				t.Fatal(err)
			}
			all[pid] = name
		}
	}
	return all
}

// killChild kills a child of this process by name.
func killChild(t *testing.T, program string) {
	t.Helper()
	for pid, name := range children(t) {
		if name == program {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Error(err)
			}
			return
		}
	}
	t.Errorf("no child process %s", program)
}
