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

// vmCompare runs `fairlead-bench compare` where the kernel cannot run kube-proxy's mode
// iptables, as iptables says. The report is nil if none was written.
func vmCompare(t *testing.T, fairlead string, args ...string) (r *result.Report, code int, said string) {
	t.Helper()
	programs := t.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore"} {
		if err := os.WriteFile(filepath.Join(programs, name), []byte("#!/bin/sh\necho no table nat\nexit 3\n"), 0o700); err != nil { //nolint:gosec // it is run
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
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		t.Fatal(err)
	}
	code, said = cmd.ProcessState.ExitCode(), string(out)
	f, err := os.Open(file)
	if err != nil {
		return nil, code, said
	}
	defer f.Close()
	if r, err = result.Read(f); err != nil {
		t.Fatal(err)
	}
	return r, code, said
}

// measuredSystems returns the systems and environments that the memory was measured of.
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

// leftOutReason returns why the system is left out of an environment.
func leftOutReason(r *result.Report, system, environment string) string {
	for _, l := range r.LeftOut {
		if l.System == system && strings.HasPrefix(l.Environment, environment) {
			return l.Reason
		}
	}
	return ""
}

// fakeVM is a virtual machine that is none: what stands behind its flags runs here.
const fakeVM = `f() { while [ "${1#-}" != "$1" ]; do shift; done; "$@"; }; f`

// What this kernel cannot run goes to the virtual machine, with those that others are
// compared with, and the results are one.
func TestCompareInVM(t *testing.T) {
	r, code, said := vmCompare(t, buildFairlead(t), "--systems=nft,kube-proxy-iptables", "--vm="+fakeVM)
	if code != 0 || r == nil {
		t.Fatalf("exit code %d: %s", code, said)
	}
	if got, want := measuredSystems(r), "native nft, vm nft"; got != want {
		t.Errorf("measured are %q, want %q", got, want)
	}
	if len(r.Systems) == 0 || r.Systems[0].Version != fairleadVersion {
		t.Errorf("the systems are %+v, want the first with version %s", r.Systems, fairleadVersion)
	}
	for _, m := range r.Measurements {
		if want := map[bool]int{true: 20, false: 10}[m.Environment == result.Native]; m.Scenario.Services != want {
			t.Errorf("%s in environment %s is with %d Services, want %d", m.Measure, m.Environment, m.Scenario.Services, want)
		}
	}
	// Here the virtual machine's kernel cannot run it either.
	if got := leftOutReason(r, "kube-proxy-iptables", "vm-"); !strings.Contains(got, "no table nat") {
		t.Errorf("it is left out of the virtual machine for the reason %q", got)
	}
	if got := leftOutReason(r, "kube-proxy-iptables", result.Native); !strings.Contains(got, "no table nat; it was measured in the virtual machine vm-") {
		t.Errorf("it is left out for the reason %q", got)
	}
	if !strings.Contains(said, "vm: nft: the last Service answers after") {
		t.Errorf("there is no progress of the virtual machine in %q", said)
	}
}

// What is wrong is told before anything is measured.
func TestCompareInVMInvalidFlags(t *testing.T) {
	r, code, said := vmCompare(t, buildFairlead(t), "--systems=nft,kube-proxy-iptables", "--vm-services=1")
	if code != 1 || r != nil || !strings.Contains(said, "in the virtual machine: 1 Services are too few") {
		t.Errorf("exit code %d, report %+v: %s", code, r, said)
	}
}

// Whatever becomes of the virtual machine, the result has the rest.
func TestCompareWithoutVM(t *testing.T) {
	fairlead := buildFairlead(t)
	for name, test := range map[string]struct{ vm, want string }{
		"there is none":    {"/nowhere/vm run", "there is no /nowhere/vm: `make vm` builds it"},
		"it is not wanted": {"", "without --vm"},
		"its arguments":    {"echo", "-with=/bin/true," + fairlead + " "},
		"it breaks":        {"echo it burns; false", "nor does it run in a virtual machine: exit status 1: it burns"},
	} {
		t.Run(name, func(t *testing.T) {
			r, code, said := vmCompare(t, fairlead, "--systems=nft,kube-proxy-iptables", "--vm="+test.vm)
			if code != 0 || r == nil || measuredSystems(r) != "native nft" {
				t.Fatalf("exit code %d, %+v: %s", code, r, said)
			}
			if got := leftOutReason(r, "kube-proxy-iptables", result.Native); !strings.Contains(got, test.want) {
				t.Errorf("it is left out for the reason %q, want %q", got, test.want)
			}
		})
	}
	if r, code, said := vmCompare(t, fairlead, "--systems=kube-proxy-iptables", "--vm="); code != 1 || r != nil || !strings.Contains(said, "no system can run here") {
		t.Errorf("with nothing to compare: exit code %d, %+v: %s", code, r, said)
	}
}
