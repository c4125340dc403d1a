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
)

// commitMonitor records who commits to a node's ruleset: names of threads, in the order
// of the commits.
type commitMonitor struct {
	mu         sync.Mutex
	committers []string
	last       uint64 // generation
}

// monitorCommits starts to record. It ends with the test.
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
		_ = cmd.Process.Kill() // it has ended with the test's context
		<-done
		_ = cmd.Wait()
	})
	return m
}

// committersUntil returns who has committed up to a generation.
func (m *commitMonitor) committersUntil(t *testing.T, generation uint32) []string {
	t.Helper()
	var committers []string
	eventually(t, func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.last < uint64(generation) {
			return fmt.Errorf("the monitor has seen generation %d, want %d", m.last, generation)
		}
		committers = append([]string(nil), m.committers...)
		return nil
	})
	return committers
}

// TestEndedInstanceWritesNothing ends instances in the middle of repairs. From the
// first commit of the next one on, none of those before may commit.
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
	// The monitor listens when it sees a commit.
	for m.count() == 0 {
		n.nft("flush chain ip fairlead nat-prerouting")
	}

	ctx, stop := context.WithCancel(t.Context())
	var disturbing sync.WaitGroup
	disturbing.Go(func() {
		for ctx.Err() == nil {
			cmd := exec.Command("nft", "flush chain ip fairlead nat-prerouting; flush chain ip6 fairlead nat-output")
			if err := n.Node.Do(cmd.Start); err == nil {
				_ = cmd.Wait() // the chain may be gone for a moment
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
	n.awaitAnswers(serviceAddrs(10, 80), "a")

	current, commits := 0, map[string]int{}
	for _, by := range committers {
		commits[by]++
		for i := range instances {
			switch {
			case by != name(i):
			case i < current:
				t.Errorf("%s committed after %s", by, name(current))
			default:
				current = i
			}
		}
	}
	t.Log(commits)
	for i := range instances {
		if commits[name(i)] == 0 {
			t.Errorf("%s committed nothing", name(i))
		}
	}
}

// count returns how many commits were recorded.
func (m *commitMonitor) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.committers)
}
