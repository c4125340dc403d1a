package namespaces_test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/test/cluster/internal/cgroup"
	"fairlead.io/fairlead/test/cluster/internal/namespaces"
)

func TestNamespaces(t *testing.T) {
	t.Parallel()
	pause := filepath.Join(t.TempDir(), "pause")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", pause, "../../pause")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build pause: %v\n%s", err, out)
	}
	t.Run("a program sees only its own", func(t *testing.T) { testSeparate(t, pause) })
	t.Run("killing the first process ends all", func(t *testing.T) { testKill(t, pause) })
}

// start runs a shell script in new namespaces.
func start(t *testing.T, o namespaces.Options, script string) *exec.Cmd {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("needs root")
	}
	var err error
	if o.Group, err = cgroup.Create(fmt.Sprintf("fairlead-test-%d", os.Getpid())); err != nil {
		t.Fatal(err)
	}
	o.Program = []string{"/bin/sh", "-euc", script}
	cmd, err := namespaces.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err := o.Group.Remove(); err != nil {
			t.Error(err)
		}
	})
	return cmd
}

// testSeparate checks that a program sees none of the machine's processes, interfaces and control
// groups, and that a node's files are its own.
func testSeparate(t *testing.T, pause string) {
	t.Helper()
	// TMPDIR may be below /var, which a node replaces.
	dir, err := os.MkdirTemp(".", "node-") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	output, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	cmd := start(t, namespaces.Options{Dir: dir, Node: true, Pause: pause, Output: output}, `
		echo first process: $(cat /proc/1/comm)
		echo interfaces: $(ls /proc/sys/net/ipv4/conf)
		echo control groups: $(cut -d: -f3 /proc/self/cgroup | sort -u)
		hostname other
		touch /etc/fairlead-test /var/fairlead-test /opt/fairlead-test /run/fairlead-test
		echo 7 >/proc/sys/kernel/panic
		mkdir $(awk '$3 ~ /^cgroup/ { print $2; exit }' /proc/mounts)/below
		exit 3`)
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 3 {
		t.Errorf("error %v, want exit status 3", err)
	}
	if _, err := output.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(output)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"first process: pause\n", "interfaces: all default lo\n", "control groups: /"} {
		if !strings.Contains(string(got), want) {
			t.Errorf("output has no %q:\n%s", want, got)
		}
	}
	for _, dir := range []string{"/etc", "/var", "/opt", "/run"} {
		if _, err := os.Stat(filepath.Join(dir, "fairlead-test")); err == nil {
			t.Errorf("the program has written to %s of the machine", dir)
		}
	}
	if name, err := os.Hostname(); err != nil || name == "other" {
		t.Errorf("host name %q, error %v", name, err)
	}
	if value, err := os.ReadFile("/proc/sys/kernel/panic"); err != nil || strings.TrimSpace(string(value)) == "7" {
		t.Errorf("kernel.panic %q, error %v", value, err)
	}
}

// testKill checks that killing the first process ends the others, and that the control groups can
// then be removed.
func testKill(t *testing.T, pause string) {
	t.Helper()
	dir := t.TempDir()
	mark := fmt.Sprint(3_000_000 + os.Getpid()) // an argument that finds the process
	cmd := start(t, namespaces.Options{Dir: dir, Pause: pause}, "setsid sleep "+mark+" & sleep "+mark)
	eventually(t, "two processes", func() bool { return processes(t, "sleep\x00"+mark) == 2 })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no process", func() bool { return processes(t, "sleep\x00"+mark) == 0 })
}

// processes counts the processes with a command line.
func processes(t *testing.T, want string) int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, file := range files {
		if line, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(line), want) {
			count++
		}
	}
	return count
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timed out: %s", what)
		}
	}
}
