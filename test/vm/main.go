// Program vm runs something as root in a virtual machine of its own, with one of
// Debian's kernels: a test binary, the demo, a shell.
//
//	vm run [-kernel=6.12] [flags] PROGRAM [ARGUMENT]...
//	vm shell [-kernel=6.12] [flags] [PROGRAM [ARGUMENT]...]
//	vm fetch
//
// It is made to be used by the go command, which then reports on tests as always
// (`make test-vm` does so):
//
//	CGO_ENABLED=0 go test -count=1 -exec "$PWD/bin/vm run -kernel=6.1" ./nft -run TestX
//
// A PROGRAM with a slash in it is taken into the virtual machine, together with
// the shared libraries that it needs; one without is of the machine's own: those of
// busybox, and ip, nft and others if this machine has them. The checkout is there
// under the same path as here, and so is the working folder; what is written there
// is gone afterwards. Of its .cache only nft releases are there, and other files that -with
// names. Output and errors come back as they are printed, as one, and
// the exit status is PROGRAM's. Standard input is empty. Of the environment there are
// GODEBUG, GOGC, GOMAXPROCS, GOMEMLIMIT, GOTRACEBACK, names that begin with FAIRLEAD_,
// and what -env names.
//
// A shell is for a terminal. With a PROGRAM, which is taken into the virtual machine in
// the same way, the shell runs beside it.
//
// If the kernel panics or has an oops, hangs until the time limit, or does not
// boot, the end of its log is printed and the exit status is 125, as it is for
// everything else that goes wrong outside of PROGRAM. Its warnings are printed and
// change nothing. The time limit is that of
// a test binary's -test.timeout and some, else -limit.
//
// # The virtual machine
//
// The kernels are Debian's linux-image-cloud-amd64, fetched with their signatures
// checked and unpacked into .cache/vm; nothing is installed. QEMU emulates the
// processor, which works everywhere and is 10 to 20 times slower than the machine
// itself; -accel=kvm is much faster where it works. There is one processor, since
// with two Linux 6.12 panicked in QEMU 7.2 now and then, in code that it had just
// patched (a static key); one is also faster, while tests mostly wait. Everything else is in
// memory: the kernel unpacks a cpio archive that is made for each run, of busybox,
// the kernel's modules for networking, the checkout and PROGRAM. There is no disk and
// no network but what tests make.
//
// The clock is the virtual machine's own: a nanosecond passes with each instruction
// that is executed, and while it has nothing to do time leaps to what it waits for.
// So whoever waits for a second in it waits for the same work to be done however slow
// or busy this machine is, which tests with time limits need, and sleeping costs
// nothing. What is measured in it are instructions. -clock=host is for people; the time
// limits of the virtual machine itself are this machine's time.
//
// Modules are loaded on demand, as on a real host: the kernel calls modprobe.
// With -modprobe=false there is no modprobe, as in a container without programs;
// the modules are still in /lib/modules/RELEASE.
//
// # Why there is no library here
//
// github.com/lmb/vimto and github.com/hugelgupf/vmtest do this for kernels built
// for the purpose: they share folders over 9p, and speak over virtio, both of
// which Debian's cloud kernels lack or have as modules. github.com/anatol/vmtest
// starts QEMU and waits for words on its console, which is the smaller part.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// exitFailed is the exit status for everything that goes wrong outside of what
// runs in the virtual machine.
const exitFailed = 125

// The clocks that there are.
const (
	clockOwn  = "own"
	clockHost = "host"
)

// testGrace is what a test binary's time limit is extended by: for the boot, and
// for the binary to notice and tell what hangs. The go command waits a minute.
const testGrace = 55 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// options are what the flags say.
type options struct {
	kernel     string
	accel      string
	clock      string
	cpus       int
	memory     int
	limit      time.Duration
	bootLimit  time.Duration
	kernelArgs string
	log        string
	modprobe   bool
	extraEnv   []string // names
	extraFiles []string // files
	shell      bool
	command    []string // program and arguments; may be none for a shell
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	status, err := execute(ctx, args, stdout, stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return status
	}
	if failed, ok := errors.AsType[*failure](err); ok {
		_, _ = fmt.Fprintf(stderr, "\n--- the end of the kernel's log:\n%s\n---\n", failed.console)
	}
	_, _ = fmt.Fprintf(stderr, "vm: %v\n", err)
	return exitFailed
}

func execute(ctx context.Context, args []string, stdout, stderr io.Writer) (status int, err error) {
	o, err := parseArgs(args, stderr)
	if err != nil {
		return 0, err
	}
	root, err := moduleRoot()
	if err != nil {
		return 0, err
	}
	c := cache{dir: filepath.Join(root, ".cache", "vm")}
	// Both of a link's sides must name the same lock.
	if followed, err := filepath.EvalSymlinks(filepath.Dir(c.dir)); err == nil {
		c.dir = filepath.Join(followed, "vm")
	}
	if args[0] == "fetch" {
		for _, k := range slices.Sorted(maps.Keys(kernels())) {
			if _, _, err := c.kernel(ctx, k); err != nil {
				return 0, err
			}
		}
		_, err := c.busybox(ctx)
		return 0, err
	}
	kernel, modules, err := c.kernel(ctx, o.kernel)
	if err != nil {
		return 0, err
	}
	initrd, err := o.initrd(ctx, c, root, modules)
	if err != nil {
		return 0, fmt.Errorf("make the first file system: %w", err)
	}
	defer initrd.Close() //nolint:errcheck // it has no name; nobody reads it again
	m := &machine{
		Kernel: kernel, Initrd: initrd, Accel: o.accel, OwnClock: o.clock == clockOwn, CPUs: o.cpus, MemoryMiB: o.memory, Append: o.kernelArgs,
		Limit: o.limit, BootLimit: o.bootLimit, Terminal: o.shell, Output: stdout, Errors: stderr,
	}
	if o.log != "" {
		f, err := os.Create(o.log)
		if err != nil {
			return 0, err
		}
		defer f.Close() //nolint:errcheck // what is missing in it is seen
		m.Log = f
	}
	if status, err = m.run(ctx); err != nil {
		return 0, fmt.Errorf("on Linux %s: %w", o.kernel, err)
	}
	return status, nil
}

func parseArgs(args []string, stderr io.Writer) (*options, error) {
	usage := errors.New("usage: vm run [flags] PROGRAM [ARGUMENT]..., vm shell [flags] or vm fetch; vm run -help lists the flags")
	if len(args) == 0 {
		return nil, usage
	}
	o := &options{}
	var names, files string
	known := slices.Sorted(maps.Keys(kernels()))
	flags := flag.NewFlagSet("vm "+args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.kernel, "kernel", "6.12", "one of "+strings.Join(known, ", "))
	flags.StringVar(&o.accel, "accel", "tcg", "tcg emulates the processor; kvm is faster, where it works")
	flags.StringVar(&o.clock, "clock", "", "own counts instructions; host is this machine's (default own, where the processor is emulated and there is one, and no shell)")
	flags.IntVar(&o.cpus, "cpus", 1, "number of processors; emulated, more than one crash Linux 6.12 now and then")
	flags.IntVar(&o.memory, "memory", 3072, "in MiB")
	flags.DurationVar(&o.limit, "limit", 30*time.Minute, "time limit, if PROGRAM has no -test.timeout")
	flags.DurationVar(&o.bootLimit, "boot-limit", 3*time.Minute, "time limit for the boot")
	flags.StringVar(&o.kernelArgs, "append", "", "further `parameters` for the kernel")
	flags.StringVar(&o.log, "log", "", "`file` to write the kernel's log into")
	flags.BoolVar(&o.modprobe, "modprobe", true, "whether there is a modprobe, which loads modules on demand")
	flags.StringVar(&names, "env", "", "further `names` of environment variables to pass on, separated by commas")
	flags.StringVar(&files, "with", "", "further `files` to take along, to the same paths, separated by commas")
	if err := flags.Parse(args[1:]); err != nil {
		return nil, err
	}
	if !slices.Contains(known, o.kernel) {
		return nil, fmt.Errorf("-kernel=%s: want one of %s", o.kernel, strings.Join(known, ", "))
	}
	if o.accel != "tcg" && o.accel != "kvm" {
		return nil, fmt.Errorf("-accel=%s: want tcg or kvm", o.accel)
	}
	switch {
	case o.clock == "" && o.accel == "tcg" && o.cpus == 1 && args[0] == "run":
		o.clock = clockOwn
	case o.clock == "":
		o.clock = clockHost
	case o.clock != clockOwn && o.clock != clockHost:
		return nil, fmt.Errorf("-clock=%s: want %s or %s", o.clock, clockOwn, clockHost)
	case o.clock == clockOwn && (o.accel != "tcg" || o.cpus != 1):
		return nil, errors.New("-clock=own: want -accel=tcg -cpus=1, as only one emulated processor has its own")
	}
	if names != "" {
		o.extraEnv = strings.Split(names, ",")
	}
	if files != "" {
		o.extraFiles = strings.Split(files, ",")
	}
	switch args[0] {
	case "run":
		if flags.NArg() == 0 {
			return nil, usage
		}
		o.command = flags.Args()
	case "shell":
		o.limit = 365 * 24 * time.Hour
		o.shell = true
		o.command = flags.Args()
	case "fetch":
	default:
		return nil, usage
	}
	for _, a := range o.command {
		name, value, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(a, "-"), "-"), "=")
		switch name {
		case "test.timeout":
			if limit, err := time.ParseDuration(value); err == nil && limit > 0 {
				o.limit = limit + testGrace
			}
		case "test.coverprofile", "test.cpuprofile", "test.memprofile", "test.blockprofile", "test.mutexprofile", "test.trace":
			return nil, fmt.Errorf("-%s: files do not come back from the virtual machine", name)
		}
	}
	return o, nil
}

// moduleRoot returns the root of the module that the working folder is in.
func moduleRoot() (string, error) {
	at, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := at; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is not in a checkout: no go.mod", at)
		}
	}
}

// initrd makes what the kernel unpacks, as a file without a name.
func (o *options) initrd(ctx context.Context, c cache, root, modules string) (*os.File, error) {
	busybox, err := c.busybox(ctx)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(c.dir, "initrd-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := o.writeInitrd(ctx, f, busybox, root, modules); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (o *options) writeInitrd(ctx context.Context, f *os.File, busybox, root, modules string) error {
	a := newArchive(f)
	if err := addBase(ctx, a, busybox); err != nil {
		return err
	}
	if err := addCheckout(a, root); err != nil {
		return err
	}
	for _, file := range o.extraFiles {
		at, err := filepath.Abs(file)
		if err != nil {
			return err
		}
		if err := addProgram(ctx, a, at, at); err != nil {
			return fmt.Errorf("-with=%s: %w", file, err)
		}
	}
	command := slices.Clone(o.command)
	if len(command) > 0 && strings.Contains(command[0], "/") {
		inside := "/vm/" + filepath.Base(command[0])
		if err := addProgram(ctx, a, inside, command[0]); err != nil {
			return err
		}
		command[0] = inside
	}
	if o.shell {
		rows, columns := terminalSize(ctx)
		command = shellCommand(rows, columns, command)
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	if err := errors.Join(
		a.addDir(dir),
		a.addText("/vm/run", 0o644, runScript(dir, o.environment(os.Environ()), command)),
		a.addText("/vm/settings", 0o644, o.initSettings()),
		a.close(),
	); err != nil {
		return err
	}
	return appendFile(f, modules)
}

// environment returns those of the variables that are passed on.
func (o *options) environment(all []string) []string {
	names := append([]string{"GODEBUG", "GOGC", "GOMAXPROCS", "GOMEMLIMIT", "GOTRACEBACK"}, o.extraEnv...)
	env := []string{"HOME=/root", "USER=root", "LANG=C.UTF-8", "PATH=/usr/bin:/usr/sbin"}
	for _, e := range all {
		name, _, _ := strings.Cut(e, "=")
		if slices.Contains(names, name) || strings.HasPrefix(name, "FAIRLEAD_") {
			env = append(env, e)
		}
	}
	return env
}

// shellCommand returns the command of a shell for people, in a terminal of that size, beside
// which another command runs, if there is one.
func shellCommand(rows, columns string, command []string) []string {
	const start = `stty rows "$1" columns "$2"
		echo "Linux $(uname -r); exit or Ctrl-D ends it, Ctrl-A X at once"
		shift 2
		[ $# -eq 0 ] || "$@" &
		exec env PS1='\h:\w\$ ' bash --norc -i`
	return append([]string{"sh", "-c", start, "sh", rows, columns}, command...)
}

// runScript returns what the virtual machine's shell runs.
func runScript(dir string, env, command []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "cd %s || exit\n", shellQuote(dir))
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		fmt.Fprintf(&b, "export %s=%s\n", name, shellQuote(value))
	}
	b.WriteString("exec")
	for _, c := range command {
		b.WriteString(" " + shellQuote(c))
	}
	b.WriteString("\n")
	return b.String()
}

// shellQuote makes s one word of the shell.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// initSettings returns what init.sh reads.
func (o *options) initSettings() string {
	yes := map[bool]string{true: "yes", false: "no"}
	return fmt.Sprintf("TERMINAL=%s\nMODPROBE=%s\n", yes[o.shell], yes[o.modprobe])
}

// terminalSize returns the height and width of this process's terminal.
func terminalSize(ctx context.Context) (rows, columns string) {
	size := exec.CommandContext(ctx, "stty", "size")
	size.Stdin = os.Stdin
	if out, err := size.Output(); err == nil {
		if rows, columns, ok := strings.Cut(strings.TrimSpace(string(out)), " "); ok {
			return rows, columns
		}
	}
	return "24", "80"
}
