package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// machine is a virtual machine that runs one command.
type machine struct {
	Platform  platform
	Kernel    string   // path of the kernel image
	Initrd    *os.File // initial file system; the file may have no name
	Accel     string   // tcg or kvm
	OwnClock  bool     // time depends on executed instructions; needs tcg and one processor
	CPUs      int
	MemoryMiB int
	Append    string // additional kernel parameters

	Limit     time.Duration // for the whole run
	BootLimit time.Duration // until init reports that it runs

	Terminal bool      // connect the command to this process's terminal
	Output   io.Writer // output of the command, without a terminal
	Errors   io.Writer // output of QEMU, and kernel warnings
	Log      io.Writer // kernel log
}

// Reasons to end a machine early.
var (
	errTimeLimit = errors.New("time limit exceeded")
	errBootLimit = errors.New("boot time limit exceeded")
	errPanic     = errors.New("kernel panic")
)

// failure reports that the machine ended without an exit status of its command.
type failure struct {
	err     error
	console string // end of the kernel log
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// arguments returns the arguments of QEMU. It passes pipes and the initrd as file
// descriptors.
func (m *machine) arguments() []string {
	cpu, accel := m.Platform.cpu, "tcg"
	if m.Accel == "kvm" {
		cpu, accel = "host", "kvm"
	}
	output := "file,id=output,path=/dev/fd/6"
	if m.Terminal {
		output = "stdio,id=output,mux=on,signal=off"
	}
	// oops=panic and panic=-1 make the kernel reboot immediately after an oops or a panic, and
	// -no-reboot turns that into an exit. mitigations=off saves time under emulation; only
	// trusted code runs here. The kernel ignores fairlead.vm. It marks the machine for programs
	// that do things such as setting the clock only here.
	kernel := strings.Join(slices.DeleteFunc([]string{
		"fairlead.vm=1", "console=" + m.Platform.console, "oops=panic", "panic=-1", "mitigations=off", "nowatchdog", m.Platform.parameter, m.Append,
	}, func(s string) bool { return s == "" }), " ")
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", m.Platform.machine, "-accel", accel, "-cpu", cpu,
		"-smp", strconv.Itoa(m.CPUs), "-m", strconv.Itoa(m.MemoryMiB),
		"-kernel", m.Kernel, "-initrd", "/dev/fd/3", "-append", kernel,
		"-chardev", "file,id=console,path=/dev/fd/4",
		"-chardev", output,
		"-chardev", "file,id=status,path=/dev/fd/5",
	}
	args = append(args, m.Platform.devices...)
	if m.OwnClock {
		// One nanosecond per instruction; idle time is skipped.
		args = append(args, "-icount", "shift=0,sleep=off")
	}
	if m.Terminal {
		args = append(args, "-mon", "chardev=output") // for Ctrl-A X
	}
	return args
}

// run boots the machine and returns the exit status of its command. If the machine ends
// otherwise, the error is a *failure, except when ctx is done, which also ends the machine.
func (m *machine) run(ctx context.Context) (status int, err error) {
	qemu, err := exec.LookPath(m.Platform.qemu)
	if err != nil {
		return 0, fmt.Errorf("%w: install QEMU for %s (make deps)", err, m.Platform.debian)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, qemu, m.arguments()...)
	cmd.Stderr = m.Errors
	if m.Terminal {
		// SIGTERM lets QEMU restore the terminal.
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	}
	cmd.WaitDelay = 10 * time.Second
	// The kernel kills QEMU when the thread that started it ends, and so when this process
	// ends for any reason.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if m.Terminal {
		cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
	} else {
		// Ctrl-C interrupts only this process, which then ends QEMU.
		cmd.SysProcAttr.Setpgid = true
	}

	var readers sync.WaitGroup
	console := kernelLog{tee: m.Log}
	guest := statusReader{booted: make(chan struct{})}
	cmd.ExtraFiles = []*os.File{m.Initrd}
	reads := []func(io.Reader){console.read, guest.read}
	if !m.Terminal {
		reads = append(reads, func(r io.Reader) { io.Copy(m.Output, r) }) //nolint:errcheck // fails only if the reader of the output is gone
	}
	for _, read := range reads {
		r, w, err := os.Pipe()
		if err != nil {
			return 0, err
		}
		defer w.Close() //nolint:errcheck // closed below, except after an error
		cmd.ExtraFiles = append(cmd.ExtraFiles, w)
		readers.Go(func() {
			defer r.Close() //nolint:errcheck // read-only
			read(r)
		})
	}
	console.onPanic = func() {
		// Usually the kernel reboots before this.
		time.AfterFunc(5*time.Second, func() { cancel(errPanic) })
	}
	limit := time.AfterFunc(m.Limit, func() { cancel(errTimeLimit) })
	defer limit.Stop()
	boot := time.AfterFunc(m.BootLimit, func() { cancel(errBootLimit) })
	defer boot.Stop()
	go func() {
		select {
		case <-guest.booted:
			boot.Stop()
		case <-ctx.Done():
		}
	}()

	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start QEMU: %w", err)
	}
	for _, w := range cmd.ExtraFiles[1:] {
		w.Close() //nolint:errcheck // QEMU has inherited it
	}
	err = cmd.Wait()
	readers.Wait()
	if guest.status != nil {
		for _, c := range console.warnings {
			_, _ = fmt.Fprintf(m.Errors, "vm: kernel warning: %s\n", c)
		}
		return *guest.status, nil
	}
	switch cause := context.Cause(ctx); {
	case console.sawPanic:
		err = errPanic
	case errors.Is(cause, errTimeLimit) || errors.Is(cause, errBootLimit):
		err = cause
	case cause != nil:
		return 0, cause
	case err != nil:
		err = fmt.Errorf("QEMU exited: %w", err)
	default:
		err = errors.New("powered off without an exit status")
	}
	return 0, &failure{err: err, console: console.tail()}
}

// statusReader reads the messages of the init script.
type statusReader struct {
	booted chan struct{}
	status *int
}

func (w *statusReader) read(r io.Reader) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		word, rest, _ := strings.Cut(strings.TrimSpace(lines.Text()), " ")
		switch word {
		case "started":
			close(w.booted)
		case "exit":
			if status, err := strconv.Atoi(rest); err == nil {
				w.status = &status
			}
		}
	}
}

// kernelLog keeps the end of the kernel log. Its fields may be read after read has returned.
type kernelLog struct {
	tee     io.Writer // receives the whole log; may be nil
	onPanic func()    // called once, by read

	lines    []string
	sawPanic bool
	warnings []string // the first lines that report a problem
}

const (
	maxLogLines   = 2000 // lines to keep
	shownLogLines = 60   // lines to show after a failure
	maxWarnings   = 10
)

func (l *kernelLog) read(r io.Reader) {
	if l.tee != nil {
		r = io.TeeReader(r, l.tee)
	}
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			l.add(strings.TrimRight(line, "\r\n"))
		}
		if err != nil {
			return
		}
	}
}

func (l *kernelLog) add(line string) {
	l.lines = append(l.lines, line)
	if len(l.lines) > maxLogLines {
		l.lines = append(l.lines[:0], l.lines[maxLogLines/2:]...)
	}
	if !l.sawPanic && strings.Contains(line, "Kernel panic - not syncing") {
		l.sawPanic = true
		l.onPanic()
	}
	for _, sign := range []string{"WARNING: ", "BUG: ", "INFO: task ", "rcu: INFO: ", "Out of memory: "} {
		if strings.Contains(line, sign) && len(l.warnings) < maxWarnings {
			l.warnings = append(l.warnings, line)
			break
		}
	}
}

func (l *kernelLog) tail() string {
	return strings.Join(l.lines[max(0, len(l.lines)-shownLogLines):], "\n")
}
