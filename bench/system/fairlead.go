package system

import (
	"context"
	"fmt"

	"fairlead.io/fairlead/internal/nettest"
)

// Fairlead is `fairlead run` in one of its modes.
type Fairlead struct {
	// Binary is the path of the program.
	Binary string
	// Mode is the value of --mode, and the System's name.
	Mode string
	// Args are further arguments.
	Args []string
	// Release is the program's version.
	Release string
}

var (
	_ System  = Fairlead{}
	_ Checker = Fairlead{}
)

// Name implements [System].
func (f Fairlead) Name() string { return f.Mode }

// Version returns the program's version.
func (f Fairlead) Version(context.Context) (string, error) { return f.Release, nil }

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
		return hasIPVS(node)
	}
	return nil
}

// Start implements [System].
func (f Fairlead) Start(ctx context.Context, env Environment) (Running, error) {
	if err := f.Check(ctx, env.Namespace); err != nil {
		return nil, err
	}
	return started(StartProcess(env, f.Name(), f.Command(env)...))
}

// started is a *Process as a [Running], of which a nil one is none.
func started(p *Process, err error) (Running, error) {
	if err != nil {
		return nil, err
	}
	return p, nil
}

// UnavailableError says why a System cannot run here.
type UnavailableError struct {
	Reason string
	// Kernel says that it is this machine's kernel: with another the System could run.
	Kernel bool
}

// Error implements error.
func (e *UnavailableError) Error() string { return e.Reason }

func unavailable(format string, args ...any) error {
	return &UnavailableError{Reason: fmt.Sprintf(format, args...)}
}

func unsupported(format string, args ...any) error {
	return &UnavailableError{Reason: fmt.Sprintf(format, args...), Kernel: true}
}
