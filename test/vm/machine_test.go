//go:build e2e

package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// These tests boot virtual machines, which takes some seconds each. `make test-vm` runs them.

// runVM runs the program and returns its exit status and output.
func runVM(ctx context.Context, args ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	status = run(ctx, args, &out, &errs)
	return status, out.String(), errs.String()
}

// checkStatus fails the test unless the exit status is want, and logs the output.
func checkStatus(t *testing.T, want, got int, stdout, stderr string) {
	t.Helper()
	if got != want {
		t.Fatalf("exit status %d, want %d\nstdout: %s\nstderr: %s", got, want, stdout, stderr)
	}
}

// TestOutputUnchanged checks that the output arrives byte for byte.
func TestOutputUnchanged(t *testing.T) {
	t.Parallel()
	// More output than fits into any buffer on its way.
	const script = `printf 'a\r\nb\t\000\377'; echo err >&2; i=0; while [ $i -lt 3000 ]; do echo "line $i of many"; i=$((i+1)); done; exit 7`
	status, stdout, stderr := runVM(t.Context(), "run", "-kernel=6.1", "sh", "-c", script)
	checkStatus(t, 7, status, stdout, stderr)
	want, err := exec.CommandContext(t.Context(), "sh", "-c", script).CombinedOutput()
	if err == nil {
		t.Fatal("the script succeeded on this machine, want status 7")
	}
	if diff := cmp.Diff(string(want), stdout); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestModules checks that modules load on demand, and that kernel messages on the console do
// not appear in the output.
func TestModules(t *testing.T) {
	t.Parallel()
	const load = `ip link add d0 type dummy && ipvsadm -A -t 10.0.0.1:80 -s wlc && ipvsadm -S -n && nft add table ip t && echo done`
	for name, test := range map[string]struct {
		flags  []string
		script string
		want   string
	}{
		"on demand, 6.1":  {[]string{"-kernel=6.1"}, load, "-A -t 10.0.0.1:80 -s wlc\ndone\n"},
		"on demand, 6.12": {[]string{"-kernel=6.12"}, load, "-A -t 10.0.0.1:80 -s wlc\ndone\n"},
		"without modprobe": {
			[]string{"-kernel=6.12", "-modprobe=false"},
			`ip link add d0 type dummy 2>/dev/null || echo "no dummy"; modprobe dummy 2>/dev/null || echo "no modprobe"; ls /lib/modules/$(uname -r)/kernel/drivers/net/dummy.ko* | wc -l`,
			"no dummy\nno modprobe\n1\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status, stdout, stderr := runVM(t.Context(), append(append([]string{"run"}, test.flags...), "sh", "-c", test.script)...)
			checkStatus(t, 0, status, stdout, stderr)
			if diff := cmp.Diff(test.want, stdout); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestExtraFiles checks that -with copies a file from outside of the checkout.
func TestExtraFiles(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("along\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	status, stdout, stderr := runVM(t.Context(), "run", "-with="+file, "cat", file)
	checkStatus(t, 0, status, stdout, stderr)
	if stdout != "along\n" {
		t.Errorf("the file contains %q", stdout)
	}
}

// buildVM builds the program and returns its path.
func buildVM(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "vm")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// TestCheckoutInTempDir checks a worktree in a temporary directory that shares the cache of
// another checkout.
func TestCheckoutInTempDir(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	here, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(here, ".cache"), filepath.Join(root, ".cache")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"go.mod": "module fairlead\n", "folder/file": "found\n"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), buildVM(t), "run", "sh", "-c", "pwd; cat file; ../.cache/nftables/1.1.3/nft --version | cut -d' ' -f1,2")
	cmd.Dir = filepath.Join(root, "folder")
	out, err := cmd.CombinedOutput()
	if want := cmd.Dir + "\nfound\nnftables v1.1.3\n"; err != nil || string(out) != want {
		t.Errorf("printed %q, want %q (%v)", out, want, err)
	}
}

// TestGoTest checks that the go command reports on tests as if they ran on this machine.
func TestGoTest(t *testing.T) {
	t.Parallel()
	program := buildVM(t)
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", "-exec="+program+" run -kernel=6.1", "./testdata/outcome")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "FAIRLEAD_OUTCOME=something")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("go test succeeded, want a failure")
	}
	for _, want := range []string{
		"--- PASS: TestPasses", "Linux 6.1.", "FAIRLEAD_OUTCOME=something", "--- FAIL: TestFails", "this is why", "FAIL\tfairlead.io/fairlead/test/vm/testdata/outcome",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in the output of go test", want)
		}
	}
	if t.Failed() {
		t.Logf("go test printed:\n%s", out)
	}
}

// TestKernelPanic checks that a kernel panic is reported and logged.
func TestKernelPanic(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	status, stdout, stderr := runVM(t.Context(), "run", "-kernel=6.12", "-log="+log, "sh", "-c", "echo before; sleep 1; echo c >/proc/sysrq-trigger; sleep 100; echo after")
	checkStatus(t, exitFailed, status, stdout, stderr)
	if stdout != "before\n" {
		t.Errorf("printed %q, want %q", stdout, "before\n")
	}
	for _, want := range []string{"Kernel panic - not syncing: sysrq triggered crash", "vm: on Linux 6.12: kernel panic\n"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in %s", want, stderr)
		}
	}
	text, err := os.ReadFile(log)
	if err != nil || !bytes.Contains(text, []byte("Linux version 6.12")) || !bytes.Contains(text, []byte("Kernel panic")) {
		t.Errorf("the log is incomplete (%v):\n%s", err, text)
	}
}

// TestOwnClock checks that an hour of sleep advances the machine's clock by an hour and takes
// little real time.
func TestOwnClock(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	status, stdout, stderr := runVM(t.Context(), "run", "-kernel=6.12", "sh", "-c", "sleep 3600; cut -d. -f1 /proc/uptime")
	checkStatus(t, 0, status, stdout, stderr)
	up, err := strconv.Atoi(strings.TrimSpace(stdout))
	if took := time.Since(begin); err != nil || up < 3600 || up > 3660 || took > 10*time.Minute {
		t.Errorf("after sleep 3600, which took %v, uptime is %q seconds (%v)", took, stdout, err)
	}
}

// TestTimeLimits checks that a machine that hangs ends at the time limit.
func TestTimeLimits(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		flag, want string
	}{
		"command": {"-limit=25s", "time limit exceeded"},
		"boot":    {"-boot-limit=1s", "boot time limit exceeded"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status, stdout, stderr := runVM(t.Context(), "run", "-kernel=6.12", test.flag, "sh", "-c", "while :; do :; done")
			checkStatus(t, exitFailed, status, stdout, stderr)
			if !strings.Contains(stderr, "--- end of the kernel log:") || !strings.HasSuffix(stderr, "vm: on Linux 6.12: "+test.want+"\n") {
				t.Errorf("want the log and %q, got %s", test.want, stderr)
			}
		})
	}
}

// TestInterrupt checks that output arrives while the virtual machine runs, and that canceling
// the context ends it.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	var errs bytes.Buffer
	done := make(chan int)
	go func() {
		// The pipe stays open until the machine has ended.
		status := run(ctx, []string{"run", "-kernel=6.1", "sh", "-c", "echo first; while :; do :; done"}, w, &errs)
		w.Close()
		done <- status
	}()
	first := make([]byte, len("first\n"))
	if _, err := io.ReadFull(r, first); err != nil || string(first) != "first\n" {
		t.Errorf("the first line is %q (%v)", first, err)
	}
	cancel()
	if status := <-done; status != exitFailed {
		t.Errorf("exit status %d, want %d", status, exitFailed)
	}
	if want := "vm: on Linux 6.1: context canceled\n"; errs.String() != want {
		t.Errorf("stderr is %q, want %q", errs.String(), want)
	}
}
