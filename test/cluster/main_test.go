package main

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"fairlead.io/fairlead/test/cluster/internal/addons"
	"fairlead.io/fairlead/test/cluster/internal/conformance"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

const root = "../.."

// TestFullValues checks that the chart accepts the values for all tests.
func TestFullValues(t *testing.T) {
	t.Parallel()
	_, err := addons.All(&topology.Cluster{
		Nodes: 1, Zones: 1, Proxy: topology.Fairlead, Mode: "nft", Values: fullValues, Chart: filepath.Join(root, "deploy/chart/fairlead"),
	})
	if err != nil {
		t.Error(err)
	}
}

// TestOldest checks that the oldest release of Kubernetes in the document is the oldest that the
// chart allows.
func TestOldest(t *testing.T) {
	t.Parallel()
	for file, pattern := range map[string]string{
		"deploy/chart/fairlead/Chart.yaml":                          `(?m)^kubeVersion: ">=` + conformance.Oldest + `\.0-0"$`,
		"test/cluster/kubernetes-" + conformance.Oldest + "/go.mod": `(?m)k8s\.io/kubernetes v` + conformance.Oldest + `\.`,
	} {
		text, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		if !regexp.MustCompile(pattern).Match(text) {
			t.Errorf("%s does not match %s", file, pattern)
		}
	}
}

// TestVersions checks that the control plane, kube-proxy, the nodes and the tests have the same
// version of Kubernetes.
func TestVersions(t *testing.T) {
	t.Parallel()
	want := ""
	for _, file := range []string{"test/e2e/kubernetes/go.mod", "bench/kubeproxy/go.mod", "test/cluster/kubernetes/go.mod"} {
		text, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		match := regexp.MustCompile(`(?m)k8s\.io/kubernetes (v\S+)`).FindSubmatch(text)
		if match == nil {
			t.Fatalf("%s: no version of k8s.io/kubernetes", file)
		}
		got := string(match[1])
		if want == "" {
			want = got
		}
		if got != want {
			t.Errorf("%s: Kubernetes %s, want %s", file, got, want)
		}
	}
}
