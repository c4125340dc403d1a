package manifest

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"fairlead.io/fairlead/kube"
)

var updateGolden = flag.Bool("update", false, "update golden files in testdata")

var (
	cidr4    = netip.MustParsePrefix("10.96.0.0/16")
	cidr6    = netip.MustParsePrefix("fd00:10:96::/112")
	oneCIDR  = []netip.Prefix{cidr4}
	bothCIDR = []netip.Prefix{cidr4, cidr6}
)

// writeFolder writes files, given as pairs of name and text, to a new folder.
func writeFolder(t testing.TB, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		writeFile(t, dir, files[i], files[i+1])
	}
	return dir
}

func writeFile(t testing.TB, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// summarize returns a line for each object of a Delta:
//
//	default/web ClusterIP 10.96.0.1 http:80->8080/TCP
//	default/web IPv4 http:8080/TCP 10.0.0.1(node,ready) 10.0.0.2
func summarize(d kube.Delta) []string {
	var lines []string
	for _, svc := range d.Services {
		words := []string{svc.Namespace + "/" + svc.Name, string(svc.Spec.Type), strings.Join(svc.Spec.ClusterIPs, ",")}
		for _, p := range svc.Spec.Ports {
			words = append(words, p.Name+":"+itoa(p.Port)+"->"+p.TargetPort.String()+"/"+string(p.Protocol))
		}
		if scheduler, ok := svc.Annotations[kube.AnnotationIPVSScheduler]; ok {
			words = append(words, "scheduler="+scheduler)
		}
		lines = append(lines, strings.Join(words, " "))
	}
	for _, slice := range d.EndpointSlices {
		words := []string{slice.Namespace + "/" + slice.Labels[discoveryv1.LabelServiceName], string(slice.AddressType)}
		for _, p := range slice.Ports {
			words = append(words, *p.Name+":"+itoa(*p.Port)+"/"+string(*p.Protocol))
		}
		for _, ep := range slice.Endpoints {
			words = append(words, ep.Addresses[0]+conditionText(ep))
		}
		if _, ok := slice.Labels[corev1.IsHeadlessService]; ok {
			words = append(words, "headless")
		}
		lines = append(lines, strings.Join(words, " "))
	}
	for _, name := range d.DeletedServices {
		lines = append(lines, name.String()+" deleted")
	}
	for _, name := range d.DeletedEndpointSlices {
		lines = append(lines, name.String()+" slice deleted")
	}
	return lines
}

func conditionText(ep discoveryv1.Endpoint) string {
	var words []string
	if ep.NodeName != nil {
		words = append(words, *ep.NodeName)
	}
	if ep.Hostname != nil {
		words = append(words, "host="+*ep.Hostname)
	}
	for _, c := range []struct {
		name  string
		value *bool
	}{{"ready", ep.Conditions.Ready}, {"serving", ep.Conditions.Serving}, {"terminating", ep.Conditions.Terminating}} {
		if c.value != nil && *c.value {
			words = append(words, c.name)
		}
	}
	return "(" + strings.Join(words, ",") + ")"
}

func itoa(n int32) string { return strconv.Itoa(int(n)) }

// podYAML returns a pod with the label app and a port http, 8080/TCP.
func podYAML(name, app, ip, more string) string {
	return `
apiVersion: v1
kind: Pod
metadata:
  name: ` + name + `
  labels: {app: ` + app + `}
spec:
  containers:
  - name: main
    image: example
    ports: [{name: http, containerPort: 8080}]
status:
  podIP: ` + ip + `
` + more + "\n---\n"
}

// serviceYAML returns a Service with the selector app: name and one port, 80 to 8080. more
// is added to the spec.
func serviceYAML(name, more string) string {
	return `
apiVersion: v1
kind: Service
metadata: {name: ` + name + `}
spec:
  selector: {app: ` + name + `}
  ports: [{port: 80, targetPort: 8080}]
` + indent(more) + "\n---\n"
}

func indent(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i := range lines {
		lines[i] = "  " + lines[i]
	}
	return strings.Join(lines, "\n")
}

// TestLoad checks the objects that result from files.
func TestLoad(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		cidrs []netip.Prefix
		files []string
		want  []string
	}{
		{
			name: "an empty folder",
		},
		{
			name: "defaults: namespace, type, protocol and target port", cidrs: oneCIDR,
			files: []string{"a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}"},
			want:  []string{"default/web ClusterIP 10.96.0.1 :80->80/TCP"},
		},
		{
			name: "an annotation", cidrs: oneCIDR,
			files: []string{"a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: web, annotations: {fairlead.io/ipvs-scheduler: lc}}\n" +
				"spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}"},
			want: []string{"default/web ClusterIP 10.96.0.1 :80->80/TCP scheduler=lc"},
		},
		{
			name: "several documents, comments, other kinds, and a List", cidrs: oneCIDR,
			files: []string{"a.yml", `
# a tutorial
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec: {anything: true}
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Service, metadata: {name: a, namespace: shop}, spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}}
- {apiVersion: v1, kind: Service, metadata: {name: b}, spec: {clusterIP: 10.96.0.2, ports: [{port: 53, protocol: UDP}]}}
...
---
---
# nothing
`},
			want: []string{"default/b ClusterIP 10.96.0.2 :53->53/UDP", "shop/a ClusterIP 10.96.0.1 :80->80/TCP"},
		},
		{
			name: "JSON, anchors and merge keys",
			files: []string{"a.json", `{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"},"spec":{"clusterIP":"10.96.0.1","ports":[{"port":80}]}}`, "b.yaml", `
apiVersion: v1
kind: Service
metadata: {name: &name b, labels: {app: *name}}
spec:
  clusterIP: 10.96.0.2
  ports:
  - &port {name: x, port: 80, targetPort: web}
  - {<<: *port, name: y, port: 81}
`},
			want: []string{"default/a ClusterIP 10.96.0.1 :80->80/TCP", "default/b ClusterIP 10.96.0.2 x:80->web/TCP y:81->web/TCP"},
		},
		{
			name: "hidden files, other names and folders are not read",
			files: []string{
				".a.yaml", "not: [yaml", "a.yaml~", "not: [yaml", "notes.txt", "not: [yaml", "..b.yaml", "not: [yaml",
			},
		},
		{
			name: "endpoints from the selector", cidrs: oneCIDR,
			files: []string{"a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1") +
				podYAML("web-2", "web", "10.0.0.2", "") + podYAML("web-1", "web", "10.0.0.1", "") + podYAML("db-1", "db", "10.0.0.3", "") +
				strings.Replace(podYAML("web-3", "web", "10.0.0.4", ""), "  name: web-3", "  name: web-3\n  namespace: shop", 1)},
			want: []string{
				"default/web ClusterIP 10.96.0.1 :80->8080/TCP",
				"default/web IPv4 :8080/TCP 10.0.0.1(here,ready,serving) 10.0.0.2(here,ready,serving)",
			},
		},
		{
			name: "readiness", cidrs: oneCIDR,
			files: []string{"a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1") +
				podYAML("w1", "web", "10.0.0.1", "  conditions: [{type: Ready, status: 'False'}]") +
				podYAML("w2", "web", "10.0.0.2", "  conditions: [{type: Ready, status: 'True'}]\n  phase: Pending") +
				podYAML("w3", "web", "10.0.0.3", "  phase: Running") +
				podYAML("w4", "web", "10.0.0.4", "  phase: Pending") +
				podYAML("w5", "web", "10.0.0.5", "  phase: Succeeded") +
				podYAML("w6", "web", "10.0.0.6", "  phase: Failed") +
				podYAML("w7", "web", "''", "") +
				strings.Replace(podYAML("w8", "web", "10.0.0.8", ""), "  name: w8", "  name: w8\n  deletionTimestamp: 2026-01-02T03:04:05Z", 1)},
			want: []string{
				"default/web ClusterIP 10.96.0.1 :80->8080/TCP",
				"default/web IPv4 :8080/TCP 10.0.0.1(here) 10.0.0.2(here,ready,serving) 10.0.0.3(here,ready,serving) 10.0.0.4(here) 10.0.0.8(here,serving,terminating)",
			},
		},
		{
			name: "publishNotReadyAddresses", cidrs: oneCIDR,
			files: []string{"a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1\npublishNotReadyAddresses: true") + podYAML("w", "web", "10.0.0.1", "  phase: Pending")},
			want: []string{
				"default/web ClusterIP 10.96.0.1 :80->8080/TCP",
				"default/web IPv4 :8080/TCP 10.0.0.1(here,ready)",
			},
		},
		{
			name: "named target ports, which pods may number differently or not have", cidrs: oneCIDR,
			files: []string{"a.yaml", strings.Replace(serviceYAML("web", "clusterIP: 10.96.0.1"), "targetPort: 8080", "targetPort: http", 1) +
				podYAML("w1", "web", "10.0.0.1", "") +
				strings.Replace(podYAML("w2", "web", "10.0.0.2", ""), "8080", "9090", 1) +
				strings.Replace(podYAML("w3", "web", "10.0.0.3", ""), "name: http,", "name: http, protocol: UDP,", 1) +
				podYAML("w4", "web", "10.0.0.4", "")},
			want: []string{
				"default/web ClusterIP 10.96.0.1 :80->http/TCP",
				"default/web IPv4 :8080/TCP 10.0.0.1(here,ready,serving) 10.0.0.4(here,ready,serving)",
				"default/web IPv4 10.0.0.3(here,ready,serving)",
				"default/web IPv4 :9090/TCP 10.0.0.2(here,ready,serving)",
			},
		},
		{
			name: "headless, with host names and another node", cidrs: oneCIDR,
			files: []string{"a.yaml", serviceYAML("db", "clusterIP: None") + strings.Replace(podYAML("db-0", "db", "10.0.0.1", ""),
				"spec:", "spec:\n  hostname: db-0\n  subdomain: db\n  nodeName: there", 1)},
			want: []string{
				"default/db ClusterIP None :80->8080/TCP",
				"default/db IPv4 :8080/TCP 10.0.0.1(there,host=db-0,ready,serving) headless",
			},
		},
		{
			name: "dual stack", cidrs: bothCIDR,
			files: []string{"a.yaml", serviceYAML("web", "ipFamilyPolicy: PreferDualStack\nclusterIPs: [10.96.0.1, 'fd00:10:96::1']\nclusterIP: 10.96.0.1") +
				podYAML("w1", "web", "10.0.0.1", "  podIPs: [{ip: 10.0.0.1}, {ip: 'fd01::1'}]") + podYAML("w2", "web", "fd01::2", "")},
			want: []string{
				"default/web ClusterIP 10.96.0.1,fd00:10:96::1 :80->8080/TCP",
				"default/web IPv4 :8080/TCP 10.0.0.1(here,ready,serving)",
				"default/web IPv6 :8080/TCP fd01::1(here,ready,serving) fd01::2(here,ready,serving)",
			},
		},
		{
			name: "EndpointSlices as written, for Services with and without a selector", cidrs: oneCIDR,
			files: []string{"a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1") + podYAML("w1", "web", "10.0.0.1", "") + `
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: more, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.9]}]
ports: [{port: 8080}]
`},
			want: []string{
				"default/web ClusterIP 10.96.0.1 :80->8080/TCP",
				"default/web IPv4 :8080/TCP 10.0.0.9()",
				"default/web IPv4 :8080/TCP 10.0.0.1(here,ready,serving)",
			},
		},
		{
			name:  "ExternalName has no address",
			files: []string{"a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {type: ExternalName, externalName: example.com}"},
			want:  []string{"default/x ExternalName "},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d, err := Load(Options{Dir: writeFolder(t, tt.files...), ServiceCIDRs: tt.cidrs, NodeName: "here"})
			if err != nil {
				t.Errorf("error: %v", err)
			}
			if diff := cmp.Diff(tt.want, summarize(d)); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
		})
	}
}

// TestExamples loads the project's examples.
func TestExamples(t *testing.T) {
	t.Parallel()
	d, err := Load(Options{Dir: "../../examples", ServiceCIDRs: oneCIDR})
	if err != nil {
		t.Error(err)
	}
	want := []string{
		"default/backend ClusterIP 10.96.130.254 http:80->8080/TCP",
		"default/public NodePort 10.96.157.86 http:80->8080/TCP",
		"default/redis ClusterIP 10.96.150.172 :6379->6379/TCP",
	}
	if diff := cmp.Diff(want, summarize(d)); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
}

// TestErrors checks all error messages: testdata/errors has files and, next to each, the
// expected errors. Run with -update to update the expected errors.
func TestErrors(t *testing.T) {
	t.Parallel()
	inputs, err := filepath.Glob("testdata/errors/*.yaml")
	if err != nil || len(inputs) == 0 {
		t.Fatalf("no files in testdata/errors: %v", err)
	}
	for _, input := range inputs {
		name := strings.TrimSuffix(filepath.Base(input), ".yaml")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(input)
			if err != nil {
				t.Fatal(err)
			}
			var cidrs []netip.Prefix
			first, _, _ := strings.Cut(string(text), "\n")
			if flag, ok := strings.CutPrefix(first, "# --service-cidr"); ok {
				for cidr := range strings.FieldsSeq(flag) {
					cidrs = append(cidrs, netip.MustParsePrefix(cidr))
				}
			}
			d, err := Load(Options{Dir: writeFolder(t, "x.yaml", string(text)), ServiceCIDRs: cidrs, NodeName: "here"})
			var errs Errors
			if !errors.As(err, &errs) {
				t.Fatalf("error %v, want Errors", err)
			}
			got := errs.Error() + "\n"
			for _, line := range summarize(d) {
				got += "delivered: " + line + "\n"
			}
			golden := strings.TrimSuffix(input, ".yaml") + ".txt"
			if *updateGolden {
				if err := os.WriteFile(golden, []byte(got), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}
