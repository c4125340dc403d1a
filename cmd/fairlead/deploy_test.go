package main

import (
	"bytes"
	"os"
	"path"
	"path/filepath"
	"slices"
	"testing"

	"go.yaml.in/yaml/v3"
)

// manifestOf reads a file of deploy.
func manifestOf[T any](t *testing.T, file string) T {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "deploy", file))
	if err != nil {
		t.Fatal(err)
	}
	var object T
	if err := yaml.NewDecoder(bytes.NewReader(data)).Decode(&object); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return object
}

// The DaemonSet has everything where its ConfigMap says it is, and where that of
// kubeadm's kube-proxy says it is, which may be taken as it is.
func TestDeploy(t *testing.T) {
	t.Parallel()
	configMap := manifestOf[struct {
		Data map[string]string `yaml:"data"`
	}](t, "config.yaml")
	set := manifestOf[struct {
		Spec struct {
			Template struct {
				Spec struct {
					Containers []struct {
						Args         []string `yaml:"args"`
						VolumeMounts []struct {
							Name      string `yaml:"name"`
							MountPath string `yaml:"mountPath"`
						} `yaml:"volumeMounts"`
					} `yaml:"containers"`
				} `yaml:"spec"`
			} `yaml:"template"`
		} `yaml:"spec"`
	}](t, "daemonset.yaml")
	container := set.Spec.Template.Spec.Containers[0]
	if len(container.VolumeMounts) != 1 {
		t.Fatalf("volumes: %v, want the ConfigMap's", container.VolumeMounts)
	}
	mounted := container.VolumeMounts[0].MountPath
	if want := "--config=" + path.Join(mounted, "config.conf"); !slices.Contains(container.Args, want) {
		t.Errorf("arguments %q, want %s", container.Args, want)
	}
	for name, text := range map[string]string{"config.yaml": configMap.Data["config.conf"], "kubeadm's": kubeadmConfig} {
		file := filepath.Join(t.TempDir(), "config.conf")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, _, err := load(given{"config": file, "hostname-override": "node"})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		dir, kubeconfig := path.Split(c.api.kubeconfig)
		if path.Clean(dir) != mounted || configMap.Data[kubeconfig] == "" {
			t.Errorf("%s: the kubeconfig is at %s, and the ConfigMap, whose files are %v, at %s", name, c.api.kubeconfig, configMap.Data, mounted)
		}
		if len(c.notes) > 0 {
			t.Errorf("%s: notes %v", name, c.notes)
		}
	}
}
