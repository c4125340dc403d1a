//go:build cluster

package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"fairlead.io/fairlead/test/cluster/internal/addons"
	"fairlead.io/fairlead/test/cluster/internal/control"
	"fairlead.io/fairlead/test/cluster/internal/lab"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// loadCommand is the argument that makes the test program a load generator.
const loadCommand = "generate-load"

var (
	outage   = flag.Duration("outage", 30*time.Second, "time without a control plane")
	stateDir = flag.String("cluster-state", root+"/bin/disruption-state", "directory of the cluster's files")
)

// The namespaces of a cluster run the test program, like the program cluster.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "control", "node":
			main()
			return
		case loadCommand:
			if err := generateLoad(os.Args[2]); err != nil {
				_, _ = fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	os.Exit(m.Run())
}

// workload has an endpoint on each of the first two nodes, for connections through a Service's
// cluster IP and through a node port.
const workload = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 30
      affinity:
        nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [
          {key: kubernetes.io/hostname, operator: In, values: [node1, node2]}]}]}}
        podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [
          {topologyKey: kubernetes.io/hostname, labelSelector: {matchLabels: {app: web}}}]}
      containers:
        - name: web
          image: IMAGE
          args: [netexec, --http-port=8080, --udp-port=-1, --delay-shutdown=15]
          readinessProbe: {httpGet: {path: /hostname, port: 8080}, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 10}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  clusterIP: 10.96.100.1
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
`

// disruption is a cluster whose parts restart.
type disruption struct {
	*lab.Lab
	cluster *topology.Cluster
}

// TestDisruptions starts one cluster. In each step something restarts while connections are opened:
// from a node to a cluster IP, and from outside of the cluster to a node port.
func TestDisruptions(t *testing.T) {
	d := startCluster(t)
	d.workload(t)
	all := map[string][]string{"node3": {"10.96.100.1:80"}, "": {"172.30.0.11:30080"}}
	for _, step := range []struct {
		name    string
		sources map[string][]string
		change  func(*testing.T)
	}{
		{"rolling update with maxUnavailable", all, func(t *testing.T) { d.rollingUpdate(t, `{"maxSurge": 0, "maxUnavailable": 1}`) }},
		{"rolling update with maxSurge", all, func(t *testing.T) { d.rollingUpdate(t, `{"maxSurge": 1, "maxUnavailable": 0}`) }},
		{"control plane does not answer", all, d.outage},
		{"restart of kubelet", all, d.restartKubelet},
		{"restart of the CNI plugin", all, d.restartCNI},
		// Connections come from the other node, and go to the node port of one that stays.
		{"reboot of a node without endpoints", map[string][]string{"node1": {"10.96.100.1:80"}, "": {"172.30.0.11:30080"}}, d.reboot},
		{"drain", all, d.drain},
		{"back to kube-proxy", all, d.toKubeProxy},
		{"take over from kube-proxy", all, d.toFairlead},
	} {
		t.Run(step.name, func(t *testing.T) {
			began := time.Now()
			underLoad(t, d.Lab, step.sources, func() { step.change(t) })
			t.Logf("after %s", time.Since(began).Round(time.Second))
		})
	}
}

func startCluster(t *testing.T) *disruption {
	t.Helper()
	o := &startOptions{
		cache: filepath.Join(root, ".cache"), layout: filepath.Join(root, "bin/cluster-image"),
		cluster: topology.Cluster{Nodes: 3, Zones: 1, Proxy: topology.Fairlead, Chart: filepath.Join(root, "deploy/chart/fairlead")},
	}
	cluster, err := o.prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := lab.Open(*stateDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Start(t.Context(), cluster, os.Stderr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Stop(); err != nil {
			t.Error(err)
		}
	})
	return &disruption{Lab: l, cluster: cluster}
}

// run runs a command and returns its output.
func (d *disruption) run(t *testing.T, node, stdin string, args ...string) string {
	t.Helper()
	cmd, err := d.Command(context.WithoutCancel(t.Context()), node, args...)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return string(out)
}

func (d *disruption) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	return d.run(t, "", "", append([]string{"kubectl"}, args...)...)
}

// rollout waits until a DaemonSet is up to date on all nodes.
func (d *disruption) rollout(t *testing.T, name string) {
	t.Helper()
	d.kubectl(t, "--namespace=kube-system", "rollout", "status", "daemonset/"+name, "--timeout=5m")
}

// eventually waits until a condition holds.
func (d *disruption) eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	const timeout, period = 5 * time.Minute, 500 * time.Millisecond
	for began := time.Now(); !holds(); time.Sleep(period) {
		if time.Since(began) > timeout {
			t.Fatalf("%s: not after %s\n%s", what, timeout, d.kubectl(t, "get", "nodes,pods", "-A", "-o", "wide"))
		}
	}
}

func (d *disruption) waitReady(t *testing.T, node, status string) {
	t.Helper()
	d.eventually(t, node+" has Ready="+status, func() bool {
		return d.kubectl(t, "get", "node", node, `-o=jsonpath={.status.conditions[?(@.type=="Ready")].status}`) == status
	})
}

func (d *disruption) workload(t *testing.T) {
	t.Helper()
	image := ""
	for _, name := range d.testImages(t) {
		// The list also has an agnhost that is not public.
		if strings.HasPrefix(name, "registry.k8s.io/") && strings.Contains(name, "/agnhost:") {
			image = name
		}
	}
	d.run(t, "", strings.ReplaceAll(workload, "IMAGE", image), "kubectl", "apply", "-f", "-")
	d.kubectl(t, "rollout", "status", "deployment/web", "--timeout=5m")
	// The proxies have programmed the Service once both addresses answer.
	for node, address := range map[string]string{"node3": "10.96.100.1:80", "": "172.30.0.11:30080"} {
		d.eventually(t, address+" answers", func() bool {
			g := startLoad(t, d.Lab, node, address)
			time.Sleep(time.Second)
			r, err := g.stop()
			return err == nil && r.Connections > 0 && len(r.Failures) == 0
		})
	}
}

func (d *disruption) testImages(t *testing.T) []string {
	t.Helper()
	return strings.Fields(d.run(t, "", "", filepath.Join(d.cluster.Programs, "e2e.test"), "--list-images"))
}

func (d *disruption) rollingUpdate(t *testing.T, strategy string) {
	patch := `{"spec": {"minReadySeconds": 0, "updateStrategy": {"rollingUpdate": ` + strategy + `}, "template": {"metadata": {"annotations": {"update": "` +
		time.Now().Format(time.RFC3339Nano) + `"}}}}}`
	d.kubectl(t, "-n=kube-system", "patch", "daemonset", "fairlead", "-p", patch)
	d.rollout(t, "fairlead")
}

// outage stops the API server without closing its connections, which is harder to notice than an
// API server that has ended.
func (d *disruption) outage(t *testing.T) {
	d.run(t, "", "", "pkill", "-STOP", "-x", "kube-apiserver")
	time.Sleep(*outage)
	d.run(t, "", "", "pkill", "-CONT", "-x", "kube-apiserver")
	for _, n := range d.cluster.AllNodes() {
		d.waitReady(t, n.Name, "True")
	}
}

func (d *disruption) restartKubelet(t *testing.T) {
	before := d.run(t, "node1", "", "pgrep", "-x", "kubelet")
	d.run(t, "node1", "", "pkill", "-KILL", "-x", "kubelet")
	d.eventually(t, "kubelet runs again", func() bool {
		cmd, err := d.Command(context.WithoutCancel(t.Context()), "node1", "pgrep", "-x", "kubelet")
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.Output()
		return err == nil && string(out) != before
	})
	d.waitReady(t, "node1", "True")
	d.eventually(t, "pods of node1 are ready", func() bool {
		out := d.kubectl(t, "get", "pods", "-A", "--field-selector=spec.nodeName=node1",
			`-o=jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}`)
		return !strings.Contains(out, "False")
	})
}

// restartCNI removes the CNI configuration until the node notices, as an agent of a CNI plugin may
// while it restarts.
func (d *disruption) restartCNI(t *testing.T) {
	const file = "/etc/cni/net.d/10-cluster.conflist"
	d.run(t, "node1", "", "mv", file, "/etc/cni/away")
	d.waitReady(t, "node1", "False")
	// containerd ignores a file that is renamed, so this writes one.
	d.run(t, "node1", "", "cp", "/etc/cni/away", file)
	d.waitReady(t, "node1", "True")
}

func (d *disruption) reboot(t *testing.T) {
	pidFile := control.PIDFile(d.State(), "node3")
	before, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	d.run(t, "", "", "kill", "-KILL", string(before))
	d.eventually(t, "node3 boots", func() bool {
		now, err := os.ReadFile(pidFile)
		return err == nil && len(now) > 0 && string(now) != string(before)
	})
	d.eventually(t, "node3 has a new boot of kubelet", func() bool {
		cmd, err := d.Command(context.WithoutCancel(t.Context()), "node3", "pgrep", "-x", "kubelet")
		if err != nil {
			t.Fatal(err)
		}
		return cmd.Run() == nil
	})
	// Fairlead programs the node again, whose kernel has forgotten all rules.
	d.eventually(t, "node3 reaches the Service", func() bool {
		g := startLoad(t, d.Lab, "node3", "10.96.100.1:80")
		time.Sleep(time.Second)
		r, err := g.stop()
		return err == nil && r.Connections > 0 && len(r.Failures) == 0
	})
	d.waitReady(t, "node3", "True")
	d.rollout(t, "fairlead")
}

// drain evicts the endpoint on node2, which can run only there, and waits until it is back.
func (d *disruption) drain(t *testing.T) {
	d.kubectl(t, "drain", "node2", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=3m")
	if pods := d.kubectl(t, "get", "pods", "-l=app=web", "--field-selector=spec.nodeName=node2", "-o=name"); pods != "" {
		t.Errorf("pods on the drained node: %s", pods)
	}
	d.kubectl(t, "uncordon", "node2")
	d.kubectl(t, "rollout", "status", "deployment/web", "--timeout=5m")
}

// toKubeProxy goes back from Fairlead to kube-proxy as in docs/migrate-from-kube-proxy.md.
func (d *disruption) toKubeProxy(t *testing.T) {
	d.kubectl(t, "label", "nodes", "--all", "fairlead.io/canary=true")
	d.kubectl(t, "-n=kube-system", "patch", "daemonset", "fairlead", "-p",
		`{"spec": {"template": {"spec": {"nodeSelector": {"fairlead.io/canary": "true"}}}}}`)
	d.rollout(t, "fairlead")
	cluster := *d.cluster
	cluster.Proxy, cluster.Mode = topology.KubeProxy, topology.DefaultMode(topology.KubeProxy)
	objects, err := addons.All(&cluster)
	if err != nil {
		t.Fatal(err)
	}
	for _, object := range objects {
		if object.GetName() == "coredns" || object.GetName() == "kube-dns" {
			continue
		}
		text, err := yaml.Marshal(object.Object)
		if err != nil {
			t.Fatal(err)
		}
		d.run(t, "", string(text), "kubectl", "apply", "-f", "-")
	}
	d.kubectl(t, "-n=kube-system", "patch", "daemonset", "kube-proxy", "--type=strategic", "-p", `{"spec":{"template":{"spec":{"affinity":{"nodeAffinity":
		{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":
		[{"key":"fairlead.io/canary","operator":"NotIn","values":["true"]}]}]}}}}}}}`)
	d.rollout(t, "kube-proxy")
	d.kubectl(t, "label", "nodes", "--all", "fairlead.io/canary-")
	d.waitPods(t, "k8s-app=kube-proxy", d.cluster.Nodes)
	for _, n := range d.cluster.AllNodes() {
		d.run(t, n.Name, "", d.program(), "cleanup")
		d.checkTables(t, n.Name, "kube-proxy", "fairlead")
	}
}

// toFairlead takes over from kube-proxy.
func (d *disruption) toFairlead(t *testing.T) {
	d.kubectl(t, "label", "nodes", "--all", "fairlead.io/canary=true")
	d.waitPods(t, "app.kubernetes.io/name=fairlead", d.cluster.Nodes)
	for _, n := range d.cluster.AllNodes() {
		d.run(t, n.Name, "", d.program(), "cleanup", "--kube-proxy")
		d.checkTables(t, n.Name, "fairlead", "kube-proxy")
	}
}

// program returns Fairlead's program, which is in the checkout beside its image.
func (d *disruption) program() string {
	image := d.cluster.Images[len(d.cluster.Images)-1]
	return filepath.Join(filepath.Dir(image), "linux-"+runtime.GOARCH, "fairlead")
}

func (d *disruption) checkTables(t *testing.T, node, present, absent string) {
	t.Helper()
	tables := d.run(t, node, "", "nft", "list", "tables")
	if !strings.Contains(tables, " "+present+"\n") || strings.Contains(tables, " "+absent+"\n") {
		t.Errorf("%s: tables %q, want %s and not %s", node, tables, present, absent)
	}
}

// waitPods waits until as many pods as nodes are ready, and no other pods exist.
func (d *disruption) waitPods(t *testing.T, selector string, count int) {
	t.Helper()
	d.eventually(t, "pods with "+selector, func() bool {
		statuses := strings.Fields(d.kubectl(t, "-n=kube-system", "get", "pods", "-l="+selector,
			`-o=jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}`))
		for _, s := range statuses {
			if s != "True" {
				return false
			}
		}
		return len(statuses) == count
	})
}
