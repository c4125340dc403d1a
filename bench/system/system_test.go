package system_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/internal/nettest"
)

// newEnvironment returns an Environment with a namespace and a directory, which StartProcess
// needs.
func newEnvironment(t *testing.T) system.Environment {
	t.Helper()
	ns, err := nettest.NewNamespace("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	return system.Environment{Namespace: ns, Dir: t.TempDir()}
}

func start(t *testing.T, env system.Environment, script string) *system.Process {
	t.Helper()
	p, err := system.StartProcess(env, "program", "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Stop() })
	return p
}

// waitLogged waits until the program's output ends with the given text, and returns the output.
func waitLogged(t *testing.T, env system.Environment, suffix string) string {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		output, err := os.ReadFile(filepath.Join(env.Dir, "program.log"))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(strings.TrimSpace(string(output)), suffix) {
			return string(output)
		}
		if time.Now().After(deadline) {
			t.Fatalf("the program printed %q, want output that ends with %q", output, suffix)
		}
	}
}

func TestProcess(t *testing.T) {
	env := newEnvironment(t)
	p := start(t, env, "readlink /proc/self/ns/net; echo ready >&2; exec sleep 1000")
	var own, others unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &own); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fstat(env.Namespace.Fd(), &others); err != nil {
		t.Fatal(err)
	}
	text := waitLogged(t, env, "ready")
	var inode uint64
	if namespace, _, _ := strings.Cut(strings.TrimPrefix(text, "net:["), "]"); namespace != "" {
		for _, digit := range namespace {
			inode = inode*10 + uint64(digit-'0')
		}
	}
	if inode != others.Ino || inode == own.Ino {
		t.Errorf("the program printed %q, want namespace %d", text, others.Ino)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if err := p.Stop(); err != nil {
		t.Errorf("second Stop: %v", err)
	}
	if err := unix.Kill(p.PID(), 0); err == nil {
		t.Errorf("process %d is still running", p.PID())
	}
}

func TestProcessExitsEarly(t *testing.T) {
	p := start(t, newEnvironment(t), "exit 3")
	<-p.Done()
	if err := p.Stop(); err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "program.log") {
		t.Errorf("error %v, want one with the exit status and the path of the log", err)
	}
}

func TestStartProcessNotFound(t *testing.T) {
	if _, err := system.StartProcess(newEnvironment(t), "program", "/nowhere"); err == nil {
		t.Error("no error")
	}
}

// TestUsageOf lets a shell and its child use processor time and memory.
func TestUsageOf(t *testing.T) {
	env := newEnvironment(t)
	const work = `i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; `
	p := start(t, env, work+"sh -c '"+work+"echo ready; sleep 1000; true'; true")
	before, err := system.UsageOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	waitLogged(t, env, "ready")
	both, err := system.UsageOf(p.PID())
	if err != nil {
		t.Fatal(err)
	}
	if both.CPU() < 40*time.Millisecond || both.Resident < 1<<20 || both.PeakResident < both.Resident {
		t.Errorf("usage of a shell and its child is %+v, want at least 40ms of processor time and 1 MiB", both)
	}
	own, err := system.UsageOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	// This process has the shell as a child.
	if used := own.Resident - both.Resident; used < 1<<20 {
		t.Errorf("usage of this process is %+v before and %+v with a child that uses %+v", before, own, both)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if _, err := system.UsageOf(p.PID()); err == nil {
		t.Error("UsageOf returned no error for a process that has ended")
	}
}
