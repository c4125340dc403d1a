// Package inotifytest runs tests under limits of inotify that affect no other process.
package inotifytest

import (
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

const marker = "FAIRLEAD_INOTIFYTEST"

// InUserNamespace reports whether the test runs in a user namespace of its own. Otherwise it runs
// the test again in a process in a new user namespace, and the caller returns.
func InUserNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(marker) != "" {
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+regexp.QuoteMeta(t.Name())+"$", "-test.v") //nolint:gosec // this program
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	switch {
	case cmd.Process == nil:
		t.Skipf("no user namespace: %v", err)
	case err != nil:
		t.Errorf("in a user namespace: %v\n%s", err, out)
	case !strings.Contains(string(out), "--- PASS: "+t.Name()):
		t.Errorf("in a user namespace: the test did not run\n%s", out)
	}
	return false
}

// SetMaxInstances limits the inotify instances of the user namespace.
func SetMaxInstances(t *testing.T, n int) {
	t.Helper()
	set(t, "max_inotify_instances", n)
}

// SetMaxWatches limits the inotify watches of the user namespace.
func SetMaxWatches(t *testing.T, n int) {
	t.Helper()
	set(t, "max_inotify_watches", n)
}

func set(t *testing.T, name string, n int) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/user/"+name, []byte(strconv.Itoa(n)), 0); err != nil {
		t.Fatal(err)
	}
}
