package compare

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"fairlead.io/fairlead/bench/result"
)

// VM is a comparison in a virtual machine, for what this machine's kernel cannot run.
type VM struct {
	// Command runs what stands behind it in a virtual machine, as `bin/vm run` does. It
	// is the shell's.
	Command string
	// Program is `fairlead-bench compare` with its arguments, which say that the result
	// goes to standard output. Before it may be further flags of Command.
	Program []string
	// Progress is told what the program tells of what happens. It may be nil.
	Progress func(line string)
}

// vmStopTimeout is how long a virtual machine may take to end.
const vmStopTimeout = 10 * time.Second

// Run blocks until the virtual machine has ended, which it also does when ctx is done. Its
// environment is called as [result.VMName] says, and is the only one in the report. With an
// error there is a report too if something was measured.
func (v VM) Run(ctx context.Context) (*result.Report, error) {
	program, _, _ := strings.Cut(v.Command, " ")
	// A name without a slash may be the shell's own.
	if _, err := exec.LookPath(program); err != nil && strings.Contains(program, "/") {
		return nil, fmt.Errorf("there is no %s: `make vm` builds it", program)
	}
	// By the shell, as it knows about quotes.
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", v.Command + ` "$@"`, "sh"}, v.Program...)...) //nolint:gosec // the caller's choice
	// Ctrl-C is for this process, which then ends the virtual machine. That goes too if this
	// process is killed; the kernel goes by the thread that started it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = vmStopTimeout
	var telling sync.Mutex
	tell := func(line string) {
		telling.Lock()
		defer telling.Unlock()
		if v.Progress != nil {
			v.Progress(line)
		}
	}
	out, complaints := outputReader{progress: tell}, outputReader{progress: tell}
	var readers sync.WaitGroup
	stdout, outWriter := io.Pipe()
	stderr, errWriter := io.Pipe()
	cmd.Stdout, cmd.Stderr = outWriter, errWriter
	readers.Go(func() { out.read(stdout) })
	readers.Go(func() { complaints.read(stderr) })
	err := cmd.Run()
	err = errors.Join(err, outWriter.Close(), errWriter.Close())
	readers.Wait()
	err = errors.Join(out.err, err)
	switch r := out.report; {
	case r == nil:
	case len(r.Environments) != 1:
		out.report, err = nil, errors.Join(err, errors.New("its result does not say where it is from"))
	default:
		setEnvironment(r, result.VMName(r.Environments[0].Kernel))
	}
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == nil && out.report == nil:
		err = errors.New("it has told no result")
	}
	if last := slices.Concat(out.lastLines, complaints.lastLines); err != nil && len(last) > 0 {
		err = fmt.Errorf("%w: %s", err, strings.Join(last, " | "))
	}
	return out.report, err
}

// outputReader reads what a comparison in a virtual machine prints. Its standard output
// and errors are one: lines for people, among them the result, which is JSON over
// several lines.
type outputReader struct {
	progress func(line string)

	report    *result.Report
	lastLines []string // the last lines that were no progress
	err       error    // about the result
}

// progressPrefix is how lines of progress begin: with the virtual machine's time, which
// means nothing here.
var progressPrefix = regexp.MustCompile(`^ *[0-9.]+s `)

func (l *outputReader) read(from io.Reader) {
	const kept = 3
	var document *strings.Builder
	lines := bufio.NewReader(from)
	for {
		line, err := lines.ReadString('\n')
		text := strings.TrimRight(line, "\r\n")
		switch {
		case document != nil:
			document.WriteString(line)
			if text == "}" {
				l.report, l.err = result.Read(strings.NewReader(document.String()))
				document = nil
			}
		case text == "{":
			document = &strings.Builder{}
			document.WriteString(line)
		case strings.TrimSpace(text) == "":
		case progressPrefix.MatchString(text):
			l.progress(progressPrefix.ReplaceAllString(text, ""))
		default:
			l.progress(text)
			l.lastLines = append(l.lastLines, text)
			l.lastLines = l.lastLines[max(0, len(l.lastLines)-kept):]
		}
		if err != nil {
			return
		}
	}
}

// setEnvironment calls all that was measured measured in that environment.
func setEnvironment(r *result.Report, environment string) {
	for i := range r.Environments {
		r.Environments[i].Name = environment
	}
	for i := range r.Measurements {
		r.Measurements[i].Environment = environment
	}
	for i := range r.Ratios {
		r.Ratios[i].Environment = environment
	}
	for i := range r.LeftOut {
		r.LeftOut[i].Environment = environment
	}
}
