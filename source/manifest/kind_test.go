package manifest

import (
	"testing"
)

// TestRunKeepsObjectsWithMisspelledKind checks that a misspelled kind is not treated as an
// unsupported kind, which would delete the last valid version of the object.
func TestRunKeepsObjectsWithMisspelledKind(t *testing.T) {
	t.Parallel()
	slice := func(apiVersion, kind string) string {
		return "apiVersion: " + apiVersion + "\nkind: " + kind + "\nmetadata: {name: s, labels: {kubernetes.io/service-name: web}}\n" +
			"addressType: IPv4\nendpoints: [{addresses: [10.0.0.9]}]\nports: [{port: 8080}]\n---\n"
	}
	web := "metadata: {name: web}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80, targetPort: 8080}]}\n---\n"
	good := "apiVersion: v1\nkind: Service\n" + web + slice("discovery.k8s.io/v1", "EndpointSlice")
	for _, tt := range []struct{ name, text, log string }{
		{
			name: "a missing letter",
			text: "apiVersion: v1\nkind: Servce\n" + web + slice("discovery.k8s.io/v1", "EndpointSlice"),
			log:  `a.yaml:2: kind: \"Servce\" is not a kind: did you mean Service?`,
		},
		{
			name: "lower case",
			text: "apiVersion: v1\nkind: service\n" + web + slice("discovery.k8s.io/v1", "EndpointSlice"),
			log:  `a.yaml:2: kind: \"service\" is not a kind: did you mean Service?`,
		},
		{
			name: "a wrong group",
			text: "apiVersion: v1\nkind: Service\n" + web + slice("discovery/v1", "EndpointSlice"),
			log:  `a.yaml:6: apiVersion: \"discovery/v1\" is not a supported version of EndpointSlice: use discovery.k8s.io/v1`,
		},
		{
			name: "a group instead of none",
			text: "apiVersion: core/v1\nkind: Service\n" + web + slice("discovery.k8s.io/v1", "EndpointSlice"),
			log:  `a.yaml:1: apiVersion: \"core/v1\" is not a supported version of Service: use v1`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := startSource(t, writeFolder(t, "a.yaml", good+serviceYAML("db", "clusterIP: 10.96.0.9")))
			w.firstDelta()
			// The object is identified, so that other objects of the file can be deleted.
			writeFile(t, w.dir, "a.yaml", tt.text)
			w.expectDeltas("deletion of only the removed object", "default/db deleted")
			w.expectLog(tt.log)
			writeFile(t, w.dir, "a.yaml", "apiVersion: v1\nkind: ConfigMap\n---\n"+serviceYAML("db", "clusterIP: 10.96.0.9"))
			w.expectDeltas("objects of other kinds instead", "default/web deleted", "default/s slice deleted", db1)
		})
	}
}

// TestSkippedKinds checks that kinds of Kubernetes and others are skipped with a warning,
// even if their names are similar to supported ones.
func TestSkippedKinds(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ apiVersion, kind string }{
		{"v1", "Node"},
		{"batch/v1", "Job"},
		{"v1", "Secret"},
		{"v1", "Event"},
		{"v1", "PodList"},
		{"v1", "ServiceList"},
		{"v1", "Endpoints"},
		{"v1", "PodTemplate"},
		{"v1", "ServiceAccount"},
		{"v1", "Binding"},
		{"v1", "Namespace"},
		{"rbac.authorization.k8s.io/v1", "Role"},
		{"networking.k8s.io/v1", "Ingress"},
		{"networking.k8s.io/v1", "ServiceCIDR"},
		{"coordination.k8s.io/v1", "Lease"},
		{"apiregistration.k8s.io/v1", "APIService"},
		{"batch/v1", "CronJob"},
		{"discovery.k8s.io/v1", "EndpointSliceList"},
		{"apps/v1", "Deployment"},
		{"policy/v1", "PodDisruptionBudget"},
		{"serving.knative.dev/v1", "Service"},
		{"getambassador.io/v2", "Host"},
		{"example.com/v1", "Device"},
		{"example.com/v1", "Pool"},
		{"cluster.x-k8s.io/v1", "Pods"},
	} {
		p := parseFile("a.yaml", []byte("apiVersion: "+tt.apiVersion+"\nkind: "+tt.kind+"\nmetadata: {name: x}\n"))
		if len(p.errs) > 0 || len(p.skipped) != 1 || len(p.invalid) > 0 || p.unidentified {
			t.Errorf("%s %s: errors %v, skipped %v, want it skipped", tt.apiVersion, tt.kind, p.errs, p.skipped)
		}
	}
}
