//go:build e2e

package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
)

// readManifest returns the objects in a file of the directory deploy.
func readManifest(file string) ([]*unstructured.Unstructured, error) {
	data, err := os.ReadFile(filepath.Join(moduleRoot, "deploy", file))
	if err != nil {
		return nil, err
	}
	var objects []*unstructured.Unstructured
	for document := range bytes.SplitSeq(data, []byte("\n---\n")) {
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(document, &object.Object); err != nil {
			return nil, fmt.Errorf("deploy/%s: %w", file, err)
		}
		objects = append(objects, object)
	}
	return objects, nil
}

// decodeManifest returns the first object in a file of the directory deploy.
func decodeManifest[T any](file string) (*T, error) {
	objects, err := readManifest(file)
	if err != nil {
		return nil, err
	}
	object := new(T)
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(objects[0].Object, object); err != nil {
		return nil, fmt.Errorf("deploy/%s: %w", file, err)
	}
	return object, nil
}

// configMountPath is where the DaemonSet mounts the ConfigMap. configFile is the key of the
// configuration in it.
const (
	configMountPath = "/var/lib/kube-proxy"
	configFile      = "config.conf"
)

// daemonSetArgs returns Fairlead's arguments in the DaemonSet. It writes the configuration of
// the ConfigMap to dir; only the pod networks, the connection to the API server and
// conntrack.maxPerCore differ.
func daemonSetArgs(dir string, podCIDRs string) ([]string, error) {
	configMap, err := decodeManifest[corev1.ConfigMap]("config.yaml")
	if err != nil {
		return nil, err
	}
	var config map[string]any
	text := strings.ReplaceAll(configMap.Data[configFile], configMountPath, dir)
	if err := yaml.Unmarshal([]byte(text), &config); err != nil {
		return nil, fmt.Errorf("deploy/config.yaml: config.conf: %w", err)
	}
	config["clusterCIDR"] = podCIDRs
	config["conntrack"] = map[string]any{"maxPerCore": 0} // the maximum belongs to the host
	if err := os.WriteFile(filepath.Join(dir, configFile), patch(config), 0o600); err != nil {
		return nil, err
	}
	set, err := decodeManifest[appsv1.DaemonSet]("daemonset.yaml")
	if err != nil {
		return nil, err
	}
	var args []string
	for _, arg := range set.Spec.Template.Spec.Containers[0].Args {
		args = append(args, strings.NewReplacer(configMountPath, dir, "$(NODE_NAME)", thisNode).Replace(arg))
	}
	return args, nil
}

// TestManifestsValid checks that the API server accepts every object in deploy without
// unknown fields.
func TestManifestsValid(t *testing.T) {
	t.Parallel()
	client, err := dynamic.NewForConfig(sharedCluster.cp.Config())
	if err != nil {
		t.Fatal(err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(sharedCluster.api.Discovery()))
	var all []string
	entries, err := filepath.Glob(filepath.Join(moduleRoot, "deploy", "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range entries {
		if file := filepath.Base(path); file != "kustomization.yaml" {
			all = append(all, file)
		}
	}
	kustomization, err := readManifest("kustomization.yaml")
	if err != nil {
		t.Fatal(err)
	}
	listed, _, err := unstructured.NestedStringSlice(kustomization[0].Object, "resources")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(listed)
	if diff := cmp.Diff(all, listed); diff != "" {
		t.Errorf("files in deploy and resources in kustomization.yaml (-files +resources):\n%s", diff)
	}
	for _, file := range listed {
		objects, err := readManifest(file)
		if err != nil {
			t.Error(err)
		}
		for _, object := range objects {
			kind := object.GroupVersionKind()
			mapping, err := mapper.RESTMapping(kind.GroupKind(), kind.Version)
			if err != nil {
				t.Errorf("%s: %v", file, err)
				continue
			}
			data, err := object.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			var in dynamic.ResourceInterface = client.Resource(mapping.Resource)
			if namespace := object.GetNamespace(); namespace != "" {
				in = client.Resource(mapping.Resource).Namespace(namespace)
			}
			_, err = in.Patch(t.Context(), object.GetName(), "application/apply-patch+yaml", data, metav1.PatchOptions{
				FieldManager: "test", Force: new(true), DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict,
			})
			if err != nil {
				t.Errorf("%s: %s %s: %v", file, kind.Kind, object.GetName(), err)
			}
		}
	}
}

// TestProbes checks that the paths of the DaemonSet's probes report a healthy Fairlead.
func TestProbes(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	set, err := decodeManifest[appsv1.DaemonSet]("daemonset.yaml")
	s.must(err)
	container := set.Spec.Template.Spec.Containers[0]
	for _, path := range []string{container.LivenessProbe.HTTPGet.Path, container.ReadinessProbe.HTTPGet.Path} {
		s.eventually(func(ctx context.Context) error {
			_, err := s.fairlead.get(ctx, healthzAddr, path)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			return nil
		})
	}
}
