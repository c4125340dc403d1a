package addons

import (
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// TestAll checks that the manifests and the chart are valid, and that every cluster has exactly
// one Service proxy.
func TestAll(t *testing.T) {
	t.Parallel()
	dns := []string{"ClusterRole coredns", "ClusterRoleBinding coredns", "ConfigMap coredns", "Deployment coredns", "Service kube-dns", "ServiceAccount coredns"}
	for _, tc := range []struct {
		proxy, mode string
		want        []string
	}{
		{topology.NoProxy, "", nil},
		{topology.KubeProxy, "nftables", []string{
			"ClusterRoleBinding kubeadm:node-proxier", "ConfigMap kube-proxy", "DaemonSet kube-proxy", "ServiceAccount kube-proxy",
		}},
		{topology.Fairlead, "nft", []string{
			"ClusterRole fairlead", "ClusterRoleBinding fairlead", "ConfigMap fairlead", "DaemonSet fairlead", "ServiceAccount fairlead",
		}},
		{topology.Fairlead, "ipvs", []string{
			"ClusterRole fairlead", "ClusterRoleBinding fairlead", "ConfigMap fairlead", "DaemonSet fairlead", "ServiceAccount fairlead",
		}},
	} {
		cluster := &topology.Cluster{Nodes: 1, Zones: 1, Proxy: tc.proxy, Mode: tc.mode, Chart: "../../../../deploy/chart/fairlead"}
		objects, err := All(cluster)
		if err != nil {
			t.Fatalf("%s %s: %v", tc.proxy, tc.mode, err)
		}
		names := map[string]*unstructured.Unstructured{}
		for _, o := range objects {
			names[o.GetKind()+" "+o.GetName()] = o
		}
		want := slices.Sorted(slices.Values(slices.Concat(dns, tc.want)))
		if diff := cmp.Diff(want, slices.Sorted(maps.Keys(names))); diff != "" {
			t.Errorf("%s %s: objects (-want +got):\n%s", tc.proxy, tc.mode, diff)
		}
		if address, _, _ := unstructured.NestedString(names["Service kube-dns"].Object, "spec", "clusterIP"); address != topology.DNS().String() {
			t.Errorf("address of the DNS Service %s, want %s", address, topology.DNS())
		}
	}
}

func TestValues(t *testing.T) {
	t.Parallel()
	values, err := chartValues(&topology.Cluster{
		Proxy: topology.Fairlead, Mode: "ipvs", Values: `{config: {nodePortAddresses: [primary]}, podLabels: {a: b}}`,
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"image":     map[string]any{"repository": "docker.io/library/fairlead", "tag": "latest"},
		"apiServer": "https://172.30.0.1:6443",
		"config":    map[string]any{"clusterCIDR": "10.244.0.0/16,fd00:10:244::/56", "nodePortAddresses": []any{"primary"}},
		"mode":      "ipvs",
		"podLabels": map[string]any{"a": "b"},
	}
	if diff := cmp.Diff(want, values); diff != "" {
		t.Errorf("values (-want +got):\n%s", diff)
	}
}
