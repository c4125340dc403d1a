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

// VM runs a comparison in a virtual machine, for systems that this machine's kernel cannot run.
type VM struct {
	// Command is a shell command that runs its arguments in a virtual machine, as `bin/vm run`
	// does.
	Command string
	// Program is `fairlead-bench compare` with arguments that write the result to standard output.
	// Additional flags of Command may precede it.
	Program []string
	// Progress, if not nil, is called with the lines of progress from the virtual machine.
	Progress func(line string)
}

// vmStopTimeout is the time that a virtual machine has to stop.
const vmStopTimeout = 10 * time.Second

// Run blocks until the virtual machine has stopped, which it also does when ctx is done. The
// report contains one environment, named by [result.VMName]. With an error, Run also returns a
// report if the program wrote one.
func (v VM) Run(ctx context.Context) (*result.Report, error) {
	program, _, _ := strings.Cut(v.Command, " ")
	// A name without a slash may be a builtin or function of the shell.
	if _, err := exec.LookPath(program); err != nil && strings.Contains(program, "/") {
		return nil, fmt.Errorf("%s not found: run `make vm` to build it", program)
	}
	// The shell handles quotes in the command.
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", v.Command + ` "$@"`, "sh"}, v.Program...)...) //nolint:gosec // the caller's choice
	// Ctrl-C must reach only this process, which then stops the virtual machine. If this process is
	// killed, the kernel terminates the virtual machine; it does so when the thread that started
	// the command ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = vmStopTimeout
	var mu sync.Mutex
	progress := func(line string) {
		mu.Lock()
		defer mu.Unlock()
		if v.Progress != nil {
			v.Progress(line)
		}
	}
	out, errOut := outputReader{progress: progress}, outputReader{progress: progress}
	var readers sync.WaitGroup
	stdout, outWriter := io.Pipe()
	stderr, errWriter := io.Pipe()
	cmd.Stdout, cmd.Stderr = outWriter, errWriter
	readers.Go(func() { out.read(stdout) })
	readers.Go(func() { errOut.read(stderr) })
	err := cmd.Run()
	err = errors.Join(err, outWriter.Close(), errWriter.Close())
	readers.Wait()
	err = errors.Join(out.err, err)
	switch r := out.report; {
	case r == nil:
	case len(r.Environments) != 1:
		out.report, err = nil, errors.Join(err, errors.New("the result in the virtual machine does not have exactly one environment"))
	default:
		setEnvironment(r, result.VMName(r.Environments[0].Kernel))
	}
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == nil && out.report == nil:
		err = errors.New("the virtual machine returned no result")
	}
	if last := slices.Concat(out.lastLines, errOut.lastLines); err != nil && len(last) > 0 {
		err = fmt.Errorf("%w: %s", err, strings.Join(last, " | "))
	}
	return out.report, err
}

// outputReader reads the output of a comparison in a virtual machine. Standard output and standard
// error share one stream: lines for people, and among them the result as JSON on several lines.
type outputReader struct {
	progress func(line string)

	report    *result.Report
	lastLines []string // the last lines that are not progress
	err       error    // from parsing the result
}

// progressPrefix matches the time in the virtual machine at the start of lines of progress. The
// time is meaningless here.
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

// setEnvironment sets the name of the environment of everything in the report.
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
