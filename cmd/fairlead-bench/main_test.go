package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// runAsProgramEnv names the environment variable that makes the test binary run the program, so
// that the race detector and coverage include the program.
const runAsProgramEnv = "FAIRLEAD_TEST_BE_THE_BENCHMARK"

func TestMain(m *testing.M) {
	if os.Getenv(runAsProgramEnv) != "" {
		main()
	}
	os.Exit(m.Run())
}

// programCommand returns a command that runs the program in a separate process.
func programCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), runAsProgramEnv+"=1")
	return cmd
}

// fairleadVersion is the version of the node agent that buildFairlead builds.
const fairleadVersion = "v1.2.3-test"

// buildFairlead builds the node agent to measure and returns its path.
func buildFairlead(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fairlead")
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-ldflags=-s -w -X main.version="+fairleadVersion,
		"-o", path, "fairlead.io/fairlead/cmd/fairlead")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build fairlead: %v\n%s", err, out)
	}
	return path
}

func TestVersion(t *testing.T) {
	t.Parallel()
	var stdout, stderr strings.Builder
	if code := run(t.Context(), []string{"--version"}, &stdout, &stderr); code != 0 || stdout.String() != "fairlead-bench version "+version+"\n" {
		t.Errorf("exit code %d, %q, %q", code, stdout.String(), stderr.String())
	}
}
