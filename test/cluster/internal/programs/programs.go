// Package programs runs the programs of a cluster and reports when one ends.
package programs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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

// Failed returns a channel that receives an error when a program ends.
func (g *Group) Failed() <-chan error { return g.failed }

// Log returns the path of the log of a program.
func (g *Group) Log(name string) string { return filepath.Join(g.logs, name+".log") }

// Start starts a program, with a name for its log.
func (g *Group) Start(name, path string, args ...string) error {
	log, err := os.OpenFile(g.Log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()                  //nolint:errcheck // the program has its own descriptor
	cmd := exec.Command(path, args...) //nolint:noctx // it runs until the end
	cmd.Env = append(os.Environ(), g.env...)
	cmd.Stdout, cmd.Stderr = log, log
	return g.start(name, cmd)
}

func (g *Group) start(name string, cmd *exec.Cmd) error {
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	g.Add(name, cmd)
	return nil
}

// Add adds a running program.
func (g *Group) Add(name string, cmd *exec.Cmd) {
	go func() {
		err := cmd.Wait()
		select {
		case g.failed <- fmt.Errorf("%s has ended: %w\n%s", name, errors.Join(err, errEnded), Tail(g.Log(name))):
		default:
		}
	}()
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
