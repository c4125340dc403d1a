//go:build e2e

package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
)

// documents returns the objects in a file of deploy.
func documents(t *testing.T, file string) []*unstructured.Unstructured {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, "deploy", file))
	if err != nil {
		t.Fatal(err)
	}
	var objects []*unstructured.Unstructured
	for document := range bytes.SplitSeq(data, []byte("\n---\n")) {
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(document, &object.Object); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		objects = append(objects, object)
	}
	return objects
}

// resources returns the files that deploy/kustomization.yaml lists.
func resources(t *testing.T) []string {
	t.Helper()
	files, _, err := unstructured.NestedStringSlice(documents(t, "kustomization.yaml")[0].Object, "resources")
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// The API server takes every object of deploy as it is, and knows each field.
func TestManifestsAreValid(t *testing.T) {
	t.Parallel()
	client, err := dynamic.NewForConfig(shared.cp.Config())
	if err != nil {
		t.Fatal(err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(shared.api.Discovery()))
	var all []string
	entries, err := filepath.Glob(filepath.Join(root, "deploy", "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range entries {
		if file := filepath.Base(path); file != "kustomization.yaml" {
			all = append(all, file)
		}
	}
	listed := slices.Sorted(slices.Values(resources(t)))
	if diff := cmp.Diff(all, listed); diff != "" {
		t.Errorf("files in deploy and those that kustomization.yaml lists (-files +listed):\n%s", diff)
	}
	for _, file := range listed {
		for _, object := range documents(t, file) {
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

// daemonSet returns the one of deploy/daemonset.yaml.
func daemonSet(t *testing.T) *appsv1.DaemonSet {
	t.Helper()
	set := &appsv1.DaemonSet{}
	object := documents(t, "daemonset.yaml")[0].Object
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object, set); err != nil {
		t.Fatal(err)
	}
	return set
}

// Fairlead knows the flags that the DaemonSet gives it.
func TestManifestsFlags(t *testing.T) {
	t.Parallel()
	args := daemonSet(t).Spec.Template.Spec.Containers[0].Args
	help := exec.CommandContext(t.Context(), shared.lead.binary, append(slices.Clone(args), "--help")...)
	if out, err := help.CombinedOutput(); err != nil {
		t.Errorf("fairlead %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// Fairlead says that it is well where the DaemonSet's probes ask.
func TestProbes(t *testing.T) {
	t.Parallel()
	s := newScenario(t, shared)
	container := daemonSet(t).Spec.Template.Spec.Containers[0]
	for _, path := range []string{container.LivenessProbe.HTTPGet.Path, container.ReadinessProbe.HTTPGet.Path} {
		s.eventually(func(ctx context.Context) error {
			_, err := s.lead.get(ctx, healthzAddr, path)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			return nil
		})
	}
}
