package node

import (
	"bytes"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// The configuration of a node's programs.
//
//go:embed cni.conflist
var cniTemplate string

//go:embed containerd.toml
var containerdTemplate string

//go:embed kubelet.yaml
var kubeletTemplate string

// kubeletConfig is kubelet's configuration file in the directory of a node.
const kubeletConfig = "kubelet.yaml"

// writeFiles writes the configuration files of a node. /etc is the node's own.
func writeFiles(dir string, cluster *topology.Cluster, n topology.Node) error {
	values := map[string]any{
		"Node": n, "Programs": cluster.Programs, "SandboxImage": cluster.SandboxImage,
		"CAFile": filepath.Join(dir, CAFile), "DNS": topology.DNS(),
	}
	for _, path := range []string{"/etc/cni", "/var/lib/cni", "/var/log/pods"} {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	gateway := topology.Host()[0].Addr()
	for path, text := range map[string]string{
		"/etc/hostname":                      n.Name + "\n",
		"/etc/machine-id":                    fmt.Sprintf("%032d\n", n.Number),
		"/etc/resolv.conf":                   "nameserver " + gateway.String() + "\n",
		"/etc/hosts":                         fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n%s %s\n", n.IPv4, n.Name, n.IPv6, n.Name),
		"/etc/cni/net.d/10-cluster.conflist": cniTemplate,
		"/etc/containerd/config.toml":        containerdTemplate,
		filepath.Join(dir, kubeletConfig):    kubeletTemplate,
		"/var/log/pods/.keep":                "",
		"/var/lib/cni/.keep":                 "",
	} {
		if strings.Contains(text, "{{") {
			var err error
			if text, err = render(text, values); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		// A symbolic link, such as resolv.conf of systemd, may lead to /run, which is empty.
		if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSymlink != 0 {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func render(text string, values any) (string, error) {
	t, err := template.New("").Option("missingkey=error").Parse(text)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	err = t.Execute(&b, values)
	return b.String(), err
}
