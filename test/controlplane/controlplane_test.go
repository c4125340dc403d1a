package controlplane_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"fairlead.io/fairlead/test/controlplane"
)

// killSelfEnv makes the test binary start a control plane and kill itself without closing it.
const killSelfEnv = "FAIRLEAD_TEST_DIE"

func TestMain(m *testing.M) {
	if os.Getenv(killSelfEnv) != "" {
		if _, err := controlplane.New(context.Background(), controlplane.Options{}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
			panic(err)
		}
		select {}
	}
	os.Exit(m.Run())
}

func newClient(t *testing.T, config *rest.Config) kubernetes.Interface {
	t.Helper()
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// clientFromKubeconfig returns a client for a kubeconfig file.
func clientFromKubeconfig(t *testing.T, kubeconfig string) kubernetes.Interface {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	return newClient(t, config)
}

func eventually(t *testing.T, fn func() error) {
	t.Helper()
	const patience, period = time.Minute, 50 * time.Millisecond
	for deadline := time.Now().Add(patience); ; time.Sleep(period) {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// TestServiceCIDRs checks that Services get one address of each network.
func TestServiceCIDRs(t *testing.T) {
	t.Parallel()
	cp := controlplane.Start(t, controlplane.Options{ServiceCIDRs: []netip.Prefix{
		netip.MustParsePrefix("fd00:77::/112"), netip.MustParsePrefix("10.77.0.0/16"),
	}})
	policy := corev1.IPFamilyPolicyRequireDualStack
	service, err := newClient(t, cp.Config()).CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{IPFamilyPolicy: &policy, Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(service.Spec.ClusterIPs) != len(cp.ServiceCIDRs()) {
		t.Fatalf("got addresses %v, want one from each of %v", service.Spec.ClusterIPs, cp.ServiceCIDRs())
	}
	for i, cidr := range cp.ServiceCIDRs() {
		if addr := netip.MustParseAddr(service.Spec.ClusterIPs[i]); !cidr.Contains(addr) {
			t.Errorf("address %d is %s, want one in %s", i, addr, cidr)
		}
	}
}

// TestControllers checks that the controller manager writes EndpointSlices and removes them
// with the Service, also after a restart of the API server.
func TestControllers(t *testing.T) {
	t.Parallel()
	cp := controlplane.Start(t, controlplane.Options{ControllerManager: true})
	client := newClient(t, cp.Config())
	ctx := t.Context()
	create := func(name string) {
		t.Helper()
		if _, err := client.CoreV1().Services("default").Create(ctx, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80}}},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	endpoints := func(service string) (addrs []string, err error) {
		list, err := client.DiscoveryV1().EndpointSlices("default").List(ctx, metav1.ListOptions{
			LabelSelector: discoveryv1.LabelServiceName + "=" + service,
		})
		if err != nil {
			return nil, err
		}
		for i := range list.Items {
			for j := range list.Items[i].Endpoints {
				addrs = append(addrs, list.Items[i].Endpoints[j].Addresses...)
			}
		}
		return addrs, nil
	}
	if _, err := client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	const podIP = "10.244.0.9"
	pod, err := client.CoreV1().Pods("default").Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{NodeName: "node", Containers: []corev1.Container{{Name: "web", Image: "web"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pod.Status = corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: podIP, PodIPs: []corev1.PodIP{{IP: podIP}},
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
	}
	if _, err := client.CoreV1().Pods("default").UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitEndpoints := func(service string, want ...string) {
		t.Helper()
		eventually(t, func() error {
			got, err := endpoints(service)
			if err == nil && !slices.Equal(got, want) {
				err = fmt.Errorf("Service %s has the endpoints %v, want %v\n%s", service, got, want, cp.Log("kube-controller-manager"))
			}
			return err
		})
	}
	create("before")
	waitEndpoints("before", podIP)

	if err := cp.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	if _, err := endpoints("before"); err == nil {
		t.Error("the API server answers after it was stopped")
	}
	if err := cp.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	create("after")
	waitEndpoints("after", podIP)
	if err := client.CoreV1().Services("default").Delete(ctx, "before", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	waitEndpoints("before")
}

// TestRBAC checks that users, groups and Service accounts have exactly the permissions that
// RBAC grants.
func TestRBAC(t *testing.T) {
	t.Parallel()
	cp := controlplane.Start(t, controlplane.Options{})
	admin := newClient(t, cp.Config())
	ctx := t.Context()
	if _, err := admin.CoreV1().ServiceAccounts("kube-system").Create(ctx, &corev1.ServiceAccount{
		ObjectMeta: metav1.ObjectMeta{Name: "robot"},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: "reader"},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"services"}, Verbs: []string{"list"}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "readers"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "reader"},
		Subjects: []rbacv1.Subject{
			{Kind: "ServiceAccount", Namespace: "kube-system", Name: "robot"},
			{APIGroup: rbacv1.GroupName, Kind: "User", Name: "jane"},
			{APIGroup: rbacv1.GroupName, Kind: "Group", Name: "readers"},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		kubeconfig func(path string) error
		may        bool
	}{
		"Service account": {func(path string) error { return cp.ServiceAccountKubeconfig(ctx, path, "kube-system", "robot") }, true},
		"user":            {func(path string) error { return cp.Kubeconfig(path, "jane") }, true},
		"group":           {func(path string) error { return cp.Kubeconfig(path, "joe", "others", "readers") }, true},
		"unknown user":    {func(path string) error { return cp.Kubeconfig(path, "joe") }, false},
	} {
		path := filepath.Join(t.TempDir(), "kubeconfig")
		if err := tc.kubeconfig(path); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		client := clientFromKubeconfig(t, path)
		eventually(t, func() error { // permissions take effect after a delay
			_, err := client.CoreV1().Services("").List(ctx, metav1.ListOptions{})
			if tc.may && err != nil || !tc.may && !apierrors.IsForbidden(err) {
				return fmt.Errorf("%s lists Services: got %w", name, err)
			}
			return nil
		})
		if _, err := client.CoreV1().Secrets("").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("%s lists Secrets: got %v, want Forbidden", name, err)
		}
	}
	if err := cp.ServiceAccountKubeconfig(ctx, filepath.Join(t.TempDir(), "kubeconfig"), "kube-system", "nobody"); err == nil {
		t.Error("got a token for a Service account that does not exist")
	}
}

// TestNodes checks what a control plane for real nodes adds: a kubelet may change only its own
// Node, Pods get the account of their namespace, and controllers that other tests do not need run.
func TestNodes(t *testing.T) {
	t.Parallel()
	cp := controlplane.Start(t, controlplane.Options{ControllerManager: true, Nodes: true})
	admin := newClient(t, cp.Config())
	ctx := t.Context()
	for _, name := range []string{"node1", "node2"} {
		if _, err := admin.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := cp.Kubeconfig(path, "system:node:node1", "system:nodes"); err != nil {
		t.Fatal(err)
	}
	kubelet := clientFromKubeconfig(t, path)
	patch := []byte(`{"metadata": {"annotations": {"a": "b"}}}`)
	if _, err := kubelet.CoreV1().Nodes().Patch(ctx, "node1", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Errorf("the kubelet of node1 changes node1: %v", err)
	}
	if _, err := kubelet.CoreV1().Nodes().Patch(ctx, "node2", types.MergePatchType, patch, metav1.PatchOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("the kubelet of node1 changes node2: got %v, want Forbidden", err)
	}
	eventually(t, func() error { // the account is created after the namespace
		_, err := admin.AppsV1().Deployments("default").Create(ctx, &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: "web"},
			Spec: appsv1.DeploymentSpec{
				Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
				Template: corev1.PodTemplateSpec{
					ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}},
					Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "web", Image: "web"}}},
				},
			},
		}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
		pods, err := admin.CoreV1().Pods("default").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		if len(pods.Items) != 1 || pods.Items[0].Spec.ServiceAccountName != "default" || len(pods.Items[0].Spec.Volumes) != 1 {
			return fmt.Errorf("Pods %v, want one with a token of the account default", pods.Items)
		}
		return nil
	})
	if _, err := os.Stat(cp.CAFile()); err != nil {
		t.Error(err)
	}
}

// TestCompact checks that old resource versions are gone after a compaction and a restart.
func TestCompact(t *testing.T) {
	t.Parallel()
	cp := controlplane.Start(t, controlplane.Options{})
	services := newClient(t, cp.Config()).CoreV1().Services("default")
	ctx := t.Context()
	before, err := services.List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := services.Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// first returns the first event of a watch that starts at the old version.
	first := func() watch.Event {
		t.Helper()
		w, err := services.Watch(ctx, metav1.ListOptions{ResourceVersion: before.ResourceVersion})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Stop()
		return <-w.ResultChan()
	}
	if event := first(); event.Type != watch.Added {
		t.Fatalf("before the compaction the first event is %s %v, want the created Service", event.Type, event.Object)
	}
	if err := cp.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	if err := cp.Compact(ctx); err != nil {
		t.Fatal(err)
	}
	if err := cp.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	if event := first(); event.Type != watch.Error || !apierrors.IsResourceExpired(apierrors.FromObject(event.Object)) &&
		!apierrors.IsGone(apierrors.FromObject(event.Object)) {
		t.Errorf("after the compaction the first event is %s %v, want Gone or Expired", event.Type, event.Object)
	}
}

// TestStore checks that the API server returns objects written directly to etcd.
func TestStore(t *testing.T) {
	t.Parallel()
	const n = 250 // more than one transaction
	cp := controlplane.Start(t, controlplane.Options{})
	values := map[string][]byte{}
	for i := range n {
		name := fmt.Sprintf("stored-%d", i)
		values["/registry/configmaps/default/"+name] = []byte(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"` +
			name + `","namespace":"default"}}`)
	}
	if err := cp.Store(t.Context(), values); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		maps, err := newClient(t, cp.Config()).CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{})
		if err == nil && len(maps.Items) != n {
			err = fmt.Errorf("%d ConfigMaps, want %d", len(maps.Items), n)
		}
		return err
	})
}

// children returns the names of the child processes of parent.
func children(t *testing.T, parent int) []string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, path := range stats {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // the process has exited
		}
		// proc_pid_stat(5): pid (name) state ppid …
		before, after, _ := strings.Cut(string(data), ") ")
		if fields := strings.Fields(after); len(fields) > 1 && fields[1] == strconv.Itoa(parent) {
			_, name, _ := strings.Cut(before, "(")
			names = append(names, name)
		}
	}
	return names
}

// TestCloseLeavesNothing checks that Close ends all programs and removes all files. It does
// not run in parallel, because it would see the programs of other tests.
func TestCloseLeavesNothing(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	cp, err := controlplane.New(t.Context(), controlplane.Options{ControllerManager: true})
	if err != nil {
		t.Fatal(err)
	}
	got := children(t, os.Getpid())
	slices.Sort(got)
	if want := []string{"etcd", "kube-apiserver", "kube-controller"}; !slices.Equal(got, want) {
		t.Errorf("running programs are %v, want %v", got, want)
	}
	for range 2 {
		if err := cp.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if left := children(t, os.Getpid()); len(left) > 0 {
		t.Errorf("still running after Close: %v", left)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("files left after Close: %v, %v", left, err)
	}
	if err := cp.StopAPIServer(); err == nil {
		t.Error("StopAPIServer after Close returned no error")
	}
	if err := cp.StartAPIServer(t.Context()); err == nil {
		t.Error("StartAPIServer after Close returned no error")
	}
}

// TestKilledProcessLeavesNothing checks that the programs end with a process that is killed,
// and that the next control plane removes its directory.
func TestKilledProcessLeavesNothing(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	killed := exec.CommandContext(t.Context(), os.Args[0])
	killed.Env = append(os.Environ(), killSelfEnv+"=1")
	out, err := killed.CombinedOutput()
	if status, ok := killed.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		t.Fatalf("the process exited with %v:\n%s", err, out)
	}
	left, err := filepath.Glob(filepath.Join(temp, "*"))
	if err != nil || len(left) != 1 {
		t.Fatalf("the killed process left %v, %v, want one directory", left, err)
	}
	// The directory is the working directory of the programs.
	eventually(t, func() error {
		running, err := filepath.Glob("/proc/[0-9]*/cwd")
		if err != nil {
			return err
		}
		for _, link := range running {
			if dir, err := os.Readlink(link); err == nil && dir == left[0] {
				return fmt.Errorf("%s is still running", filepath.Dir(link))
			}
		}
		return nil
	})
	controlplane.Start(t, controlplane.Options{})
	if _, err := os.Stat(left[0]); !os.IsNotExist(err) {
		t.Errorf("the directory of the killed process still exists: %v", err)
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	dir, err := controlplane.Programs("")
	if err != nil {
		t.Fatal(err)
	}
	if version, err := controlplane.Version(t.Context(), dir); err != nil || !strings.HasPrefix(version, "v1.") {
		t.Errorf("got %q, %v", version, err)
	}
	if version, err := controlplane.Version(t.Context(), t.TempDir()); err == nil {
		t.Errorf("got %q without a program", version)
	}
}

func TestInvalidOptions(t *testing.T) {
	for name, tc := range map[string]struct {
		options  controlplane.Options
		programs string
		want     string
	}{
		"no programs":                {programs: t.TempDir(), want: "run `make controlplane`"},
		"no programs in a directory": {options: controlplane.Options{Programs: "/nowhere"}, want: "no etcd in /nowhere: run `make controlplane`"},
		"unspecified address":        {options: controlplane.Options{Address: netip.IPv4Unspecified()}, want: "Address 0.0.0.0"},
		"host bits":                  {options: controlplane.Options{ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/16")}}, want: "ServiceCIDRs: 10.0.0.1/16"},
		"two networks of a family":   {options: controlplane.Options{ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("10.1.0.0/16")}}, want: "ServiceCIDRs: two"},
		"unknown flag":               {options: controlplane.Options{APIServerArgs: []string{"--no-such-flag"}}, want: "no-such-flag"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.programs != "" {
				t.Setenv(controlplane.ProgramsEnv, tc.programs)
			}
			cp, err := controlplane.New(t.Context(), tc.options)
			if err == nil {
				t.Error(cp.Close())
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
			if left := children(t, os.Getpid()); len(left) > 0 {
				t.Errorf("still running: %v", left)
			}
		})
	}
}
