// Package lab starts, enters and ends a cluster from outside of its namespaces.
//
// A cluster has one state directory, which has its description, its logs, its kubeconfig and the
// files of its nodes. The first process of its namespaces, whose PID is in the directory, ends
// everything else when it ends.
package lab

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/test/cluster/internal/cgroup"
	"fairlead.io/fairlead/test/cluster/internal/control"
	"fairlead.io/fairlead/test/cluster/internal/namespaces"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// Lab is a cluster, which may be running or not.
type Lab struct {
	state string // absolute path without symbolic links
}

// ErrNotRunning means that no cluster runs.
var ErrNotRunning = errors.New("no cluster is running: start it with make cluster")

// Open returns the cluster of a state directory, which does not need to exist.
func Open(state string) (*Lab, error) {
	absolute, err := filepath.Abs(state)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(absolute, 0o755); err != nil {
		return nil, err
	}
	absolute, err = filepath.EvalSymlinks(absolute)
	return &Lab{state: absolute}, err
}

// State returns the state directory.
func (l *Lab) State() string { return l.state }

// Kubeconfig returns the kubeconfig with all permissions, for processes in the cluster.
func (l *Lab) Kubeconfig() string { return filepath.Join(l.state, control.AdminKubeconfig) }

// Log returns the log of the program that runs the cluster. Other logs are beside it.
func (l *Lab) Log() string { return filepath.Join(l.state, "log", "cluster.log") }

func (l *Lab) pidFile() string { return filepath.Join(l.state, "pid") }

// group is the name of the cluster's control group. Clusters of other checkouts have other names.
func (l *Lab) group() string {
	return fmt.Sprintf("fairlead-cluster-%08x", crc32.ChecksumIEEE([]byte(l.state)))
}

// check returns an error if a cluster cannot run here.
func (l *Lab) check() error {
	if os.Getuid() != 0 {
		return errors.New("start a cluster: run as root: it creates namespaces, mounts and control groups")
	}
	// Nodes have their own copies of these directories, in which the state would be another one.
	for _, dir := range []string{"/etc", "/opt", "/run", "/var"} {
		if l.state == dir || strings.HasPrefix(l.state, dir+"/") {
			return fmt.Errorf("start a cluster: the state directory %s is below %s, which nodes replace: use another one with -state", l.state, dir)
		}
	}
	return nil
}

// Start starts a cluster and returns when it is ready. It writes progress to the writer. If the
// start fails, nothing runs afterwards, but the logs stay.
func (l *Lab) Start(ctx context.Context, cluster *topology.Cluster, progress io.Writer) error {
	if err := cluster.Validate(); err != nil {
		return err
	}
	if err := l.check(); err != nil {
		return err
	}
	if _, err := l.pid(); err == nil {
		return fmt.Errorf("a cluster is running with the state directory %s: end it with make cluster-stop", l.state)
	}
	// The previous cluster may have been killed.
	if err := l.clean(true); err != nil {
		return err
	}
	if err := l.launch(ctx, cluster, progress); err != nil {
		return errors.Join(err, l.Stop())
	}
	return nil
}

func (l *Lab) launch(ctx context.Context, cluster *topology.Cluster, progress io.Writer) error {
	if err := os.MkdirAll(filepath.Dir(l.Log()), 0o755); err != nil {
		return err
	}
	if err := cluster.Write(l.state); err != nil {
		return err
	}
	log, err := os.Create(l.Log())
	if err != nil {
		return err
	}
	defer log.Close() //nolint:errcheck // the cluster has its own descriptor
	group, err := cgroup.Create(l.group())
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	cmd, err := namespaces.Start(namespaces.Options{
		Dir: l.state, Group: group, Output: log,
		Pause:   filepath.Join(cluster.Programs, "pause"),
		Program: []string{program, "control", "-state=" + l.state},
	})
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := l.writePID(cmd.Process.Pid); err != nil {
		return errors.Join(err, cmd.Process.Kill())
	}
	return l.waitReady(ctx, ended, progress)
}

// waitReady copies the log to the writer until the cluster is ready.
func (l *Lab) waitReady(ctx context.Context, ended <-chan error, progress io.Writer) error {
	const period = 100 * time.Millisecond
	log, err := os.Open(l.Log())
	if err != nil {
		return err
	}
	defer log.Close() //nolint:errcheck // read-only
	for {
		_, statErr := os.Stat(filepath.Join(l.state, control.Ready))
		if _, err := io.Copy(progress, log); err != nil {
			return err
		}
		if statErr == nil {
			return nil
		}
		select {
		case err := <-ended:
			_, _ = io.Copy(progress, log)
			return fmt.Errorf("the cluster has ended: %w: see the logs in %s", errors.Join(err, errors.New("not ready")), filepath.Dir(l.Log()))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(period):
		}
	}
}

// writePID records the first process and its start time, because PIDs are reused.
func (l *Lab) writePID(pid int) error {
	started, err := startTime(pid)
	if err != nil {
		return err
	}
	return os.WriteFile(l.pidFile(), fmt.Appendf(nil, "%d %s\n", pid, started), 0o600)
}

// pid returns the first process of the running cluster.
func (l *Lab) pid() (int, error) {
	text, err := os.ReadFile(l.pidFile())
	if errors.Is(err, fs.ErrNotExist) {
		return 0, ErrNotRunning
	}
	if err != nil {
		return 0, err
	}
	number, started, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	pid, err := strconv.Atoi(number)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", l.pidFile(), err)
	}
	if now, err := startTime(pid); err != nil || now != started {
		return 0, ErrNotRunning
	}
	return pid, nil
}

// startTime returns the start time of a process in clock ticks since the machine started. It fails
// for a process that has ended and that its parent has not waited for.
func startTime(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// Fields from the state on; the name before may contain spaces. See proc(5).
	const stateField, startField = 0, 19
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) <= startField || slices.Contains([]string{"Z", "X"}, fields[stateField]) {
		return "", fmt.Errorf("process %d: %w", pid, os.ErrProcessDone)
	}
	return fields[startField], nil
}

// Command returns a command that runs in the namespaces of the control plane, or of a node if
// nodeName is not empty. kubectl and other programs of the cluster are in its PATH.
func (l *Lab) Command(ctx context.Context, nodeName string, args ...string) (*exec.Cmd, error) {
	pid, err := l.pid()
	if err != nil {
		return nil, err
	}
	cluster, err := topology.Read(l.state)
	if err != nil {
		return nil, err
	}
	if nodeName != "" {
		text, err := os.ReadFile(control.PIDFile(l.state, nodeName))
		if err != nil {
			return nil, fmt.Errorf("no node %q: want node1 to node%d", nodeName, cluster.Nodes)
		}
		nodePID, err := strconv.Atoi(string(text))
		if err != nil {
			return nil, err
		}
		args = namespaces.Command(nodePID, args...)
	}
	args = namespaces.Command(pid, args...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "PATH="+cluster.Programs+":"+os.Getenv("PATH"), "KUBECONFIG="+l.Kubeconfig(),
		"KUBECACHEDIR="+filepath.Join(l.state, "kubectl-cache"), "TMPDIR="+l.state)
	return cmd, nil
}

// Cluster returns the description of the cluster.
func (l *Lab) Cluster() (*topology.Cluster, error) { return topology.Read(l.state) }

// Stop ends the cluster, and removes everything but the logs. Stopping a cluster that does not run
// is not an error.
func (l *Lab) Stop() error {
	pid, err := l.pid()
	if errors.Is(err, ErrNotRunning) {
		return l.clean(false)
	}
	if err != nil {
		return err
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end the cluster: %w", err)
	}
	const tries, period = 600, 50 * time.Millisecond
	for range tries {
		if _, err := startTime(pid); err != nil {
			return l.clean(false)
		}
		time.Sleep(period)
	}
	return fmt.Errorf("end the cluster: process %d is still running", pid)
}

// clean removes the control groups and the state of a cluster that does not run.
func (l *Lab) clean(logs bool) error {
	group, err := cgroup.Find(l.group())
	if err != nil {
		return err
	}
	if err := group.Remove(); err != nil {
		return err
	}
	entries, err := os.ReadDir(l.state)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.Name() == "log" && !logs {
			continue
		}
		if err := os.RemoveAll(filepath.Join(l.state, entry.Name())); err != nil {
			return err
		}
	}
	return nil
}
