package system

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"fairlead.io/fairlead/internal/flowoffload"
	"fairlead.io/fairlead/internal/nettest"
)

// Modes of Fairlead. A test of package bench compares them with the backends.
const (
	ModeNFT  = "nft"
	ModeIPVS = "ipvs"
)

// NFTFlowOffload is the name of the System with [ModeNFT] and flow offload.
const NFTFlowOffload = ModeNFT + flowOffloadSuffix

const flowOffloadSuffix = "-flow-offload"

// Fairlead runs `fairlead run` in one mode.
type Fairlead struct {
	// Binary is the path of the program.
	Binary string
	// Mode is the value of --mode and, without the options below, the name of the System.
	Mode string
	// FlowOffload sets --flow-offload=software and adds a suffix to the name of the System.
	FlowOffload bool
	// BatchPeriod, if not nil, is the value of --batch-period. It adds a suffix to the name of the
	// System.
	BatchPeriod *time.Duration
	// Args are additional arguments.
	Args []string
}

var (
	_ System  = Fairlead{}
	_ Checker = Fairlead{}
)

// Name implements [System].
func (f Fairlead) Name() string {
	name := f.Mode
	if f.FlowOffload {
		name += flowOffloadSuffix
	}
	if f.BatchPeriod != nil {
		name += "-batch-" + f.BatchPeriod.String()
	}
	return name
}

// WithFlowOffload returns the same System with flow offload. It reports false for a mode without it.
func (f Fairlead) WithFlowOffload() (System, bool) {
	f.FlowOffload = true
	return f, f.Mode == ModeNFT
}

// Path returns the absolute path of the program, or an error if the program does not exist.
func (f Fairlead) Path() (string, error) { return absolutePath(f.Binary) }

// Version returns the version that the program prints.
func (f Fairlead) Version(ctx context.Context) (string, error) {
	return programVersion(ctx, f.Binary, "version")
}

// Command returns the command line that starts the program.
func (f Fairlead) Command(env Environment) []string {
	command := []string{
		f.Binary, "run", "--mode=" + f.Mode,
		"--kubeconfig=" + env.Kubeconfig,
		"--hostname-override=" + env.NodeName,
		"--cluster-cidr=" + env.ClusterCIDR.String(),
		"--conntrack-max-per-core=0",
		"--conntrack-tcp-timeout-established=0s",
		"--conntrack-tcp-timeout-close-wait=0s",
	}
	if f.FlowOffload {
		command = append(command, "--flow-offload=software")
	}
	if f.BatchPeriod != nil {
		command = append(command, "--batch-period="+f.BatchPeriod.String())
	}
	return append(command, f.Args...)
}

// Check implements [Checker].
func (f Fairlead) Check(_ context.Context, node *nettest.Namespace) error {
	if f.Mode == ModeIPVS {
		return checkIPVS(node)
	}
	if f.FlowOffload {
		return checkFlowtables(node)
	}
	return nil
}

// checkFlowtables checks whether the kernel has flowtables. The kernel loads the modules if it can.
func checkFlowtables(node *nettest.Namespace) error {
	err := flowoffload.Check(node.Fd())
	if errors.Is(err, flowoffload.ErrUnsupported) {
		return unsupportedByKernel("not supported by this kernel: %v", err)
	}
	return err
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
		return "", fmt.Errorf("find program: %w", err)
	}
	return path, nil
}

// programVersion returns the version that the program prints after its name.
func programVersion(ctx context.Context, binary, arg string) (string, error) {
	out, err := exec.CommandContext(ctx, binary, arg).Output()
	if err != nil {
		return "", fmt.Errorf("get the version of %s: %w", binary, err)
	}
	_, version, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	return version, nil
}

// asInstance returns p as an [Instance]. On an error it returns a nil interface, not a nil
// *Process.
func asInstance(p *Process, err error) (Instance, error) {
	if err != nil {
		return nil, err
	}
	return p, nil
}

// UnavailableError reports why a System cannot run here.
type UnavailableError struct {
	Reason string
	// KernelLacksSupport reports whether the System could run with another kernel.
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
