package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"fairlead.io/fairlead/test/cluster/internal/images"
	"fairlead.io/fairlead/test/cluster/internal/lab"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// startOptions are the flags of commands that start a cluster.
type startOptions struct {
	cluster    topology.Cluster
	kubernetes string
	cache      string
	layout     string
}

func addStartFlags(flags *flag.FlagSet) *startOptions {
	o := &startOptions{}
	flags.IntVar(&o.cluster.Nodes, "nodes", 3, "`number` of nodes; fs.inotify.max_user_instances=128 allows 9")
	flags.IntVar(&o.cluster.Zones, "zones", 3, "`number` of zones")
	flags.StringVar(&o.cluster.Proxy, "proxy", topology.Fairlead, "Service `proxy`: fairlead, kube-proxy or none")
	flags.StringVar(&o.cluster.Mode, "mode", "", "`mode` of the proxy: nft or ipvs; nftables, iptables or ipvs of kube-proxy")
	flags.StringVar(&o.kubernetes, "kubernetes", "", "older `release` of Kubernetes, such as 1.29; empty means the newest")
	flags.StringVar(&o.cluster.Values, "values", "", "values of Fairlead's Helm chart, in `YAML`, that change the defaults")
	flags.StringVar(&o.cache, "cache", ".cache", "`directory` with the programs that make builds")
	flags.StringVar(&o.layout, "image", "bin/image", "`directory` of Fairlead's image, which make image writes")
	flags.StringVar(&o.cluster.Chart, "chart", "deploy/chart/fairlead", "`directory` of Fairlead's Helm chart")
	return o
}

func start(ctx context.Context, state string, o *startOptions) error {
	l, err := lab.Open(state)
	if err != nil {
		return err
	}
	began := time.Now()
	cluster, err := o.prepare(ctx)
	if err != nil {
		return err
	}
	if err := l.Start(ctx, cluster, os.Stderr); err != nil {
		return err
	}
	fmt.Printf("The cluster is ready after %s. Look around with `make cluster-shell`, end it with `make cluster-stop`.\n",
		time.Since(began).Round(time.Second))
	return nil
}

// prepare checks that the programs exist, writes the images, and returns the description of the
// cluster with absolute paths.
func (o *startOptions) prepare(ctx context.Context) (*topology.Cluster, error) {
	cluster := o.cluster
	if cluster.Mode == "" {
		cluster.Mode = topology.DefaultMode(cluster.Proxy)
	}
	if err := cluster.Validate(); err != nil {
		return nil, err
	}
	cache, err := resolve(o.cache)
	if err != nil {
		return nil, err
	}
	if cluster.Chart, err = resolve(cluster.Chart); err != nil {
		return nil, err
	}
	cluster.Programs, cluster.ControlPlane = filepath.Join(cache, "cluster", "bin"), filepath.Join(cache, "controlplane")
	archive := filepath.Join(cache, "cluster", "images.tar")
	if o.kubernetes != "" {
		if cluster.Proxy == topology.KubeProxy {
			return nil, fmt.Errorf("kubernetes: %s: kube-proxy is the newest, which must not be newer than the API server", o.kubernetes)
		}
		cluster.Programs = filepath.Join(cache, "cluster", "kubernetes-"+o.kubernetes)
		cluster.ControlPlane, archive = cluster.Programs, filepath.Join(cluster.Programs, "images.tar")
	}
	programs := images.Programs{Dir: cluster.Programs, KubeProxy: filepath.Join(cache, "kube-proxy", "kube-proxy")}
	for _, path := range []string{filepath.Join(cluster.Programs, "kubelet"), filepath.Join(cluster.ControlPlane, "kube-apiserver"), programs.KubeProxy} {
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("a program is missing: run make cluster-programs KUBERNETES=%s: %w", o.kubernetes, err)
		}
	}
	out, err := exec.CommandContext(ctx, filepath.Join(cluster.Programs, "e2e.test"), "--list-images").Output()
	if err != nil {
		return nil, fmt.Errorf("list the images of the end-to-end tests: %w", err)
	}
	names := images.ParseList(string(out))
	if err := images.Write(ctx, archive, programs, names); err != nil {
		return nil, fmt.Errorf("create the images; make cluster-programs builds the programs that they need: %w", err)
	}
	cluster.Images = []string{archive}
	if cluster.SandboxImage, err = sandboxImage(names); err != nil {
		return nil, err
	}
	if cluster.Proxy != topology.Fairlead {
		return &cluster, nil
	}
	layout, err := resolve(o.layout)
	if err != nil {
		return nil, fmt.Errorf("image of Fairlead: run make image: %w", err)
	}
	archive = layout + ".tar"
	cluster.Images = append(cluster.Images, archive)
	return &cluster, images.WriteFairlead(archive, layout, runtime.GOARCH)
}

func sandboxImage(names []string) (string, error) {
	for _, name := range names {
		if strings.HasPrefix(name, "registry.k8s.io/pause:") {
			return name, nil
		}
	}
	return "", errors.New("the end-to-end tests list no image pause")
}

// resolve returns an absolute path without symbolic links, which is valid in all namespaces.
func resolve(path string) (string, error) {
	absolute, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	resolved, err := filepath.EvalSymlinks(absolute)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: run the command in the root of the checkout", err)
	}
	return resolved, err
}
