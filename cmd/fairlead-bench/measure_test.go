package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"fairlead.io/fairlead/bench/result"
)

// interfaceNames returns the names of the interfaces of this process's network namespace.
func interfaceNames(t *testing.T) []string {
	t.Helper()
	list, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range list {
		names = append(names, l.Attrs().Name)
	}
	return names
}

func TestMeasure(t *testing.T) {
	file := filepath.Join(t.TempDir(), "result.json")
	if err := os.WriteFile(file, bytes.Repeat([]byte("older results\n"), 10_000), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"--services=20", "--endpoints=2", "--samples=5", "--only=update,restart", "--json=" + file}
	var stdout, stderr strings.Builder
	if code := run(context.Background(), args, &stdout, &stderr); code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr.String())
	}
	for _, want := range []string{"update-ack", "update-packet", "replace-endpoint, 20 × 2", "restart"} {
		if !strings.Contains(stdout.String(), want) {
			t.Errorf("the table does not contain %q:\n%s", want, stdout.String())
		}
	}
	if !strings.Contains(stderr.String(), "update: 20 Services, round 1 of 5") {
		t.Errorf("no progress on standard error: %q", stderr.String())
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	report, err := result.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"fairlead-bench", "--endpoints=2", "--json=" + file, "--only=update,restart", "--samples=5", "--services=20",
	}
	if diff := cmp.Diff(want, report.Command); diff != "" || len(report.Measurements) != 11 {
		t.Errorf("%d measurements, want 11; command (-want +got):\n%s", len(report.Measurements), diff)
	}
	if left, err := f.Read(make([]byte, 1)); left > 0 {
		t.Errorf("the file has old content after the results: error %v", err)
	}
}

// TestMeasureInterrupted sends SIGINT, as Ctrl-C does.
func TestMeasureInterrupted(t *testing.T) {
	before := interfaceNames(t)
	file := filepath.Join(t.TempDir(), "result.json")
	cmd := programCommand(t, "--services=20", "--samples=100000000", "--only=update", "--json="+file)
	// The program must not outlive this process. Pdeathsig follows the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer watchdog.Stop()
	var output bytes.Buffer
	interrupted := false
	for b := make([]byte, 1024); ; {
		n, err := stderr.Read(b)
		output.Write(b[:n])
		if err != nil {
			break
		}
		if !interrupted && strings.Contains(output.String(), "round 1") {
			interrupted = true
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // the test checks the exit code
	if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(output.String(), "fairlead-bench: interrupted") || stdout.Len() > 0 {
		t.Errorf("exit code %d, standard error %q, standard output %q", code, output.String(), stdout.String())
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("a file without results is left behind")
	}
	if diff := cmp.Diff(before, interfaceNames(t)); diff != "" {
		t.Errorf("interfaces (-before +after):\n%s", diff)
	}
}

func TestMeasureInvalidFlags(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"mode":       {[]string{"--mode=iptables"}, "--mode: unknown mode"},
		"part":       {[]string{"--only=update,speed"}, `--only: unknown part "speed"`},
		"argument":   {[]string{"nft"}, `unknown command "nft"`},
		"folder":     {[]string{"--json=/nowhere/result.json"}, "--json: open /nowhere/result.json"},
		"no numbers": {[]string{"--rates=many"}, "--rates"},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr strings.Builder
			code := run(context.Background(), tc.args, &stdout, &stderr)
			if code != 1 || !strings.Contains(stderr.String(), tc.want) {
				t.Errorf("exit code %d, %q, want 1 and %q", code, stderr.String(), tc.want)
			}
		})
	}
}
