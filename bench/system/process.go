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

// stopTimeout is how long a process may take to end when it is asked to.
const stopTimeout = 10 * time.Second

// Process is a [Instance] program in a namespace of its own choice.
type Process struct {
	cmd     *exec.Cmd
	logPath string

	stopOnce sync.Once
	done     chan struct{} // closed when it has ended
	err      error         // how it has ended, when done is closed
}

// StartProcess starts a program in the Namespace of env. What it prints goes to
// NAME.log in Dir.
func StartProcess(env Environment, name string, command ...string) (*Process, error) {
	log, err := os.OpenFile(filepath.Join(env.Dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close() //nolint:errcheck // the process has its own
	// Not by a context: it is stopped with Stop, which lets it end by itself.
	cmd := exec.Command(command[0], command[1:]...) //nolint:noctx // see above
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the benchmark, which then stops it
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

// Done returns a channel that is closed when the process has ended, by itself or
// not.
func (p *Process) Done() <-chan struct{} { return p.done }

// Stop implements [Instance]: it sends SIGTERM, and SIGKILL to what is left after
// some seconds. That the process ended by itself before is an error.
func (p *Process) Stop() error {
	var err error
	p.stopOnce.Do(func() {
		select {
		case <-p.done:
			err = fmt.Errorf("process %d of %s ended by itself, see %s: %w", p.PID(), p.cmd.Path, p.logPath, p.err)
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

// signal signals the process and its children.
func (p *Process) signal(s syscall.Signal) error {
	if err := syscall.Kill(-p.PID(), s); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("send %s to process %d: %w", s, p.PID(), err)
	}
	return nil
}
