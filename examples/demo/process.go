package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

// process is a program that runs in a namespace.
type process struct {
	cancel func()
	done   chan struct{} // closed when it has ended
	err    error         // how, to be read when done is closed
}

// startProcess runs a program in a namespace until stop, or until it ends by
// itself. The kernel kills it if this process dies.
func startProcess(ctx context.Context, ns *nettest.Namespace, output io.Writer, program string, args ...string) (*process, error) {
	// It must still be there while other things are cleaned up.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // the caller's choice
	cmd.Stdout, cmd.Stderr = output, output
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 3 * time.Second // Then it is killed.
	// In a process group of its own it does not get the terminal's Ctrl-C.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	p := &process{cancel: cancel, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		defer close(p.done)
		// Pdeathsig is about the thread: Do keeps it until Wait returns.
		err := ns.Do(func() error {
			err := cmd.Start()
			started <- err
			if err == nil {
				p.err = cmd.Wait()
			}
			return nil
		})
		if err != nil {
			select {
			case started <- err:
			default:
			}
		}
	}()
	if err := <-started; err != nil {
		cancel()
		return nil, fmt.Errorf("start %s: %w", program, err)
	}
	return p, nil
}

// stop ends the program and waits until it has ended.
func (p *process) stop() error {
	p.cancel()
	<-p.done
	if errors.Is(p.err, exec.ErrWaitDelay) {
		return p.err
	}
	return nil // How it ends when it is told to is its own affair.
}

// logLine is one line of fairlead's log: a call to the kernel, or with the last
// two fields a node port that a Service was given.
type logLine struct {
	Time     time.Time // when it had ended
	Level    slog.Level
	Message  string `json:"msg"`
	Reason   string
	Changes  int // changed Services, those of each family counted
	Failed   int
	Services int
	// Latency is from when the syncer had the change to the end of the call.
	Latency time.Duration

	Service  string
	NodePort uint16 `json:"node_port"`
}

// agentLog is fairlead's log, as it grows.
type agentLog struct {
	file io.Writer // gets all of it

	mu        sync.Mutex
	partial   []byte // the beginning of a line
	unparsed  []string
	commits   []logLine
	nodePorts map[string]uint16 // the last node port given to each Service
	problems  []string          // lines of level Warn and Error
	changed   chan struct{}     // closed, and made anew, when commits grow
}

func newAgentLog(file io.Writer) *agentLog {
	return &agentLog{file: file, nodePorts: map[string]uint16{}, changed: make(chan struct{})}
}

// Write takes a part of the log.
func (j *agentLog) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n, err := j.file.Write(p)
	j.partial = append(j.partial, p...)
	for {
		line, rest, whole := bytes.Cut(j.partial, []byte("\n"))
		if !whole {
			return n, err
		}
		j.parseLine(line)
		j.partial = bytes.Clone(rest)
	}
}

func (j *agentLog) parseLine(line []byte) {
	var c logLine
	if err := json.Unmarshal(line, &c); err != nil {
		j.unparsed = append(j.unparsed, string(line)) // Not logged but printed.
		return
	}
	if c.Level >= slog.LevelWarn {
		j.problems = append(j.problems, string(line))
	}
	if c.Message == "node port allocated" {
		j.nodePorts[c.Service] = c.NodePort
	}
	if c.Message == "committed" {
		j.commits = append(j.commits, c)
		close(j.changed)
		j.changed = make(chan struct{})
	}
}

// nodePort returns the last node port given to a Service, 0 if there was none.
func (j *agentLog) nodePort(service string) uint16 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.nodePorts[service]
}

// commitCount returns the number of commits so far.
func (j *agentLog) commitCount() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.commits)
}

// problemLines returns the lines of the log that say something is wrong.
func (j *agentLog) problemLines() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append(j.problems, j.unparsed...)
}

// waitCommit blocks until there are more than n commits, and returns the one that
// follows the first n.
func (j *agentLog) waitCommit(ctx context.Context, fairlead *process, n int) (logLine, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		j.mu.Lock()
		if len(j.commits) > n {
			defer j.mu.Unlock()
			return j.commits[n], nil
		}
		grown := j.changed
		j.mu.Unlock()
		select {
		case <-grown:
		case <-fairlead.done:
			return logLine{}, fmt.Errorf("fairlead has ended: %s", strings.Join(append(j.problemLines(), fmt.Sprint(fairlead.err)), "\n"))
		case <-ctx.Done():
			return logLine{}, fmt.Errorf("wait for fairlead to program the kernel: %w", errors.Join(append(asErrors(j.problemLines()), ctx.Err())...))
		}
	}
}

func asErrors(lines []string) []error {
	errs := make([]error, 0, len(lines))
	for _, line := range lines {
		errs = append(errs, errors.New(line))
	}
	return errs
}
