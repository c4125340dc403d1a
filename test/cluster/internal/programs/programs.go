// Package programs runs the programs of a cluster and reports when one ends.
package programs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Group is a group of programs that must all run until the end. They end with the PID namespace
// of the caller.
type Group struct {
	logs   string
	env    []string
	failed chan error
}

// NewGroup returns a group. Each program writes to a file in the directory logs. env are variables
// that programs have in addition to the environment of this process.
func NewGroup(logs string, env ...string) *Group {
	return &Group{logs: logs, env: env, failed: make(chan error, 1)}
}

// Failed returns a channel that receives an error when a program of Start or Add ends, or one of
// Keep cannot start again.
func (g *Group) Failed() <-chan error { return g.failed }

// Log returns the path of the log of a program.
func (g *Group) Log(name string) string { return filepath.Join(g.logs, name+".log") }

// Start starts a program, with a name for its log.
func (g *Group) Start(name, path string, args ...string) error {
	cmd, err := g.run(name, path, args)
	if err != nil {
		return err
	}
	g.Add(name, cmd)
	return nil
}

// Keep starts a program, and starts it again after each end, as an init system does.
func (g *Group) Keep(name, path string, args ...string) error {
	const pause = time.Second
	cmd, err := g.run(name, path, args)
	if err != nil {
		return err
	}
	go func() {
		for {
			_ = cmd.Wait() // its log has the reason
			time.Sleep(pause)
			if cmd, err = g.run(name, path, args); err != nil {
				g.Fail(err)
				return
			}
		}
	}()
	return nil
}

func (g *Group) run(name, path string, args []string) (*exec.Cmd, error) {
	log, err := os.OpenFile(g.Log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()                  //nolint:errcheck // the program has its own descriptor
	cmd := exec.Command(path, args...) //nolint:noctx // it runs until the end
	cmd.Env = append(os.Environ(), g.env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return cmd, nil
}

// Add adds a running program.
func (g *Group) Add(name string, cmd *exec.Cmd) {
	go func() {
		err := cmd.Wait()
		g.Fail(fmt.Errorf("%s has ended: %w\n%s", name, errors.Join(err, errEnded), Tail(g.Log(name))))
	}()
}

// Fail makes Failed return an error, unless it has one already.
func (g *Group) Fail(err error) {
	select {
	case g.failed <- err:
	default:
	}
}

var errEnded = errors.New("it must run until the cluster ends")

// Tail returns the last lines of a log.
func Tail(path string) string {
	const lines = 20
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}
