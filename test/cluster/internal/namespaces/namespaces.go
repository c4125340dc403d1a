// Package namespaces starts programs in new namespaces for PIDs, mounts, the network, the host
// name, IPC and control groups. When the first process of these namespaces ends, the kernel kills
// all others and removes the network interfaces.
package namespaces

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"fairlead.io/fairlead/test/cluster/internal/cgroup"
)

//go:embed namespaces.sh
var script []byte

// Options describes the namespaces and what runs in them.
type Options struct {
	// Dir is an existing directory for the files of the namespaces, including temporary files.
	Dir string
	// Node makes the mounts of a node.
	Node bool
	// Group is the control group to run in.
	Group *cgroup.Group
	// Pause is the program in test/cluster/pause, which is the first process.
	Pause string
	// Program is the program to run, with its arguments.
	Program []string
	// Output receives the standard output and the standard error.
	Output *os.File
}

// Start starts a program in new namespaces. The process of the result is the first process of the
// namespaces. It ends with the program.
func Start(o Options) (*exec.Cmd, error) {
	path := filepath.Join(o.Dir, "namespaces.sh")
	if err := os.WriteFile(path, script, 0o600); err != nil {
		return nil, err
	}
	kind := "lab"
	if o.Node {
		kind = "node"
	}
	args := append([]string{path, "enter", kind, o.Pause}, o.Program...)
	cmd := exec.Command("/bin/sh", args...) //nolint:noctx // it runs until its first process ends
	cmd.Env = append(os.Environ(), "CGROUPS="+o.Group.Lines(), "NODE_DIR="+o.Dir, "TMPDIR="+o.Dir)
	cmd.Stdout, cmd.Stderr = o.Output, o.Output
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		// Signals of a terminal must not reach the cluster.
		Setsid: true,
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s in new namespaces: %w", o.Program[0], err)
	}
	return cmd, nil
}

// Command returns the arguments of a command that runs in the namespaces of a process, for the
// nsenter of util-linux.
func Command(pid int, args ...string) []string {
	return append([]string{"nsenter", "--target", fmt.Sprint(pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"}, args...)
}
