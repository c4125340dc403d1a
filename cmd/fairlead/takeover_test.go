package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// commitMonitor records the names of the threads that commit to a node's ruleset, in the order of
// the commits.
type commitMonitor struct {
	mu         sync.Mutex
	committers []string
	last       uint64 // generation
}

// monitorCommits starts a commitMonitor that runs until the test ends.
func (n *testNode) monitorCommits() *commitMonitor {
	n.t.Helper()
	m := &commitMonitor{}
	cmd := exec.CommandContext(n.t.Context(), "nft", "monitor")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = n.Node.Do(cmd.Start)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	generation := regexp.MustCompile(`^# new generation (\d+) by process \d+ \((.*)\)$`)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if found := generation.FindStringSubmatch(lines.Text()); found != nil {
				m.mu.Lock()
				m.last, _ = strconv.ParseUint(found[1], 10, 32) // only digits
				m.committers = append(m.committers, found[2])
				m.mu.Unlock()
			}
		}
	}()
	n.t.Cleanup(func() {
		_ = cmd.Process.Kill() // the test's context has ended the process
		<-done
		_ = cmd.Wait()
	})
	return m
}

// committersUntil waits for a generation and returns the committers up to it.
func (m *commitMonitor) committersUntil(t *testing.T, generation uint32) []string {
	t.Helper()
	var committers []string
	agenttest.Eventually(t, func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.last < uint64(generation) {
			return fmt.Errorf("monitored up to generation %d, want %d", m.last, generation)
		}
		committers = append([]string(nil), m.committers...)
		return nil
	})
	return committers
}

// TestEndedInstanceWritesNothing stops instances in the middle of repairs. After the first commit of
// an instance, earlier instances must not commit.
func TestEndedInstanceWritesNothing(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	const instances = 7
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	name := func(i int) string { return fmt.Sprintf("instance-%d", i) }
	dir := t.TempDir()
	use := func(i int) {
		t.Helper()
		n.executable = filepath.Join(dir, name(i))
		if err := os.Symlink(self, n.executable); err != nil {
			t.Fatal(err)
		}
	}
	use(0)
	n.run()
	m := n.monitorCommits()
	// The monitor is running once it has recorded a commit.
	for m.count() == 0 {
		n.nft("flush chain ip fairlead nat-prerouting")
	}

	ctx, stop := context.WithCancel(t.Context())
	var disturbing sync.WaitGroup
	disturbing.Go(func() {
		for ctx.Err() == nil {
			cmd := exec.Command("nft", "flush chain ip fairlead nat-prerouting; flush chain ip6 fairlead nat-output")
			if err := n.Node.Do(cmd.Start); err == nil {
				_ = cmd.Wait() // fails while the chain does not exist
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	defer disturbing.Wait()
	defer stop()
	for i := 1; i < instances; i++ {
		use(i)
		next := n.startStandby()
		signal := []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL}[i%2]
		if err := n.program.cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		next.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
		n.program.wait()
		n.program = next
	}
	stop()
	disturbing.Wait()
	committers := m.committersUntil(t, n.generation())
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")

	current, commits := 0, map[string]int{}
	for _, committer := range committers {
		commits[committer]++
		for i := range instances {
			switch {
			case committer != name(i):
			case i < current:
				t.Errorf("%s committed after %s", committer, name(current))
			default:
				current = i
			}
		}
	}
	t.Log(commits)
	for i := range instances {
		if commits[name(i)] == 0 {
			t.Errorf("no commits by %s", name(i))
		}
	}
}

// count returns the number of recorded commits.
func (m *commitMonitor) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.committers)
}
