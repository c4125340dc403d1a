package system

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// stopTimeout is the time that a process has to end after SIGTERM.
const stopTimeout = 10 * time.Second

// Process is a program that runs in a network namespace. It implements [Instance].
type Process struct {
	cmd     *exec.Cmd
	logPath string

	stopOnce sync.Once
	done     chan struct{} // closed when the process has ended
	err      error         // the result of Wait; valid when done is closed
}

// StartProcess starts a program in the Namespace of env. The program's output goes to NAME.log in
// Dir.
func StartProcess(env Environment, name string, command ...string) (*Process, error) {
	log, err := os.OpenFile(filepath.Join(env.Dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close() //nolint:errcheck // the process has its own file descriptor
	// Do not use a context, which would kill the process: Stop lets it shut down gracefully.
	cmd := exec.Command(command[0], command[1:]...) //nolint:noctx // see above
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C goes to the benchmark only, which then stops the process
	if err := env.Namespace.Do(cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &Process{cmd: cmd, logPath: log.Name(), done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID implements [Instance].
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done returns a channel that is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Stop implements [Instance]. It sends SIGTERM, and SIGKILL if the process does not end within 10
// seconds. It returns an error if the process had ended before Stop.
func (p *Process) Stop() error {
	var err error
	p.stopOnce.Do(func() {
		select {
		case <-p.done:
			err = fmt.Errorf("process %d of %s ended unexpectedly, see %s: %w", p.PID(), p.cmd.Path, p.logPath, p.err)
			return
		default:
		}
		err = p.signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(stopTimeout):
			err = errors.Join(err, p.signal(syscall.SIGKILL))
			<-p.done
		}
	})
	return err
}

// signal sends a signal to the process and its children.
func (p *Process) signal(s syscall.Signal) error {
	if err := syscall.Kill(-p.PID(), s); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("send %s to process %d: %w", s, p.PID(), err)
	}
	return nil
}
