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

	"fairlead.io/fairlead/bench/compare"
	"fairlead.io/fairlead/bench/result"
)

// vmResult is a result as a comparison in a virtual machine prints it.
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

// Whatever runs in a virtual machine prints its progress, the result, and what went
// wrong, on the same line to this machine.
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
		"all is well":                {`echo "   1.5s ipvs: it starts"; cat "$1"`, "ipvs: it starts", "", true},
		"something ends on the way":  {`cat "$1"; echo "fairlead: interrupted"; exit 1`, "fairlead: interrupted", "exit status 1: fairlead: interrupted", true},
		"it does not boot":           {`echo "vm: it did not boot in time" >&2; exit 125`, "vm: it did not boot in time", "exit status 125: vm: it did not boot in time", false},
		"nothing is said":            {`true`, "", "it has told no result", false},
		"half a result":              {`head -n 5 "$1"`, "", "it has told no result", false},
		"a result of another schema": {`printf '{\n "schema": 99\n}\n'`, "", "schema 99", false},
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
				t.Fatalf("report %+v, want one: %v", r, test.report)
			}
			if r == nil {
				return
			}
			for what, environment := range map[string]string{
				"environment": r.Environments[0].Name, "measurement": r.Measurements[0].Environment,
				"ratio": r.Ratios[0].Environment, "what is left out": r.LeftOut[0].Environment,
			} {
				if environment != "vm-6.12" {
					t.Errorf("the %s is of %q, want vm-6.12", what, environment)
				}
			}
		})
	}
}

// The virtual machine goes when the comparison is interrupted, with all of its processes.
func TestVMInterrupted(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var pid int
	vm := compare.VM{
		Command: `sleep 1000 & echo "  0.0s $!"; wait; true`,
		Progress: func(line string) {
			pid, _ = strconv.Atoi(line) // 0 if it is something else
			cancel()
		},
	}
	r, err := vm.Run(ctx)
	if r != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("report %v, error %v", r, err)
	}
	if pid == 0 {
		t.Fatal("there was no process")
	}
	// It may be a zombie until its new parent has seen that it ended.
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err == nil && !bytes.Contains(status, []byte(") Z ")) && syscall.Kill(pid, 0) == nil {
		t.Errorf("process %d is still there: %s", pid, status)
	}
}
