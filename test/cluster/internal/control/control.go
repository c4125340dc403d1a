// Package control runs a cluster: the control plane, the nodes, the Service proxy, the DNS server
// and the load balancer. It runs in namespaces of its own, which are the parents of the nodes'.
package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/test/cluster/internal/addons"
	"fairlead.io/fairlead/test/cluster/internal/cgroup"
	"fairlead.io/fairlead/test/cluster/internal/loadbalancer"
	"fairlead.io/fairlead/test/cluster/internal/namespaces"
	"fairlead.io/fairlead/test/cluster/internal/node"
	"fairlead.io/fairlead/test/cluster/internal/programs"
	"fairlead.io/fairlead/test/cluster/internal/topology"
	"fairlead.io/fairlead/test/controlplane"
)

// Names in the state directory.
const (
	// AdminKubeconfig has all permissions.
	AdminKubeconfig = "admin.kubeconfig"
	// Ready exists from the time on at which the cluster is ready.
	Ready = "ready"
)

// PIDFile returns the file with the PID of the first process of a node, in the PID namespace of
// the control plane.
func PIDFile(state, nodeName string) string { return filepath.Join(state, nodeName+".pid") }

// startTimeout bounds the start of all nodes and pods on a busy machine with two processors.
const startTimeout = 5 * time.Minute

// Run starts the cluster that the state directory describes, and runs it until ctx ends or a
// program ends.
func Run(ctx context.Context, state string, log *slog.Logger) error {
	cluster, err := topology.Read(state)
	if err != nil {
		return err
	}
	r := &runner{state: state, cluster: cluster, log: log}
	r.group = programs.NewGroup(filepath.Join(state, "log"))
	if r.bridge, err = createNetwork(); err != nil {
		return fmt.Errorf("create the network: %w", err)
	}
	cp, err := controlplane.New(ctx, controlplane.Options{
		Programs:          cluster.ControlPlane,
		Address:           topology.APIServer().Addr(),
		Port:              topology.APIServer().Port(),
		ServiceCIDRs:      topology.ServiceCIDRs(),
		ControllerManager: true,
		Nodes:             true,
	})
	if err != nil {
		return err
	}
	defer cp.Close() //nolint:errcheck // the namespaces end
	log.InfoContext(ctx, "control plane is ready")
	startCtx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := r.start(startCtx, cp); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(state, Ready), nil, 0o600); err != nil {
		return err
	}
	log.InfoContext(ctx, "cluster is ready")

	balancer, err := loadbalancer.New(r.clientset, cluster, log.With("component", "load balancer"))
	if err != nil {
		return fmt.Errorf("load balancer: %w", err)
	}
	r.ready.Store(true)
	go balancer.Run(ctx)
	select {
	case err := <-r.group.Failed():
		return err
	case <-ctx.Done():
		return nil
	}
}

type runner struct {
	state     string
	cluster   *topology.Cluster
	log       *slog.Logger
	group     *programs.Group
	bridge    *bridge
	ready     atomic.Bool
	clientset kubernetes.Interface
	dynamic   dynamic.Interface
}

func (r *runner) start(ctx context.Context, cp *controlplane.ControlPlane) error {
	if err := r.createClients(cp.Config()); err != nil {
		return err
	}
	if err := cp.Kubeconfig(filepath.Join(r.state, AdminKubeconfig), "admin", "system:masters"); err != nil {
		return err
	}
	if err := r.startScheduler(cp); err != nil {
		return err
	}
	for _, n := range r.cluster.AllNodes() {
		if err := addons.CreateNode(ctx, r.clientset, n); err != nil {
			return err
		}
		if err := r.startNode(cp, n); err != nil {
			return fmt.Errorf("start %s: %w", n.Name, err)
		}
	}
	r.log.InfoContext(ctx, "nodes are starting", "nodes", r.cluster.Nodes)
	objects, err := addons.All(r.cluster)
	if err != nil {
		return err
	}
	if err := addons.Apply(ctx, r.dynamic, objects); err != nil {
		return err
	}
	// Pods start while other nodes do.
	ready := make(chan error, 1)
	go func() { ready <- addons.Wait(ctx, r.clientset, r.cluster.Nodes, objects, r.log) }()
	select {
	case err := <-r.group.Failed():
		return err
	case err := <-ready:
		return err
	}
}

func (r *runner) createClients(config *rest.Config) error {
	var err error
	if r.clientset, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	r.dynamic, err = dynamic.NewForConfig(config)
	return err
}

func (r *runner) startScheduler(cp *controlplane.ControlPlane) error {
	kubeconfig := filepath.Join(cp.Dir(), "scheduler.kubeconfig")
	if err := cp.Kubeconfig(kubeconfig, "system:kube-scheduler"); err != nil {
		return err
	}
	return r.group.Start("kube-scheduler", filepath.Join(r.cluster.Programs, "kube-scheduler"),
		"--kubeconfig="+kubeconfig, "--authentication-kubeconfig="+kubeconfig, "--authorization-kubeconfig="+kubeconfig,
		"--leader-elect=false", "--secure-port=0")
}

func (r *runner) startNode(cp *controlplane.ControlPlane, n topology.Node) error {
	dir := node.Directory(r.state, n)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := mountWritable(dir); err != nil {
		return err
	}
	if err := cp.Kubeconfig(filepath.Join(dir, node.Kubeconfig), "system:node:"+n.Name, "system:nodes"); err != nil {
		return err
	}
	if err := copyFile(filepath.Join(dir, node.CAFile), cp.CAFile()); err != nil {
		return err
	}
	group, err := newCgroup(n.Name)
	if err != nil {
		return err
	}
	output, err := os.Create(r.group.Log(n.Name))
	if err != nil {
		return err
	}
	defer output.Close() //nolint:errcheck // the node has its own descriptor
	program, err := os.Executable()
	if err != nil {
		return err
	}
	cmd, err := namespaces.Start(namespaces.Options{
		Dir: dir, Node: true, Group: group, Output: output,
		Pause:   filepath.Join(r.cluster.Programs, "pause"),
		Program: []string{program, "node", "-state=" + r.state, "-number=" + strconv.Itoa(n.Number)},
	})
	if err != nil {
		return err
	}
	go r.boot(cp, n, cmd)
	pid := cmd.Process.Pid
	if err := os.WriteFile(PIDFile(r.state, n.Name), []byte(strconv.Itoa(pid)), 0o600); err != nil {
		return err
	}
	return r.bridge.connect(n, pid)
}

// mountWritable mounts a tmpfs on a node's directory if it is on overlayfs, for example in a
// container, because an overlay cannot store the changes of another one. The mount ends with the
// namespaces.
func mountWritable(dir string) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return fmt.Errorf("file system of %s: %w", dir, err)
	}
	if stat.Type != unix.OVERLAYFS_SUPER_MAGIC {
		return nil
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
	}
	return nil
}

// boot waits until a node ends, and starts it again with the files on its disk. A node that ends
// before the cluster is ready ends the cluster.
func (r *runner) boot(cp *controlplane.ControlPlane, n topology.Node, cmd *exec.Cmd) {
	err := cmd.Wait()
	if !r.ready.Load() {
		r.group.Fail(fmt.Errorf("%s has ended: %w\n%s", n.Name, errors.Join(err, errNotReady), programs.Tail(r.group.Log(n.Name))))
		return
	}
	r.log.Info("node has ended and starts again", "node", n.Name, "error", err)
	if err := r.startNode(cp, n); err != nil {
		r.group.Fail(fmt.Errorf("start %s again: %w", n.Name, err))
	}
}

var errNotReady = errors.New("the cluster is not ready yet")

// newCgroup creates a group without the groups of the node's containers before a restart.
func newCgroup(name string) (*cgroup.Group, error) {
	group, err := cgroup.Find(name)
	if err != nil {
		return nil, err
	}
	if err := group.Remove(); err != nil {
		return nil, err
	}
	return cgroup.Create(name)
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // read-only
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
