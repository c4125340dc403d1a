package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"fairlead.io/fairlead/bench/system"
)

// agent is Fairlead on the node. Its methods may be called concurrently. Between start and
// stop it is restarted when it exits unexpectedly, as a kubelet does.
type agent struct {
	system   system.System
	env      system.Environment
	recorder *recorder

	mu      sync.Mutex
	process *system.Process // nil if it must not run
}

// start starts the agent.
func (a *agent) start(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.startLocked(ctx)
}

// startLocked starts the agent. The caller holds a.mu.
func (a *agent) startLocked(ctx context.Context) error {
	running, err := a.system.Start(ctx, a.env)
	if err != nil {
		return err
	}
	process, ok := running.(*system.Process)
	if !ok {
		return fmt.Errorf("%s is a %T, want a process", a.system.Name(), running)
	}
	a.process = process
	go a.restartOnExit(ctx, process)
	return nil
}

// restartOnExit starts the agent again if the process exits unexpectedly.
func (a *agent) restartOnExit(ctx context.Context, process *system.Process) {
	<-process.Done()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.process != process || ctx.Err() != nil {
		return
	}
	a.recorder.recordCrash()
	_ = a.startLocked(ctx) // a failure shows as failed connections or stale endpoints
}

// detach returns the running process and disables its restart.
func (a *agent) detach() *system.Process {
	a.mu.Lock()
	defer a.mu.Unlock()
	process := a.process
	a.process = nil
	return process
}

// setSystem sets the program to run from the next start on.
func (a *agent) setSystem(s system.System) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.system = s
}

// stop sends SIGTERM to the agent, if it is running, and waits until it has exited.
func (a *agent) stop() error {
	process := a.detach()
	if process == nil {
		return nil
	}
	return process.Stop()
}

// kill sends SIGKILL to the agent, if it is running, and waits until it has exited.
func (a *agent) kill() error { return a.endWith(syscall.SIGKILL) }

func (a *agent) endWith(signal syscall.Signal) error {
	process := a.detach()
	if process == nil {
		return nil
	}
	if err := syscall.Kill(process.PID(), signal); err != nil {
		return fmt.Errorf("send %s to %s: %w", signal, a.system.Name(), err)
	}
	<-process.Done()
	return nil
}

// signal sends a signal that does not end the process.
func (a *agent) signal(signal syscall.Signal) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.process == nil {
		return errors.New("the agent is not running")
	}
	if err := syscall.Kill(a.process.PID(), signal); err != nil {
		return fmt.Errorf("send %s to %s: %w", signal, a.system.Name(), err)
	}
	return nil
}

// pid returns the process ID, or 0 if the agent must not run.
func (a *agent) pid() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.process == nil {
		return 0
	}
	return a.process.PID()
}

// waitReady waits until /healthz reports that the node is programmed.
func (a *agent) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 10256)
	for {
		err := a.checkHealthy(ctx, at)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w", a.system.Name(), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (a *agent) checkHealthy(ctx context.Context, at netip.AddrPort) error {
	conn, err := a.env.Namespace.Dial(ctx, "tcp", at)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // only the response matters
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	if _, err := fmt.Fprintf(conn, "GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"); err != nil {
		return fmt.Errorf("request /healthz: %w", err)
	}
	var status [32]byte
	n, err := conn.Read(status[:])
	if err != nil {
		return fmt.Errorf("request /healthz: %w", err)
	}
	if line := string(status[:n]); !strings.Contains(line, fmt.Sprint(http.StatusOK)) {
		return fmt.Errorf("/healthz returns %q", line)
	}
	return nil
}
