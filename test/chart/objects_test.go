package chart_test

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
	kubeproxyconfig "k8s.io/kube-proxy/config/v1alpha1"
	"sigs.k8s.io/yaml"

	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/test/controlplane"
)

// convert converts an object of the chart and rejects unknown fields.
func convert[T any](t *testing.T, object *unstructured.Unstructured) *T {
	t.Helper()
	typed := new(T)
	if object == nil {
		t.Fatalf("no object of the type %T", typed)
	}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(object.Object, typed, true); err != nil {
		t.Fatalf("%s %s: %v", object.GetKind(), object.GetName(), err)
	}
	return typed
}

// TestAPIServer checks that a real API server accepts all objects without unknown fields.
func TestAPIServer(t *testing.T) {
	programs, err := filepath.Abs("../../.cache/controlplane")
	if err != nil {
		t.Fatal(err)
	}
	cp := controlplane.Start(t, controlplane.Options{Programs: programs})
	client, err := dynamic.NewForConfig(cp.Config())
	if err != nil {
		t.Fatal(err)
	}
	discoverer, err := discovery.NewDiscoveryClientForConfig(cp.Config())
	if err != nil {
		t.Fatal(err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(discoverer))
	for name, set := range valueSets {
		for _, object := range render(t, plainValues(t, set)) {
			kind := object.GroupVersionKind()
			if kind.Group == "monitoring.coreos.com" {
				continue // TestMonitoring decodes them
			}
			mapping, err := mapper.RESTMapping(kind.GroupKind(), kind.Version)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			// Not by namespace: a cluster role with a namespace is a mistake.
			resource := client.Resource(mapping.Resource).Namespace(object.GetNamespace())
			_, err = resource.Create(t.Context(), object, metav1.CreateOptions{
				DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict,
			})
			if err != nil {
				t.Errorf("%s: %s %s: %v", name, kind.Kind, object.GetName(), err)
			}
		}
	}
}

// TestConfiguration checks that Fairlead accepts the arguments and the configuration without a
// warning, and that the probes use its health port.
func TestConfiguration(t *testing.T) {
	for name, set := range valueSets {
		t.Run(name, func(t *testing.T) {
			objects := render(t, plainValues(t, set))
			spec := convert[appsv1.DaemonSet](t, objects["DaemonSet fairlead"]).Spec.Template.Spec
			container := spec.Containers[0]
			mount := container.VolumeMounts[0].MountPath
			text := "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n"
			if source := spec.Volumes[0].ConfigMap.Name; source == "fairlead" {
				text = convert[corev1.ConfigMap](t, objects["ConfigMap fairlead"]).Data["config.conf"]
			} else if objects["ConfigMap fairlead"] != nil {
				t.Errorf("the pods use the ConfigMap %s, and the chart has another one", source)
			}
			file := filepath.Join(t.TempDir(), "config.conf")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			flags := config.Flags{}
			for _, arg := range container.Args[1:] {
				name, value, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
				flags[name] = strings.NewReplacer(mount+"/config.conf", file, "$(NODE_NAME)", "node").Replace(value)
			}
			delete(flags, "log-level")
			c, _, err := config.Load(flags)
			if err != nil {
				t.Fatal(err)
			}
			if len(c.Warnings) > 0 {
				t.Errorf("warnings: %v", c.Warnings)
			}
			for _, probe := range []*corev1.Probe{container.LivenessProbe, container.ReadinessProbe} {
				if port := probe.HTTPGet.Port.String(); !strings.HasSuffix(c.HealthzAddress, ":"+port) {
					t.Errorf("the probe %s uses port %s, Fairlead listens on %s", probe.HTTPGet.Path, port, c.HealthzAddress)
				}
			}
			want := append(slices.Clone(container.Args), "--init-only")
			if len(spec.InitContainers) > 0 {
				if diff := cmp.Diff(want, spec.InitContainers[0].Args); diff != "" {
					t.Errorf("arguments of the init container (-want +got):\n%s", diff)
				}
			}
		})
	}
}

// TestPlacement checks the node label and the affinity of canary nodes.
func TestPlacement(t *testing.T) {
	pod := func(set string) corev1.PodSpec {
		return convert[appsv1.DaemonSet](t, render(t, plainValues(t, set))["DaemonSet fairlead"]).Spec.Template.Spec
	}
	if got := pod("canary: {nodes: only}"); got.NodeSelector["fairlead.io/canary"] != "true" || got.Affinity != nil {
		t.Errorf("only: node selector %v, affinity %v", got.NodeSelector, got.Affinity)
	}
	if got := pod(""); len(got.NodeSelector) != 1 || got.Affinity != nil {
		t.Errorf("all: node selector %v, affinity %v", got.NodeSelector, got.Affinity)
	}
	exclude := corev1.NodeSelectorRequirement{Key: "fairlead.io/canary", Operator: corev1.NodeSelectorOpNotIn, Values: []string{"true"}}
	for set, want := range map[string][]corev1.NodeSelectorTerm{
		"canary: {nodes: except}": {{MatchExpressions: []corev1.NodeSelectorRequirement{exclude}}},
		everything: {
			{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "a", Operator: corev1.NodeSelectorOpExists}, exclude}},
			{
				MatchExpressions: []corev1.NodeSelectorRequirement{exclude},
				MatchFields:      []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{"node-1"}}},
			},
		},
	} {
		got := pod(set)
		if diff := cmp.Diff(want, got.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms); diff != "" {
			t.Errorf("%s: terms (-want +got):\n%s", set, diff)
		}
		if _, ok := got.NodeSelector["fairlead.io/canary"]; ok {
			t.Errorf("%s: node selector %v", set, got.NodeSelector)
		}
	}
}

// TestFlowOffload checks the arguments of flowOffload, and that only the init container, which loads
// modules, gets more rights.
func TestFlowOffload(t *testing.T) {
	pod := func(set string) corev1.PodSpec {
		return convert[appsv1.DaemonSet](t, render(t, plainValues(t, set))["DaemonSet fairlead"]).Spec.Template.Spec
	}
	off := pod("")
	for set, want := range map[string][]string{
		"flowOffload: off":      nil, // YAML reads it as false
		"flowOffload: 'off'":    nil,
		"flowOffload: software": {"--flow-offload=software", "--flow-offload-threshold=20"},
		"{flowOffload: hardware, flowOffloadThreshold: 2000000}":  {"--flow-offload=hardware", "--flow-offload-threshold=2000000"},
		"{flowOffload: software, setUp: {enabled: false}}":        {"--flow-offload=software", "--flow-offload-threshold=20"},
		"{flowOffload: software, extraArgs: [--log-level=debug]}": {"--flow-offload=software", "--flow-offload-threshold=20", "--log-level=debug"},
	} {
		got := pod(set)
		container := got.Containers[0]
		if diff := cmp.Diff(append(slices.Clone(off.Containers[0].Args), want...), container.Args); diff != "" {
			t.Errorf("%s: arguments (-want +got):\n%s", set, diff)
		}
		container.Args = off.Containers[0].Args
		if diff := cmp.Diff(off.Containers[0], container); diff != "" {
			t.Errorf("%s: the main container differs (-without +with):\n%s", set, diff)
		}
		var mounts []string
		for _, c := range got.InitContainers {
			for _, m := range c.VolumeMounts {
				mounts = append(mounts, m.MountPath)
			}
		}
		modules := slices.ContainsFunc(got.Volumes, func(v corev1.Volume) bool { return v.HostPath != nil && v.HostPath.Path == "/lib/modules" })
		wantModules := want != nil && len(got.InitContainers) > 0
		if modules != wantModules || slices.Contains(mounts, "/lib/modules") != wantModules {
			t.Errorf("%s: volumes %v, mounts of the init container %v", set, got.Volumes, mounts)
		}
	}
}

// TestMemoryLimit checks that GOMEMLIMIT is derived from the memory limit, if there is one.
func TestMemoryLimit(t *testing.T) {
	for set, want := range map[string]string{
		"":                                         "460MiB",
		"resources: {limits: {memory: 64Mi}}":      "57MiB",
		"resources: {limits: {memory: 2Gi}}":       "1843MiB",
		"resources: {limits: {memory: 500M}}":      "limits.memory",
		"resources: {limits: {memory: 1.5Gi}}":     "limits.memory",
		"resources: {limits: {memory: 268435456}}": "limits.memory",
		"resources: {limits: null}":                "",
		"resources: {limits: {memory: null}}":      "",
	} {
		container := convert[appsv1.DaemonSet](t, render(t, plainValues(t, set))["DaemonSet fairlead"]).Spec.Template.Spec.Containers[0]
		got := ""
		for _, e := range container.Env {
			if e.Name == "GOMEMLIMIT" {
				if got = e.Value; e.ValueFrom != nil {
					got = e.ValueFrom.ResourceFieldRef.Resource
				}
			}
		}
		if got != want {
			t.Errorf("%q: GOMEMLIMIT is %q, want %q", set, got, want)
		}
	}
}

// TestMonitoring decodes the objects of prometheus-operator with its own types and checks that
// they select Fairlead's objects.
func TestMonitoring(t *testing.T) {
	objects := render(t, plainValues(t, everything))
	pod := convert[appsv1.DaemonSet](t, objects["DaemonSet fairlead"]).Spec.Template
	service := convert[corev1.Service](t, objects["Service fairlead-metrics"])
	monitor := convert[monitoringv1.ServiceMonitor](t, objects["ServiceMonitor fairlead"])
	if service.Spec.ClusterIP != corev1.ClusterIPNone || !includes(pod.Labels, service.Spec.Selector) {
		t.Errorf("the Service has the cluster IP %q and the selector %v; the pods have the labels %v",
			service.Spec.ClusterIP, service.Spec.Selector, pod.Labels)
	}
	if !includes(service.Labels, monitor.Spec.Selector.MatchLabels) || monitor.Spec.Endpoints[0].Port != service.Spec.Ports[0].Name {
		t.Errorf("ServiceMonitor: %+v", monitor.Spec)
	}
	if job := service.Labels[monitor.Spec.JobLabel]; job != "fairlead" || monitor.Labels["release"] != "prometheus" {
		t.Errorf("ServiceMonitor: job %q, labels %v", job, monitor.Labels)
	}
	rules := convert[monitoringv1.PrometheusRule](t, objects["PrometheusRule fairlead"])
	if len(rules.Spec.Groups) == 0 || len(rules.Spec.Groups[0].Rules) == 0 {
		t.Error("no rules")
	}
	dashboard := convert[corev1.ConfigMap](t, objects["ConfigMap fairlead-dashboard"])
	want, err := os.ReadFile(filepath.Join(chartDir, "dashboards", "fairlead.json"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(dashboard.Data["fairlead.json"]) != strings.TrimSpace(string(want)) || dashboard.Labels["grafana_dashboard"] != "1" {
		t.Errorf("dashboard: %v", dashboard.ObjectMeta)
	}
	objects = render(t, plainValues(t, valueSets["pod monitor"]))
	podMonitor := convert[monitoringv1.PodMonitor](t, objects["PodMonitor fairlead"])
	pod = convert[appsv1.DaemonSet](t, objects["DaemonSet fairlead"]).Spec.Template
	if port := *podMonitor.Spec.PodMetricsEndpoints[0].Port; port != pod.Spec.Containers[0].Ports[0].Name || !includes(pod.Labels, podMonitor.Spec.Selector.MatchLabels) {
		t.Errorf("PodMonitor: %+v", podMonitor.Spec)
	}
	pod = convert[appsv1.DaemonSet](t, render(t, plainValues(t, valueSets["kube-proxy label"]))["DaemonSet fairlead"]).Spec.Template
	if pod.Labels["k8s-app"] != "kube-proxy" {
		t.Errorf("labels of the pods: %v", pod.Labels)
	}
}

// includes reports whether labels contains all of the selector.
func includes(labels, selector map[string]string) bool {
	for key, value := range selector {
		if labels[key] != value {
			return false
		}
	}
	return len(selector) > 0
}

// TestConfigurationFields checks that the schema of config has exactly the fields of kube-proxy's
// configuration.
func TestConfigurationFields(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(chartDir, "values.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var schema struct {
		Properties struct {
			Config struct{ Properties map[string]any }
		}
	}
	if err := yaml.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	got := schema.Properties.Config.Properties
	typ := reflect.TypeFor[kubeproxyconfig.KubeProxyConfiguration]()
	for i := range typ.NumField() {
		name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		if _, ok := got[name]; !ok && name != "" {
			t.Errorf("the schema lacks config.%s", name)
		}
		delete(got, name)
	}
	for name := range got {
		t.Errorf("kube-proxy's configuration does not have the field %s", name)
	}
}
