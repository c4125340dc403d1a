package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	kubejson "sigs.k8s.io/json"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
)

// readManifest decodes a YAML file below deploy.
func readManifest[T any](t *testing.T, file string) T {
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

// TestDeploy checks that the paths in the DaemonSet match Fairlead's ConfigMap and the ConfigMap of
// kubeadm's kube-proxy, which works unchanged.
func TestDeploy(t *testing.T) {
	t.Parallel()
	configMap := readManifest[struct {
		Data map[string]string `yaml:"data"`
	}](t, "config.yaml")
	set := readManifest[struct {
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
		t.Fatalf("volume mounts %v, want only the ConfigMap", container.VolumeMounts)
	}
	mountPath := container.VolumeMounts[0].MountPath
	if want := "--config=" + path.Join(mountPath, "config.conf"); !slices.Contains(container.Args, want) {
		t.Errorf("arguments %q, want %s", container.Args, want)
	}
	for name, text := range map[string]string{"config.yaml": configMap.Data["config.conf"], "kubeadm": kubeadmConfig(t)} {
		file := filepath.Join(t.TempDir(), "config.conf")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, _, err := config.Load(config.Flags{"config": file, "hostname-override": "node"})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		dir, kubeconfig := path.Split(c.API.Kubeconfig)
		if path.Clean(dir) != mountPath || configMap.Data[kubeconfig] == "" {
			t.Errorf("%s: kubeconfig path %s, want a file of the ConfigMap %v in %s", name, c.API.Kubeconfig, configMap.Data, mountPath)
		}
		if len(c.Warnings) > 0 {
			t.Errorf("%s: warnings %v", name, c.Warnings)
		}
	}
}

// decodeDaemonSet decodes a DaemonSet from JSON and rejects unknown fields.
func decodeDaemonSet(t *testing.T, text []byte) appsv1.DaemonSet {
	t.Helper()
	var set appsv1.DaemonSet
	strict, err := kubejson.UnmarshalStrict(text, &set)
	if err := errors.Join(append(strict, err)...); err != nil {
		t.Fatal(err)
	}
	return set
}

// TestDeployIPVS applies the patch of the ipvs component as kustomize does. In both modes, a
// privileged init container performs the initialization; the main container has the same privileges
// as in nft mode.
func TestDeployIPVS(t *testing.T) {
	t.Parallel()
	component := readManifest[struct {
		Kind    string
		Patches []struct{ Path string }
	}](t, "ipvs/kustomization.yaml")
	if component.Kind != "Component" || len(component.Patches) != 1 || component.Patches[0].Path != "daemonset.yaml" {
		t.Errorf("kustomization: %+v", component)
	}
	var texts [2][]byte
	for i, file := range []string{"daemonset.yaml", "ipvs/daemonset.yaml"} {
		var err error
		if texts[i], err = json.Marshal(readManifest[map[string]any](t, file)); err != nil {
			t.Fatal(err)
		}
	}
	patched, err := strategicpatch.StrategicMergePatch(texts[0], texts[1], appsv1.DaemonSet{})
	if err != nil {
		t.Fatal(err)
	}
	base, set := decodeDaemonSet(t, texts[0]), decodeDaemonSet(t, patched)
	spec := &set.Spec.Template.Spec
	if len(spec.Containers) != 1 || len(spec.InitContainers) != 1 {
		t.Fatalf("%d containers and %d init containers, want one of each", len(spec.Containers), len(spec.InitContainers))
	}
	setUp, want := spec.InitContainers[0], base.Spec.Template.Spec.Containers[0]
	baseSpec := base.Spec.Template.Spec
	if diff := cmp.Diff(append(slices.Clone(want.Args), "--init-only"), baseSpec.InitContainers[0].Args); diff != "" || len(baseSpec.InitContainers) != 1 {
		t.Errorf("arguments of the init container without the component (-want +got):\n%s", diff)
	}
	want.Args = append(slices.Clone(want.Args), "--mode=ipvs")
	if diff := cmp.Diff(want, spec.Containers[0]); diff != "" {
		t.Errorf("main container (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(append(slices.Clone(want.Args), "--init-only"), setUp.Args); diff != "" {
		t.Errorf("arguments of %s (-want +got):\n%s", setUp.Name, diff)
	}
	// GOMEMLIMIT, the second variable, has no use in a container without a limit.
	if setUp.Image != want.Image || !cmp.Equal(want.Env[:1], setUp.Env) {
		t.Errorf("%s: image %s, environment %v; want the main container's image and node name", setUp.Name, setUp.Image, setUp.Env)
	}
	if !*setUp.SecurityContext.Privileged {
		t.Errorf("%s is not privileged: it cannot load modules or write to /proc/sys", setUp.Name)
	}
	files := want.VolumeMounts[0]
	modules := corev1.VolumeMount{Name: "modules", MountPath: "/lib/modules", ReadOnly: true}
	if diff := cmp.Diff([]corev1.VolumeMount{modules, files}, setUp.VolumeMounts); diff != "" {
		t.Errorf("volume mounts of %s (-want +got):\n%s", setUp.Name, diff)
	}
	volumes := map[string]corev1.Volume{}
	for _, v := range spec.Volumes {
		volumes[v.Name] = v
	}
	if len(volumes) != 2 || volumes["modules"].HostPath == nil || volumes["modules"].HostPath.Path != "/lib/modules" || volumes["config"].ConfigMap == nil {
		t.Errorf("volumes: %+v", spec.Volumes)
	}
	// Configuration files for this DaemonSet have no mode, or the mode of the flag.
	for name, text := range map[string]string{"kubeadm": kubeadmConfig(t), "ipvs mode": configHeader + "mode: ipvs\n"} {
		c, _, err := config.Load(config.Flags{"config": writeConfigFile(t, text), "hostname-override": "node", "mode": "ipvs"})
		if err != nil || c.Mode != backend.IPVS || len(c.Warnings) > 0 {
			t.Errorf("%s: mode %s, warnings %v, error %v", name, c.Mode, c.Warnings, err)
		}
	}
}
