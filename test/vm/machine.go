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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// machine is a virtual machine that runs one thing and is gone.
type machine struct {
	Kernel    string   // path of the kernel's image
	Initrd    *os.File // what the kernel unpacks; it may have no name any more
	Accel     string   // tcg or kvm
	OwnClock  bool     // its time follows what it executes; for tcg and one processor
	CPUs      int
	MemoryMiB int
	Append    string // further parameters for the kernel

	Limit     time.Duration // for all of it
	BootLimit time.Duration // until the first process says that it runs

	Terminal bool      // the machine's terminal is this process's
	Output   io.Writer // what the thing in it prints, if it has no terminal
	Errors   io.Writer // what QEMU prints, and what the kernel complains of
	Log      io.Writer // the kernel's log
}

// Why a machine was ended from outside.
var (
	errTimeLimit = errors.New("the time limit passed")
	errBootLimit = errors.New("it did not boot in time")
	errPanic     = errors.New("the kernel panicked")
)

// failure says that the machine ended without the exit status of what ran in it.
type failure struct {
	err     error
	console string // the end of the kernel's log
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// arguments are QEMU's. Pipes and the initrd come as file descriptors.
func (m *machine) arguments() []string {
	// QEMU 7.2 spoils the flags register now and then when it emulates
	// cmpxchg16b: one boot in six of Linux 6.12 ended in a double fault or the
	// like. Without that instruction Linux takes a lock instead.
	cpu := "max,cx16=off"
	accel := "tcg"
	if m.Accel == "kvm" {
		cpu, accel = "host", "kvm"
	}
	output := "file,id=output,path=/dev/fd/6"
	if m.Terminal {
		output = "stdio,id=output,mux=on,signal=off"
	}
	// oops=panic and panic=-1 make a kernel that is no longer well reboot at
	// once, and -no-reboot makes that the end. mitigations=off saves time, which
	// emulation has little of; no stranger's code runs here.
	// fairlead.vm is for programs that may do only here what they do, as to set
	// the clock. The kernel ignores it.
	kernel := "fairlead.vm=1 console=ttyS0 oops=panic panic=-1 random.trust_cpu=on mitigations=off nowatchdog"
	if m.Append != "" {
		kernel += " " + m.Append
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "pc", "-accel", accel, "-cpu", cpu,
		"-smp", strconv.Itoa(m.CPUs), "-m", strconv.Itoa(m.MemoryMiB),
		"-kernel", m.Kernel, "-initrd", "/dev/fd/3", "-append", kernel,
		// Serial ports, as their driver is part of Debian's kernels; that of
		// virtio consoles is a module, and tests may load modules themselves.
		"-chardev", "file,id=console,path=/dev/fd/4", "-serial", "chardev:console",
		"-chardev", output, "-serial", "chardev:output",
		"-chardev", "file,id=status,path=/dev/fd/5", "-serial", "chardev:status",
	}
	if m.OwnClock {
		// A nanosecond for each instruction, and none while nothing is to be done.
		args = append(args, "-icount", "shift=0,sleep=off")
	}
	if m.Terminal {
		args = append(args, "-mon", "chardev=output") // for Ctrl-A X
	}
	return args
}

// run boots the machine and returns the exit status of what ran in it. The error
// is a *failure if it ended otherwise, unless ctx was the reason: with it, the
// machine ends, too.
func (m *machine) run(ctx context.Context) (status int, err error) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return 0, fmt.Errorf("%w: install qemu-system-x86 (make deps)", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, qemu, m.arguments()...)
	cmd.Stderr = m.Errors
	if m.Terminal {
		// So that QEMU leaves the terminal as it was.
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	}
	cmd.WaitDelay = 10 * time.Second
	// QEMU goes when this process does, however it ends. The kernel goes by the
	// thread that started it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if m.Terminal {
		cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
	} else {
		// A terminal's interrupts are for this process, which ends QEMU.
		cmd.SysProcAttr.Setpgid = true
	}

	var readers sync.WaitGroup
	console := kernelLog{tee: m.Log}
	guest := statusReader{booted: make(chan struct{})}
	cmd.ExtraFiles = []*os.File{m.Initrd}
	reads := []func(io.Reader){console.read, guest.read}
	if !m.Terminal {
		reads = append(reads, func(r io.Reader) { io.Copy(m.Output, r) }) //nolint:errcheck // who reads our output no more has no use for errors
	}
	for _, read := range reads {
		r, w, err := os.Pipe()
		if err != nil {
			return 0, err
		}
		defer w.Close() //nolint:errcheck // closed below unless there is another error
		cmd.ExtraFiles = append(cmd.ExtraFiles, w)
		readers.Go(func() {
			defer r.Close() //nolint:errcheck // only read from
			read(r)
		})
	}
	console.onPanic = func() {
		// It reboots by itself, if it still can.
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
		w.Close() //nolint:errcheck // QEMU has its own
	}
	err = cmd.Wait()
	readers.Wait()
	if guest.status != nil {
		for _, c := range console.warnings {
			_, _ = fmt.Fprintf(m.Errors, "vm: the kernel complained: %s\n", c)
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
		err = fmt.Errorf("QEMU ended: %w", err)
	default:
		err = errors.New("it went down without an exit status")
	}
	return 0, &failure{err: err, console: console.tail()}
}

// statusReader reads what the machine's first process says.
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

// kernelLog is the end of the kernel's log. Its fields may be read when read has
// returned.
type kernelLog struct {
	tee     io.Writer // gets all of it; may be nil
	onPanic func()    // called once, while it is read

	lines    []string
	sawPanic bool
	warnings []string // lines that tell of something wrong, the first few
}

const (
	maxLogLines   = 2000 // lines
	shownLogLines = 60   // of them, for a failure
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
