//go:build cluster

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"fairlead.io/fairlead/test/cluster/internal/lab"
)

// loadResult is what the load generator writes at its end.
type loadResult struct {
	Connections int
	// Failures are connections that fail, or that have no answer in time.
	Failures []string
	// Slowest is the longest time of a connection.
	Slowest time.Duration
}

// generateLoad opens connections to an address, one after the other, until its standard input
// ends. Each gets an answer over HTTP.
func generateLoad(address string) error {
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	const pause = 20 * time.Millisecond
	var r loadResult
	for ctx.Err() == nil {
		began := time.Now()
		if err := request(address); err != nil {
			r.Failures = append(r.Failures, fmt.Sprintf("%s: after %s: %v", began.Format(time.TimeOnly), time.Since(began).Round(time.Millisecond), err))
		}
		r.Connections++
		r.Slowest = max(r.Slowest, time.Since(began))
		time.Sleep(pause)
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func request(address string) error {
	// A busy machine must not look like a lost packet.
	const timeout = 20 * time.Second
	conn, err := net.DialTimeout("tcp", address, timeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "GET /hostname HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	answer, err := io.ReadAll(conn)
	if err == nil && !bytes.Contains(answer, []byte("200 OK")) {
		err = fmt.Errorf("answer %q", answer)
	}
	return err
}

// load is a running load generator.
type load struct {
	name   string
	cmd    *exec.Cmd
	stdin  io.Closer
	stdout bytes.Buffer
}

// startLoad starts a load generator on a node, or outside of the cluster if node is empty.
func startLoad(t *testing.T, l *lab.Lab, node, address string) *load {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd, err := l.Command(context.WithoutCancel(t.Context()), node, program, loadCommand, address)
	if err != nil {
		t.Fatal(err)
	}
	g := &load{name: fmt.Sprintf("from %q to %s", node, address), cmd: cmd}
	if g.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = &g.stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *load) stop() (loadResult, error) {
	var r loadResult
	if err := errors.Join(g.stdin.Close(), g.cmd.Wait()); err != nil {
		return r, err
	}
	return r, json.Unmarshal(g.stdout.Bytes(), &r)
}

// underLoad runs a change while connections are opened to every address, and fails the test if one
// of them fails.
func underLoad(t *testing.T, l *lab.Lab, sources map[string][]string, change func()) {
	t.Helper()
	var loads []*load
	for node, addresses := range sources {
		for _, address := range addresses {
			loads = append(loads, startLoad(t, l, node, address))
		}
	}
	results, errs := make([]loadResult, len(loads)), make([]error, len(loads))
	func() {
		defer func() { // also after t.Fatal
			var wait sync.WaitGroup
			for i, g := range loads {
				wait.Go(func() { results[i], errs[i] = g.stop() })
			}
			wait.Wait()
		}()
		change()
	}()
	for i, g := range loads {
		switch r := results[i]; {
		case errs[i] != nil:
			t.Errorf("load %s: %v", g.name, errs[i])
		case len(r.Failures) > 0:
			t.Errorf("load %s: %d of %d connections failed: %q", g.name, len(r.Failures), r.Connections, r.Failures[:min(len(r.Failures), 5)])
		case r.Connections == 0:
			t.Errorf("load %s: no connections", g.name)
		default:
			t.Logf("load %s: 0 of %d connections failed, the slowest took %s", g.name, r.Connections, r.Slowest.Round(time.Millisecond))
		}
	}
}
