package chart_test

import (
	"flag"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/loader"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	"helm.sh/helm/v4/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the plain manifests in deploy")

const (
	deployDir   = "../../deploy"
	chartDir    = deployDir + "/chart/fairlead"
	releaseName = "fairlead"
	namespace   = "kube-system"
)

// plainValues returns the values of the plain manifests, changed by set, a YAML document.
func plainValues(t *testing.T, set string) map[string]any {
	t.Helper()
	text, err := os.ReadFile("testdata/manifests.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var values, changes map[string]any
	if err := yaml.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal([]byte(set), &changes); err != nil {
		t.Fatal(err)
	}
	merge(values, changes)
	return values
}

// merge sets the values of changes in values.
func merge(values, changes map[string]any) {
	for key, change := range changes {
		value, ok := values[key].(map[string]any)
		if c, isMap := change.(map[string]any); ok && isMap {
			merge(value, c)
			continue
		}
		values[key] = change
	}
}

// renderFiles renders the chart. The keys of the result are names of files in templates.
func renderFiles(values map[string]any) (map[string]string, error) {
	chart, err := loader.Load(chartDir)
	if err != nil {
		return nil, err
	}
	options := common.ReleaseOptions{Name: releaseName, Namespace: namespace, IsInstall: true, Revision: 1}
	all, err := util.ToRenderValues(chart, values, options, nil)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(chart, all)
	if err != nil {
		return nil, err
	}
	rendered := map[string]string{}
	for name, text := range files {
		rendered[path.Base(name)] = text
	}
	return rendered, nil
}

// render returns the objects of the chart, by kind and name.
func render(t *testing.T, values map[string]any) map[string]*unstructured.Unstructured {
	t.Helper()
	files, err := renderFiles(values)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for name, file := range files {
		if strings.HasSuffix(name, ".yaml") {
			text.WriteString("---\n" + file + "\n")
		}
	}
	return decode(t, text.String())
}

// decode returns the objects of a stream of YAML documents, by kind and name.
func decode(t *testing.T, text string) map[string]*unstructured.Unstructured {
	t.Helper()
	objects := map[string]*unstructured.Unstructured{}
	for document := range strings.SplitSeq(text, "---\n") {
		object := &unstructured.Unstructured{}
		if err := yaml.UnmarshalStrict([]byte(document), &object.Object); err != nil {
			t.Fatalf("%v:\n%s", err, document)
		}
		if len(object.Object) > 0 {
			objects[object.GetKind()+" "+object.GetName()] = object
		}
	}
	return objects
}

// helmLabels are the labels that only an installation by Helm has.
var helmLabels = regexp.MustCompile(`(?m)^ +(helm\.sh/chart|app\.kubernetes\.io/(managed-by|version)): .*\n`)

// TestManifests checks that the plain manifests are equal to what the chart renders. With
// -update, it writes them.
func TestManifests(t *testing.T) {
	files, err := renderFiles(plainValues(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	const header = "# Rendered by `make manifests` from chart/fairlead/templates/"
	for _, name := range []string{"rbac.yaml", "config.yaml", "daemonset.yaml"} {
		want := header + name + ". Edit the chart.\n" + strings.TrimSpace(helmLabels.ReplaceAllString(files[name], "")) + "\n"
		file := filepath.Join(deployDir, name)
		if *update {
			if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("%s: run `make manifests` (-chart +file):\n%s", file, diff)
		}
	}
}

// kustomize builds a copy of deploy with the given components, as `kubectl kustomize` does.
func kustomize(t *testing.T, components ...string) map[string]*unstructured.Unstructured {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(deployDir)); err != nil {
		t.Fatal(err)
	}
	if len(components) > 0 {
		file := filepath.Join(dir, "kustomization.yaml")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, "components: ["+strings.Join(components, ", ")+"]\n"...)
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := built.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, string(text))
}

// TestKustomize checks that each component changes the manifests as the value of the chart does.
func TestKustomize(t *testing.T) {
	for _, tc := range []struct {
		components []string
		values     string
	}{
		{nil, ""},
		{[]string{"ipvs"}, "mode: ipvs"},
		{[]string{"flow-offload"}, "flowOffload: software"},
		{[]string{"canary"}, "canary: {nodes: only}"},
		{[]string{"ipvs", "canary"}, "{mode: ipvs, canary: {nodes: only}}"},
		{[]string{"flow-offload", "canary"}, "{flowOffload: software, canary: {nodes: only}}"},
	} {
		want := render(t, plainValues(t, tc.values))
		// A component cannot change a field in config.conf.
		want["ConfigMap fairlead"] = render(t, plainValues(t, ""))["ConfigMap fairlead"]
		for _, object := range want {
			labels := object.GetLabels()
			for _, label := range []string{"helm.sh/chart", "app.kubernetes.io/managed-by", "app.kubernetes.io/version"} {
				delete(labels, label)
			}
			object.SetLabels(labels)
		}
		if diff := cmp.Diff(contents(want), contents(kustomize(t, tc.components...))); diff != "" {
			t.Errorf("components %v, values %q (-chart +kustomize):\n%s", tc.components, tc.values, diff)
		}
	}
}

// contents returns the content of each object, with volumes and mounts sorted by name, because
// kustomize puts new ones first.
func contents(objects map[string]*unstructured.Unstructured) map[string]any {
	all := map[string]any{}
	for name, object := range objects {
		all[name] = sortByName(object.Object)
	}
	return all
}

func sortByName(value any) any {
	switch v := value.(type) {
	case map[string]any:
		for key, element := range v {
			v[key] = sortByName(element)
		}
	case []any:
		for i, element := range v {
			v[i] = sortByName(element)
		}
		name := func(element any) string {
			m, _ := element.(map[string]any)
			s, _ := m["name"].(string)
			return s
		}
		slices.SortStableFunc(v, func(a, b any) int { return strings.Compare(name(a), name(b)) })
	}
	return value
}

// TestLint runs the checks of `helm lint`.
func TestLint(t *testing.T) {
	for _, message := range lint.RunAll(chartDir, plainValues(t, everything), namespace).Messages {
		if message.Severity > support.InfoSev {
			t.Error(message)
		}
	}
}

// everything turns on all optional objects that can be used together.
const everything = `
config: {metricsBindAddress: "0.0.0.0:10249"}
serviceMonitor: {enabled: true, interval: 30s, labels: {release: prometheus}}
prometheusRule: {enabled: true, labels: {release: prometheus}}
dashboard: {enabled: true, annotations: {grafana_folder: Network}}
imagePullSecrets: [{name: registry}]
podAnnotations: {example.com/team: network}
labels: {example.com/team: network}
extraArgs: [--log-level=debug]
affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}, {matchFields: [{key: metadata.name, operator: In, values: [node-1]}]}]}}}
canary: {nodes: except}
`

// valueSets are values that install successfully, by name.
var valueSets = map[string]string{
	"plain":             "",
	"everything":        everything,
	"pod monitor":       `{config: {metricsBindAddress: "0.0.0.0:10249"}, podMonitor: {enabled: true}}`,
	"mode ipvs":         "mode: ipvs",
	"flow offload":      "{flowOffload: hardware, flowOffloadThreshold: 2000000}",
	"no flow offload":   "{mode: ipvs, flowOffload: off}",
	"no init container": "{setUp: {enabled: false}, mode: ipvs, config: {conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}}",
	"canary nodes":      "canary: {nodes: only}",
	"other nodes":       "canary: {nodes: except}",
	"one Service":       "serviceProxyName: fairlead",
	"kube-proxy label":  `{config: {metricsBindAddress: "0.0.0.0:10249"}, podLabels: {k8s-app: kube-proxy}}`,
	"kubeadm ConfigMap": "{existingConfigMap: kube-proxy, apiServer: ''}",
	"digest":            "image: {digest: 'sha256:" + strings.Repeat("0", 64) + "'}",
	"parent chart":      "global: {imageRegistry: example.com}",
	"no limits":         "resources: {limits: null}",
}

// TestErrors checks that wrong values cause an error that names the value.
func TestErrors(t *testing.T) {
	for set, want := range map[string]string{
		"tolerationz: []":                                                "additional properties 'tolerationz' not allowed",
		"config: {clusterCidr: 10.0.0.0/8}":                              "additional properties 'clusterCidr' not allowed",
		"config: {healthzBindAddress: 0.0.0.0}":                          "at '/config/healthzBindAddress'",
		"mode: iptables":                                                 "at '/mode': value must be one of 'nft', 'ipvs'",
		"flowOffload: always":                                            "at '/flowOffload': value must be one of 'off', 'software', 'hardware', false",
		"flowOffloadThreshold: 0":                                        "at '/flowOffloadThreshold': minimum: got 0, want 1",
		"{mode: ipvs, flowOffload: software}":                            "flowOffload=software requires mode=nft",
		"image: {digest: abc}":                                           "at '/image/digest'",
		"podLabels: {app.kubernetes.io/name: other}":                     "invalid propertyName 'app.kubernetes.io/name'",
		"extraArgs: [run]":                                               "at '/extraArgs/0'",
		"image: {repository: ''}":                                        "image.repository is empty",
		"apiServer: ''":                                                  "apiServer is empty",
		"{existingConfigMap: kube-proxy, serviceProxyName: fairlead}":    "existingConfigMap cannot be used with serviceProxyName",
		"serviceMonitor: {enabled: true}":                                "config.metricsBindAddress is 127.0.0.1:10249, which Prometheus cannot reach from a pod: set it to 0.0.0.0:10249",
		"{serviceProxyName: a, podMonitor: {enabled: true}}":             "set it to 0.0.0.0:10259",
		"podLabels: {k8s-app: kube-proxy}":                               "config.metricsBindAddress is 127.0.0.1:10249",
		"{serviceMonitor: {enabled: true}, podMonitor: {enabled: true}}": "serviceMonitor.enabled and podMonitor.enabled are both true",
		"{config: {metricsBindAddress: ':10249'}, podMonitor: {enabled: true}, updateStrategy: {rollingUpdate: {maxSurge: 1}}}": "maxSurge cannot be used with podMonitor.enabled",
	} {
		if _, err := renderFiles(plainValues(t, set)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", set, err, want)
		}
	}
}

// TestValuesDocumented checks that values.yaml has exactly the names in the schema.
func TestValuesDocumented(t *testing.T) {
	var values map[string]any
	var schema struct{ Properties map[string]any }
	text, err := os.ReadFile(filepath.Join(chartDir, "values.yaml"))
	if err == nil {
		err = yaml.UnmarshalStrict(text, &values)
	}
	if err != nil {
		t.Fatal(err)
	}
	schemaText, err := os.ReadFile(filepath.Join(chartDir, "values.schema.json"))
	if err == nil {
		err = yaml.Unmarshal(schemaText, &schema)
	}
	if err != nil {
		t.Fatal(err)
	}
	delete(schema.Properties, "global")
	want := slices.Sorted(maps.Keys(schema.Properties))
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(values))); diff != "" {
		t.Errorf("values (-schema +values.yaml):\n%s", diff)
	}
}
