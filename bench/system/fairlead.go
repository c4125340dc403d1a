package system

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"fairlead.io/fairlead/internal/nettest"
)

// Fairlead is `fairlead run` in one mode.
type Fairlead struct {
	// Binary is the path of the program.
	Binary string
	// Mode is the value of --mode, and the System's name.
	Mode string
	// Args are further arguments.
	Args []string
}

var (
	_ System  = Fairlead{}
	_ Checker = Fairlead{}
)

// Name implements [System].
func (f Fairlead) Name() string { return f.Mode }

// Path returns the absolute path of the program, or an error if there is none.
func (f Fairlead) Path() (string, error) { return absolutePath(f.Binary) }

// Version returns the version that the program prints.
func (f Fairlead) Version(ctx context.Context) (string, error) {
	return programVersion(ctx, f.Binary, "version")
}

// Command returns how the program is started.
func (f Fairlead) Command(env Environment) []string {
	return append([]string{
		f.Binary, "run", "--mode=" + f.Mode,
		"--kubeconfig=" + env.Kubeconfig,
		"--hostname-override=" + env.NodeName,
		"--cluster-cidr=" + env.ClusterCIDR.String(),
	}, f.Args...)
}

// Check implements [Checker].
func (f Fairlead) Check(_ context.Context, node *nettest.Namespace) error {
	if f.Mode == "ipvs" {
		return checkIPVS(node)
	}
	return nil
}

// Start implements [System].
func (f Fairlead) Start(ctx context.Context, env Environment) (Instance, error) {
	if err := f.Check(ctx, env.Namespace); err != nil {
		return nil, err
	}
	return asInstance(StartProcess(env, f.Name(), f.Command(env)...))
}

// absolutePath returns the absolute path of an executable.
func absolutePath(binary string) (string, error) {
	path, err := exec.LookPath(binary)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("find the program: %w", err)
	}
	return path, nil
}

// programVersion runs the program, which prints its name and its version.
func programVersion(ctx context.Context, binary, arg string) (string, error) {
	out, err := exec.CommandContext(ctx, binary, arg).Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", binary, err)
	}
	_, version, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	return version, nil
}

// asInstance is a *Process as a [Instance], of which a nil one is none.
func asInstance(p *Process, err error) (Instance, error) {
	if err != nil {
		return nil, err
	}
	return p, nil
}

// UnavailableError says why a System cannot run here.
type UnavailableError struct {
	Reason string
	// KernelLacksSupport says that it is this machine's kernel: with another the System could run.
	KernelLacksSupport bool
}

// Error implements error.
func (e *UnavailableError) Error() string { return e.Reason }

func unavailable(format string, args ...any) error {
	return &UnavailableError{Reason: fmt.Sprintf(format, args...)}
}

func unsupportedByKernel(format string, args ...any) error {
	return &UnavailableError{Reason: fmt.Sprintf(format, args...), KernelLacksSupport: true}
}
