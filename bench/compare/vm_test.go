package compare_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"fairlead.io/fairlead/bench/compare"
	"fairlead.io/fairlead/bench/result"
)

// vmResult returns a result as printed by a comparison in a virtual machine.
func vmResult(t *testing.T) string {
	t.Helper()
	var b bytes.Buffer
	r := &result.Report{
		Schema: result.Schema, Environments: []result.Environment{{Name: result.Native, Emulated: true, Kernel: "6.12.57+deb13-cloud-amd64"}},
		Measurements: []result.Measurement{{Measure: result.Memory, System: "ipvs", Environment: result.Native}},
		Ratios:       []result.Ratio{{Measure: result.Memory, Environment: result.Native, Numerator: "nft", Denominator: "ipvs"}},
		LeftOut:      []result.LeftOut{{System: "kube-proxy-ipvs", Environment: result.Native, Reason: "it is not there"}},
	}
	if err := r.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestVM checks the progress, the report and the error for various outputs of a virtual machine,
// whose standard output and error share one stream.
func TestVM(t *testing.T) {
	t.Parallel()
	document := filepath.Join(t.TempDir(), "result")
	if err := os.WriteFile(document, []byte(vmResult(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		script   string
		progress string
		want     string // part of the error
		report   bool
	}{
		"complete result":          {`echo "   1.5s ipvs: it starts"; cat "$1"`, "ipvs: it starts", "", true},
		"result and failure":       {`cat "$1"; echo "fairlead: interrupted"; exit 1`, "fairlead: interrupted", "exit status 1: fairlead: interrupted", true},
		"no boot":                  {`echo "vm: it did not boot in time" >&2; exit 125`, "vm: it did not boot in time", "exit status 125: vm: it did not boot in time", false},
		"no output":                {`true`, "", "the virtual machine returned no result", false},
		"half a result":            {`head -n 5 "$1"`, "", "the virtual machine returned no result", false},
		"result of another schema": {`printf '{\n "schema": 99\n}\n'`, "", "schema 99", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var progress []string
			vm := compare.VM{Command: `f() { ` + test.script + `; }; f`, Program: []string{document}, Progress: func(line string) { progress = append(progress, line) }}
			r, err := vm.Run(t.Context())
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if got := strings.Join(progress, "\n"); got != test.progress {
				t.Errorf("progress %q, want %q", got, test.progress)
			}
			if (r != nil) != test.report {
				t.Fatalf("report %+v, want a report: %v", r, test.report)
			}
			if r == nil {
				return
			}
			for what, environment := range map[string]string{
				"environment": r.Environments[0].Name, "measurement": r.Measurements[0].Environment,
				"ratio": r.Ratios[0].Environment, "system left out": r.LeftOut[0].Environment,
			} {
				if environment != "vm-6.12" {
					t.Errorf("the %s has environment %q, want vm-6.12", what, environment)
				}
			}
		})
	}
}

// TestVMInterrupted checks that an interruption ends all processes of the virtual machine.
func TestVMInterrupted(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var pid int
	vm := compare.VM{
		Command: `sleep 1000 & echo "  0.0s $!"; wait; true`,
		Progress: func(line string) {
			pid, _ = strconv.Atoi(line) // 0 if line is not a number
			cancel()
		},
	}
	r, err := vm.Run(ctx)
	if r != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("report %v, error %v", r, err)
	}
	if pid == 0 {
		t.Fatal("the command printed no process ID")
	}
	// The process got a signal and ends soon. It may be a zombie until its new parent reaps it.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || bytes.Contains(status, []byte(") Z ")) || syscall.Kill(pid, 0) != nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d is still running: %s", pid, status)
		}
	}
}
