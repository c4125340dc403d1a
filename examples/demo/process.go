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

// process is a program that runs in a network namespace.
type process struct {
	cancel func()
	done   chan struct{} // closed when the program has ended
	err    error         // the result of Wait; valid when done is closed
}

// startProcess runs a program in a network namespace until it ends or the caller calls stop. The
// kernel kills the program if this process dies.
func startProcess(ctx context.Context, ns *nettest.Namespace, output io.Writer, program string, args ...string) (*process, error) {
	// The program must keep running during the cleanup of resources created after it.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // the caller chooses the program
	cmd.Stdout, cmd.Stderr = output, output
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 3 * time.Second // from SIGTERM to SIGKILL
	// In a separate process group, the program does not receive the terminal's Ctrl-C.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	p := &process{cancel: cancel, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		defer close(p.done)
		// Pdeathsig follows the thread that started the program: Do keeps the thread until
		// Wait returns.
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
	return nil // the exit status does not matter after SIGTERM
}

// logLine is one line of fairlead's log: a commit, or an allocated node port with Service and
// NodePort.
type logLine struct {
	Time     time.Time // end of the commit
	Level    slog.Level
	Message  string `json:"msg"`
	Reason   string
	Changes  int // changed Services, counted once per address family
	Failed   int
	Services int
	// Latency is the time from the change at the syncer's input until the end of the commit.
	Latency time.Duration

	Service  string
	NodePort uint16 `json:"node_port"`
}

// agentLog receives and parses fairlead's log.
type agentLog struct {
	file io.Writer // receives a copy of the log

	mu        sync.Mutex
	partial   []byte // incomplete last line
	unparsed  []string
	commits   []logLine
	nodePorts map[string]uint16 // last node port of each Service
	problems  []string          // lines of level WARN and ERROR
	changed   chan struct{}     // closed and replaced when commits grows
}

func newAgentLog(file io.Writer) *agentLog {
	return &agentLog{file: file, nodePorts: map[string]uint16{}, changed: make(chan struct{})}
}

// Write implements io.Writer.
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
		j.unparsed = append(j.unparsed, string(line)) // output without the log's format
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

// nodePort returns the last node port allocated to a Service, or 0.
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

// problemLines returns warnings, errors, and output that is not in the log's format.
func (j *agentLog) problemLines() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append(j.problems, j.unparsed...)
}

// waitCommit blocks until there are more than n commits, and returns commit number n, counting
// from 0.
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
			return logLine{}, fmt.Errorf("fairlead ended: %s", strings.Join(append(j.problemLines(), fmt.Sprint(fairlead.err)), "\n"))
		case <-ctx.Done():
			return logLine{}, fmt.Errorf("wait until fairlead has programmed the kernel: %w", errors.Join(append(asErrors(j.problemLines()), ctx.Err())...))
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
