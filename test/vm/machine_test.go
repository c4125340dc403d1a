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

// These tests boot virtual machines, each in some seconds; `make test-vm` runs
// them.

// runVM does what the program does, and returns what it prints.
func runVM(ctx context.Context, args ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	status = run(ctx, args, &out, &errs)
	return status, out.String(), errs.String()
}

// checkStatus fails the test unless the status is want, and shows what was printed.
func checkStatus(t *testing.T, want, got int, stdout, stderr string) {
	t.Helper()
	if got != want {
		t.Fatalf("exit status %d, want %d\nstdout: %s\nstderr: %s", got, want, stdout, stderr)
	}
}

func TestOutputUnchanged(t *testing.T) {
	t.Parallel()
	// More than any buffer on the way holds.
	const script = `printf 'a\r\nb\t\000\377'; echo err >&2; i=0; while [ $i -lt 3000 ]; do echo "line $i of many"; i=$((i+1)); done; exit 7`
	status, stdout, stderr := runVM(t.Context(), "run", "-kernel=6.1", "sh", "-c", script)
	checkStatus(t, 7, status, stdout, stderr)
	want, err := exec.CommandContext(t.Context(), "sh", "-c", script).CombinedOutput()
	if err == nil {
		t.Fatal("the script ended well here")
	}
	if diff := cmp.Diff(string(want), stdout); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// What the kernel says when modules load, on its console, is not in the output.
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
		"not without modprobe": {
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

// Files from outside of the checkout, or of its caches, come along where that is asked for.
func TestExtraFiles(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("along\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	status, stdout, stderr := runVM(t.Context(), "run", "-with="+file, "cat", file)
	checkStatus(t, 0, status, stdout, stderr)
	if stdout != "along\n" {
		t.Errorf("the file has %q in it", stdout)
	}
}

// buildVM returns the path of the program.
func buildVM(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "vm")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// A worktree may be in a temporary folder, and share the cache of another.
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

// The go command reports on tests as if they ran here.
func TestGoTest(t *testing.T) {
	t.Parallel()
	program := buildVM(t)
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", "-exec="+program+" run -kernel=6.1", "./testdata/outcome")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "FAIRLEAD_OUTCOME=something")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("go test ended well, but a test fails")
	}
	for _, want := range []string{
		"--- PASS: TestPasses", "Linux 6.1.", "told something", "--- FAIL: TestFails", "this is why", "FAIL\tfairlead.io/fairlead/test/vm/testdata/outcome",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in what go test prints", want)
		}
	}
	if t.Failed() {
		t.Logf("go test printed:\n%s", out)
	}
}

func TestKernelPanic(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	status, stdout, stderr := runVM(t.Context(), "run", "-kernel=6.12", "-log="+log, "sh", "-c", "echo before; sleep 1; echo c >/proc/sysrq-trigger; sleep 100; echo after")
	checkStatus(t, exitFailed, status, stdout, stderr)
	if stdout != "before\n" {
		t.Errorf("printed %q, want %q", stdout, "before\n")
	}
	for _, want := range []string{"Kernel panic - not syncing: sysrq triggered crash", "vm: on Linux 6.12: the kernel panicked\n"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in %s", want, stderr)
		}
	}
	text, err := os.ReadFile(log)
	if err != nil || !bytes.Contains(text, []byte("Linux version 6.12")) || !bytes.Contains(text, []byte("Kernel panic")) {
		t.Errorf("the log is not complete (%v):\n%s", err, text)
	}
}

// An hour is slept through at once, and is an hour in there.
func TestOwnClock(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	status, stdout, stderr := runVM(t.Context(), "run", "-kernel=6.12", "sh", "-c", "sleep 3600; cut -d. -f1 /proc/uptime")
	checkStatus(t, 0, status, stdout, stderr)
	up, err := strconv.Atoi(strings.TrimSpace(stdout))
	if took := time.Since(begin); err != nil || up < 3600 || up > 3660 || took > 10*time.Minute {
		t.Errorf("after an hour in it, and %v here, it is up for %q seconds (%v)", took, stdout, err)
	}
}

func TestTimeLimits(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		flag, want string
	}{
		"in what runs": {"-limit=25s", "the time limit passed"},
		"at boot":      {"-boot-limit=1s", "it did not boot in time"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status, stdout, stderr := runVM(t.Context(), "run", "-kernel=6.12", test.flag, "sh", "-c", "while :; do :; done")
			checkStatus(t, exitFailed, status, stdout, stderr)
			if !strings.Contains(stderr, "--- the end of the kernel's log:") || !strings.HasSuffix(stderr, "vm: on Linux 6.12: "+test.want+"\n") {
				t.Errorf("want the log and %q, got %s", test.want, stderr)
			}
		})
	}
}

// Output comes while the virtual machine runs, and an interrupt ends it.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	var errs bytes.Buffer
	done := make(chan int)
	go func() {
		// Only the way that the machine ends closes the pipe.
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
