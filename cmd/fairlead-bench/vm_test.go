package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"fairlead.io/fairlead/bench/result"
)

// vmCompare runs `fairlead-bench compare` with an iptables that fails, as on a kernel that cannot
// run kube-proxy's mode iptables. The report is nil if the command wrote none.
func vmCompare(t *testing.T, fairlead string, args ...string) (r *result.Report, code int, output string) {
	t.Helper()
	programs := t.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore"} {
		if err := os.WriteFile(filepath.Join(programs, name), []byte("#!/bin/sh\necho no table nat\nexit 3\n"), 0o700); err != nil { //nolint:gosec // executable
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "result.json")
	args = append([]string{
		"compare", "--fairlead=" + fairlead, "--kube-proxy=/bin/true", "--only=coldstart,memory", "--starts=1", "--services=20", "--endpoints=1",
		"--vm-services=10", "--json=" + file,
	}, args...)
	cmd := programCommand(t, args...)
	cmd.Env = append(cmd.Env, "PATH="+programs+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatal(err)
	}
	code, output = cmd.ProcessState.ExitCode(), string(out)
	f, err := os.Open(file)
	if err != nil {
		return nil, code, output
	}
	defer f.Close()
	if r, err = result.Read(f); err != nil {
		t.Fatal(err)
	}
	return r, code, output
}

// measuredSystems returns the environments and systems of the memory measurements.
func measuredSystems(r *result.Report) string {
	var list []string
	for _, m := range r.Measurements {
		if m.Measure == result.Memory {
			environment, _, _ := strings.Cut(m.Environment, "-")
			list = append(list, environment+" "+m.System)
		}
	}
	return strings.Join(list, ", ")
}

// leftOutReason returns the reason why a system is left out of an environment.
func leftOutReason(r *result.Report, system, environment string) string {
	for _, l := range r.LeftOut {
		if l.System == system && strings.HasPrefix(l.Environment, environment) {
			return l.Reason
		}
	}
	return ""
}

// fakeVM is a shell command that skips its flags and runs the remaining arguments on this machine.
const fakeVM = `f() { while [ "${1#-}" != "$1" ]; do shift; done; "$@"; }; f`

// TestCompareInVM checks that systems that this kernel cannot run are compared in the virtual
// machine, together with the reference systems, and that the report contains both environments.
func TestCompareInVM(t *testing.T) {
	r, code, output := vmCompare(t, buildFairlead(t), "--systems=nft,kube-proxy-iptables", "--vm="+fakeVM)
	if code != 0 || r == nil {
		t.Fatalf("exit code %d: %s", code, output)
	}
	if got, want := measuredSystems(r), "native nft, vm nft"; got != want {
		t.Errorf("measured %q, want %q", got, want)
	}
	if len(r.Systems) == 0 || r.Systems[0].Version != fairleadVersion {
		t.Errorf("got systems %+v, want the first with version %s", r.Systems, fairleadVersion)
	}
	for _, m := range r.Measurements {
		if want := map[bool]int{true: 20, false: 10}[m.Environment == result.Native]; m.Scenario.Services != want {
			t.Errorf("%s in environment %s has %d Services, want %d", m.Measure, m.Environment, m.Scenario.Services, want)
		}
	}
	// In this test the kernel of the virtual machine cannot run the system either.
	if got := leftOutReason(r, "kube-proxy-iptables", "vm-"); !strings.Contains(got, "no table nat") {
		t.Errorf("wrong reason for leaving the system out of the virtual machine: %q", got)
	}
	if got := leftOutReason(r, "kube-proxy-iptables", result.Native); !strings.Contains(got, "no table nat; it was measured in the virtual machine vm-") {
		t.Errorf("wrong reason for leaving the system out: %q", got)
	}
	if !strings.Contains(output, "vm: nft: the last Service answers after") {
		t.Errorf("no progress of the virtual machine in %q", output)
	}
}

// TestCompareInVMInvalidFlags checks that invalid flags are reported before anything is measured.
func TestCompareInVMInvalidFlags(t *testing.T) {
	r, code, output := vmCompare(t, buildFairlead(t), "--systems=nft,kube-proxy-iptables", "--vm-services=1")
	if code != 1 || r != nil || !strings.Contains(output, "in the virtual machine: --services: 1 Services are too few") {
		t.Errorf("exit code %d, report %+v: %s", code, r, output)
	}
}

// TestCompareWithoutVM checks that the report has the measurements of this machine if the virtual
// machine fails.
func TestCompareWithoutVM(t *testing.T) {
	fairlead := buildFairlead(t)
	for name, test := range map[string]struct{ vm, want string }{
		"missing command": {"/nowhere/vm run", "/nowhere/vm not found: run `make vm` to build it"},
		"no command":      {"", "--vm is empty"},
		"arguments":       {"echo", "-with=/bin/true," + fairlead + " "},
		"failing command": {"echo cannot boot; false", "it does not run in a virtual machine either: exit status 1: cannot boot"},
	} {
		t.Run(name, func(t *testing.T) {
			r, code, output := vmCompare(t, fairlead, "--systems=nft,kube-proxy-iptables", "--vm="+test.vm)
			if code != 0 || r == nil || measuredSystems(r) != "native nft" {
				t.Fatalf("exit code %d, %+v: %s", code, r, output)
			}
			if got := leftOutReason(r, "kube-proxy-iptables", result.Native); !strings.Contains(got, test.want) {
				t.Errorf("the reason for leaving the system out is %q, want %q", got, test.want)
			}
		})
	}
	if r, code, output := vmCompare(t, fairlead, "--systems=kube-proxy-iptables", "--vm="); code != 1 || r != nil || !strings.Contains(output, "no system can run here") {
		t.Errorf("no system to compare: exit code %d, report %+v: %s", code, r, output)
	}
}
