// Package node makes a node of the namespaces that it runs in: it configures the network, and
// runs containerd and kubelet.
package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/test/cluster/internal/programs"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// Directory returns the directory of a node's files below the state directory of a cluster.
func Directory(state string, n topology.Node) string { return filepath.Join(state, n.Name) }

// Kubeconfig is the file in the directory of a node with kubelet's kubeconfig, and CAFile the one
// with the certificate authority. The control plane writes them.
const (
	Kubeconfig = "kubelet.kubeconfig"
	CAFile     = "ca.crt"
)

// Run starts a node and returns when a program of it ends.
func Run(ctx context.Context, state string, number int) error {
	cluster, err := topology.Read(state)
	if err != nil {
		return err
	}
	n := cluster.Node(number)
	dir := Directory(state, n)
	if err := unix.Sethostname([]byte(n.Name)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := ConfigureNetwork(ctx, cluster, n); err != nil {
		return fmt.Errorf("configure the network: %w", err)
	}
	if err := writeFiles(dir, cluster, n); err != nil {
		return err
	}
	search := "PATH=" + cluster.Programs + ":" + os.Getenv("PATH")
	group := programs.NewGroup(filepath.Join(state, "log"), search, "HOME="+dir)
	if err := group.Start(n.Name+"-containerd", filepath.Join(cluster.Programs, "containerd"), "--log-level=warn"); err != nil {
		return err
	}
	if err := loadImages(ctx, cluster); err != nil {
		return fmt.Errorf("%w\n%s", err, programs.Tail(group.Log(n.Name+"-containerd")))
	}
	if err := group.Keep(n.Name+"-kubelet", filepath.Join(cluster.Programs, "kubelet"), kubeletArgs(dir, n)...); err != nil {
		return err
	}
	select {
	case err := <-group.Failed():
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func kubeletArgs(dir string, n topology.Node) []string {
	return []string{
		"--config=" + filepath.Join(dir, kubeletConfig),
		"--kubeconfig=" + filepath.Join(dir, Kubeconfig),
		"--hostname-override=" + n.Name,
		"--node-ip=" + topology.Join(n.Addresses()),
		"--cert-dir=" + filepath.Join(dir, "kubelet-pki"),
		"--v=2",
	}
}

// loadImages waits for containerd and loads the images.
func loadImages(ctx context.Context, cluster *topology.Cluster) error {
	const timeout, period = time.Minute, 100 * time.Millisecond
	ctr := filepath.Join(cluster.Programs, "ctr")
	waitCtx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		out, err := exec.CommandContext(waitCtx, ctr, "version").CombinedOutput()
		if err == nil {
			break
		}
		select {
		case <-waitCtx.Done():
			return fmt.Errorf("wait for containerd: %w: %w\n%s", waitCtx.Err(), err, out)
		case <-time.After(period):
		}
	}
	var errs []error
	for _, archive := range cluster.Images {
		// --local: containerd reads the archive in this mount namespace either way, but only the
		// client's importer accepts archives without a platform in their index.
		out, err := exec.CommandContext(ctx, ctr, "--namespace=k8s.io", "images", "import", "--local", archive).CombinedOutput()
		if err != nil {
			errs = append(errs, fmt.Errorf("load images from %s: %w\n%s", archive, err, out))
		}
	}
	return errors.Join(errs...)
}
