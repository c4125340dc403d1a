// Program vm runs a command as root in a virtual machine with one of Debian's kernels: a test
// binary, the demo or a shell.
//
//	vm run [-arch=amd64] [-kernel=6.12] [flags] PROGRAM [ARGUMENT]...
//	vm shell [-arch=amd64] [-kernel=6.12] [flags] [PROGRAM [ARGUMENT]...]
//	vm fetch [-arch=amd64]
//
// It is designed for the go command, which then reports test results as usual (see `make
// test-vm`):
//
//	CGO_ENABLED=0 go test -count=1 -exec "$PWD/bin/vm run -kernel=6.1" ./nft -run TestX
//
// If PROGRAM contains a slash, vm copies it into the virtual machine together with its shared
// libraries. Otherwise PROGRAM is a command of busybox or one of the programs that vm copies
// from this machine if they are installed, such as ip and nft. The checkout and the working
// directory have the same paths as on this machine. Changes to them are lost at the end. Of
// .cache, the virtual machine contains only the nft releases, and the files that -with names.
// Standard output and standard error are merged and printed immediately. The exit status is
// the status of PROGRAM. Standard input is empty. vm passes the environment variables
// GODEBUG, GOGC, GOMAXPROCS, GOMEMLIMIT, GOTRACEBACK, variables that begin with FAIRLEAD_,
// and the variables that -env names.
//
// If -arch is not the architecture of this machine, PROGRAM must be static, and the only programs
// in the virtual machine are busybox and nft.
//
// A shell needs a terminal. With a PROGRAM, the program runs in the background of the shell.
//
// If the kernel panics or has an oops, runs into the time limit, or does not boot, vm prints
// the end of the kernel log and exits with status 125. Status 125 also reports all other
// failures outside of PROGRAM. vm prints kernel warnings without changing the status. The
// time limit is slightly more than a test binary's -test.timeout, or -limit for other
// programs.
//
// # The virtual machine
//
// The kernels are Debian's, on amd64 and arm64 those for cloud machines. apt downloads them and checks their
// signatures; vm unpacks them into .cache/vm and installs nothing. QEMU emulates the
// processor, which works everywhere but is 10 to 20 times slower than this machine.
// -accel=kvm is much faster where it is available. There is one processor: with two, Linux
// 6.12 sometimes panicked in QEMU 7.2, in code that it had just patched (a static key). One
// processor is also faster, because tests mostly wait. Everything else is in memory: the
// kernel unpacks a cpio archive that vm creates for each run, with busybox, the kernel
// modules for networking, the checkout and PROGRAM. There is no disk, and no network except
// the networks that tests create.
//
// The virtual machine has its own clock. It advances by one nanosecond per executed
// instruction, and skips idle time. A wait of one second therefore covers the same amount of
// work, however slow or busy this machine is, as tests with time limits need, and sleeping
// costs nothing. Measured times are numbers of instructions. -clock=host is for interactive
// use. The time limits of the virtual machine itself use the time of this machine.
//
// The kernel loads modules on demand with modprobe, as on a real host. With -modprobe=false
// there is no modprobe, as in a container without programs; the modules are still in
// /lib/modules/RELEASE.
//
// # Why vm does not use a library
//
// github.com/lmb/vimto and github.com/hugelgupf/vmtest need custom kernels: they share
// directories over 9p and communicate over virtio. Debian's cloud kernels lack these drivers
// or have them as modules. github.com/anatol/vmtest starts QEMU and waits for words on its
// console, which is the smaller part of the task.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// exitFailed is the exit status for all failures outside of PROGRAM.
const exitFailed = 125

// Values of -clock.
const (
	clockOwn  = "own"
	clockHost = "host"
)

// testGrace extends a test binary's time limit: for the boot, and for the binary to report
// which test hangs. The go command waits for one minute.
const testGrace = 55 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// options holds the values of the flags and the command.
type options struct {
	arch       string
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
	command    []string // program and arguments; optional for a shell
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	status, err := execute(ctx, args, stdout, stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return status
	}
	if failed, ok := errors.AsType[*failure](err); ok {
		_, _ = fmt.Fprintf(stderr, "\n--- end of the kernel log:\n%s\n---\n", failed.console)
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
	p := platforms()[o.arch]
	c := cache{dir: filepath.Join(root, ".cache", "vm"), platform: p}
	// All checkouts that share the cache must use the same lock.
	if target, err := filepath.EvalSymlinks(filepath.Dir(c.dir)); err == nil {
		c.dir = filepath.Join(target, "vm")
	}
	if args[0] == "fetch" {
		for _, k := range p.versions() {
			if _, _, err := c.kernel(ctx, k); err != nil {
				return 0, err
			}
		}
		if _, err := c.busybox(ctx); err != nil || !foreign(o.arch) {
			return 0, err
		}
		_, err := c.programs(ctx)
		return 0, err
	}
	kernel, modules, err := c.kernel(ctx, o.kernel)
	if err != nil {
		return 0, err
	}
	initrd, err := o.initrd(ctx, c, root, modules)
	if err != nil {
		return 0, fmt.Errorf("create the initial file system: %w", err)
	}
	defer initrd.Close() //nolint:errcheck // it has no name
	m := &machine{
		Platform: p,
		Kernel:   kernel, Initrd: initrd, Accel: o.accel, OwnClock: o.clock == clockOwn, CPUs: o.cpus, MemoryMiB: o.memory, Append: o.kernelArgs,
		Limit: o.limit, BootLimit: o.bootLimit, Terminal: o.shell, Output: stdout, Errors: stderr,
	}
	if o.log != "" {
		f, err := os.Create(o.log)
		if err != nil {
			return 0, err
		}
		defer f.Close() //nolint:errcheck // a missing part is obvious to the reader
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
	flags := flag.NewFlagSet("vm "+args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.arch, "arch", "amd64", "architecture to emulate: "+strings.Join(architectures(), ", "))
	flags.StringVar(&o.kernel, "kernel", "", "kernel version: 6.1 or 6.12, whose support depends on -arch (default the newest)")
	flags.StringVar(&o.accel, "accel", "tcg", "QEMU accelerator: tcg emulates the processor; kvm is faster where it is available")
	flags.StringVar(&o.clock, "clock", "", "clock: own counts instructions, host uses this machine's (default own for vm run with one emulated processor, otherwise host)")
	flags.IntVar(&o.cpus, "cpus", 1, "number of processors; with more than one emulated processor, Linux 6.12 sometimes crashes")
	flags.IntVar(&o.memory, "memory", 3072, "memory in MiB")
	flags.DurationVar(&o.limit, "limit", 30*time.Minute, "time limit if PROGRAM has no -test.timeout")
	flags.DurationVar(&o.bootLimit, "boot-limit", 3*time.Minute, "time limit for the boot")
	flags.StringVar(&o.kernelArgs, "append", "", "additional kernel `parameters`")
	flags.StringVar(&o.log, "log", "", "write the kernel log to `file`")
	flags.BoolVar(&o.modprobe, "modprobe", true, "provide modprobe, which loads modules on demand")
	flags.StringVar(&names, "env", "", "`names` of additional environment variables to pass, separated by commas")
	flags.StringVar(&files, "with", "", "additional `files` to copy to the same paths, separated by commas")
	if err := flags.Parse(args[1:]); err != nil {
		return nil, err
	}
	if !slices.Contains(architectures(), o.arch) {
		return nil, fmt.Errorf("-arch=%s: want one of %s", o.arch, strings.Join(architectures(), ", "))
	}
	versions := platforms()[o.arch].versions()
	if o.kernel == "" {
		o.kernel = versions[len(versions)-1] // 6.1 sorts before 6.12
	}
	if !slices.Contains(versions, o.kernel) {
		return nil, fmt.Errorf("-kernel=%s: want one of %s", o.kernel, strings.Join(versions, ", "))
	}
	if o.accel == "kvm" && foreign(o.arch) {
		return nil, fmt.Errorf("-accel=kvm: want -arch=%s, the architecture of this machine", runtime.GOARCH)
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
		return nil, errors.New("-clock=own: want -accel=tcg -cpus=1, because only a single emulated processor has its own clock")
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
			return nil, fmt.Errorf("-%s: cannot copy files out of the virtual machine", name)
		}
	}
	return o, nil
}

// moduleRoot returns the root directory of the module that contains the working directory.
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
			return "", fmt.Errorf("%s is not in a checkout: go.mod not found", at)
		}
	}
}

// initrd creates the initial file system as a file without a name.
func (o *options) initrd(ctx context.Context, c cache, root, modules string) (*os.File, error) {
	busybox, err := c.busybox(ctx)
	if err != nil {
		return nil, err
	}
	var programs string
	if foreign(o.arch) {
		if programs, err = c.programs(ctx); err != nil {
			return nil, err
		}
	}
	f, err := os.CreateTemp(c.dir, "initrd-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := o.writeInitrd(ctx, f, busybox, programs, root, modules); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (o *options) writeInitrd(ctx context.Context, f *os.File, busybox, programs, root, modules string) (err error) {
	a := newArchive(f)
	if err := addBase(a, busybox); err != nil {
		return err
	}
	if foreign(o.arch) {
		err = a.addTree("/", programs, nil)
	} else {
		err = addHostPrograms(ctx, a)
	}
	if err != nil {
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

// environment returns the environment of the command, given the variables of this process.
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

// shellCommand returns the command of an interactive shell with a terminal of the given size.
// If command is not empty, it runs in the background.
func shellCommand(rows, columns string, command []string) []string {
	const start = `stty rows "$1" columns "$2"
		echo "Linux $(uname -r); exit or Ctrl-D ends it, Ctrl-A X at once"
		shift 2
		[ $# -eq 0 ] || "$@" &
		exec env PS1='\h:\w\$ ' bash --norc -i`
	return append([]string{"sh", "-c", start, "sh", rows, columns}, command...)
}

// runScript returns the script that runs the command in the virtual machine.
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

// shellQuote quotes s as one word for a shell.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// initSettings returns the settings that init.sh reads.
func (o *options) initSettings() string {
	yes := map[bool]string{true: "yes", false: "no"}
	p := platforms()[o.arch]
	return fmt.Sprintf("TERMINAL=%s\nMODPROBE=%s\nDRIVERS='%s'\nOUTPUT=/dev/%s\nSTATUS=/dev/%s\n",
		yes[o.shell], yes[o.modprobe], p.loadAtBoot, p.output, p.status)
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
