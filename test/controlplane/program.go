package controlplane

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// runner starts programs on one thread. The thread is in the network namespace that the
// programs inherit, and lives until close. The kernel kills a program when the thread that
// started it ends (see Pdeathsig in syscall.SysProcAttr), and therefore also when the process
// ends.
type runner struct {
	dir  string
	jobs chan func()
}

func newRunner(ns Namespace, dir string) (*runner, error) {
	r := &runner{dir: dir, jobs: make(chan func())}
	entered := make(chan error)
	go func() {
		// The thread stays locked, so it ends with the goroutine.
		runtime.LockOSThread()
		if ns != nil {
			if err := unix.Setns(ns.Fd(), unix.CLONE_NEWNET); err != nil {
				entered <- fmt.Errorf("enter the network namespace: %w", err)
				return
			}
		}
		close(entered)
		for job := range r.jobs {
			job()
		}
	}()
	if err := <-entered; err != nil {
		return nil, err
	}
	return r, nil
}

// do runs fn on the runner's thread.
func (r *runner) do(fn func() error) error {
	done := make(chan error, 1)
	r.jobs <- func() { done <- fn() }
	return <-done
}

func (r *runner) close() { close(r.jobs) }

// program is a running program.
type program struct {
	name    string
	logFile string // path
	cmd     *exec.Cmd

	stopping atomic.Bool
	done     chan struct{} // closed after the program has exited
	err      error         // result of Wait; valid after done is closed
}

// start starts a program in the runner's directory. Its output is appended to its log.
func (r *runner) start(name, path string, args []string) (*program, error) {
	p := &program{name: name, logFile: filepath.Join(r.dir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()                   //nolint:errcheck // the program has its own descriptor
	p.cmd = exec.Command(path, args...) //nolint:noctx // it runs until stop
	p.cmd.Dir = r.dir
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// Settings in the environment of the test, such as a proxy, must not apply.
	p.cmd.Env = []string{"HOME=" + r.dir, "TMPDIR=" + r.dir, "PATH=/nonexistent"}
	// A separate process group: Ctrl-C reaches only the test, which then closes the control
	// plane.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := r.do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// stop kills the program and waits until it has exited. An orderly shutdown is not necessary.
func (p *program) stop() error {
	p.stopping.Store(true)
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	<-p.done
	return nil
}

// exitError describes the unexpected exit of a program.
func (p *program) exitError() error {
	return fmt.Errorf("%s exited: %w\n%s", p.name, errors.Join(p.err, errExited), p.logTail())
}

var errExited = errors.New("unexpected exit")

// logTail returns the last lines of the program's log.
func (p *program) logTail() string {
	const lines = 30
	data, err := os.ReadFile(p.logFile)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func randomPort() uint16 {
	const first, end = 10_000, 30_000 // see net.ipv4.ip_local_port_range
	return uint16(first + rand.IntN(end-first))
}

const tempDirPrefix = "fairlead-controlplane-"

// tempDir is a locked temporary directory. The kernel releases the lock when the process
// exits.
type tempDir struct {
	path string
	lock *os.File
}

// newTempDir creates a directory and removes the directories of killed processes.
func newTempDir() (*tempDir, error) {
	if err := removeStaleDirs(); err != nil {
		return nil, err
	}
	const tries = 10
	for range tries {
		path, err := os.MkdirTemp("", tempDirPrefix)
		if err != nil {
			return nil, fmt.Errorf("create a temporary directory: %w", err)
		}
		lock, err := lockDir(path)
		if err == nil {
			return &tempDir{path: path, lock: lock}, nil
		}
		// Before the lock was set, another process removed the directory as stale.
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return nil, errors.New("create a temporary directory: another process removed it each time")
}

// lockDir locks a directory, or fails immediately.
func lockDir(path string) (*os.File, error) {
	dir, err := os.Open(path) //nolint:gosec // our own directory
	if err != nil {
		return nil, fmt.Errorf("lock a temporary directory: %w", err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), dir.Close())
	}
	if _, err := os.Stat(path); err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return dir, nil
}

func removeStaleDirs() error {
	stale, err := filepath.Glob(filepath.Join(os.TempDir(), tempDirPrefix+"*"))
	if err != nil {
		return fmt.Errorf("find stale directories: %w", err)
	}
	for _, path := range stale {
		lock, err := lockDir(path)
		if err != nil {
			continue // in use, already removed, or owned by another user
		}
		err = errors.Join(os.RemoveAll(path), lock.Close())
		if err != nil {
			return fmt.Errorf("remove a stale directory: %w", err)
		}
	}
	return nil
}

func (d *tempDir) remove() error {
	return errors.Join(os.RemoveAll(d.path), d.lock.Close())
}
