package monitoring_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/internal/nettest"
)

// waitTimeout bounds operations that take seconds on a busy machine.
const waitTimeout = time.Minute

const (
	nodeName       = "node"
	metricsAddress = "127.0.0.1:10249"
	healthzAddress = "127.0.0.1:10256"
	apiAddress     = "127.0.0.1:6443"
)

// proxy is a Service proxy that runs on a node of its own, with an API server that has one
// Service.
type proxy struct {
	t    *testing.T
	net  *nettest.Network
	cmd  *exec.Cmd
	done chan struct{}
	log  string
}

// startProxy starts a program with an API server at apiAddress, unless withoutAPI is set.
func startProxy(t *testing.T, withoutAPI bool, command ...string) *proxy {
	t.Helper()
	p := &proxy{t: t, net: nettest.NewT(t, nettest.Options{})}
	if !withoutAPI {
		p.serveAPI()
	}
	p.start(command...)
	return p
}

// startBeside starts a program on the node of another one.
func startBeside(other *proxy, command ...string) *proxy {
	other.t.Helper()
	p := &proxy{t: other.t, net: other.net}
	p.start(command...)
	return p
}

// writeKubeconfig writes a kubeconfig file for the API server at apiAddress.
func writeKubeconfig(t *testing.T, dir string) (path string) {
	t.Helper()
	kubeconfig := filepath.Join(dir, "kubeconfig")
	text := `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "http://` + apiAddress + `"}}]
users: [{name: test}]
contexts: [{name: test, context: {cluster: test, user: test}}]
current-context: test
`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return kubeconfig
}

// start starts the program on the node.
func (p *proxy) start(command ...string) {
	t, dir := p.t, p.t.TempDir()
	t.Helper()
	p.done = make(chan struct{})
	kubeconfig := writeKubeconfig(t, dir)
	p.log = filepath.Join(dir, "log")
	out, err := os.Create(p.log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	args := append(command[1:], "--kubeconfig="+kubeconfig, "--hostname-override="+nodeName, "--cluster-cidr=10.244.0.0/16",
		"--profiling", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s",
		"--conntrack-tcp-timeout-close-wait=0s", "--oom-score-adj=0")
	p.cmd = exec.Command(command[0], args...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.net.Node.Do(p.cmd.Start); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // a signal ends it
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			text, _ := os.ReadFile(p.log)
			t.Logf("log of %s:\n%s", command[0], text)
		}
	})
}

// serveAPI starts an API server with a Node, a ServiceCIDR and a Service with one endpoint.
func (p *proxy) serveAPI() {
	p.t.Helper()
	feed := apiserver.New()
	var versions apiserver.VersionSequence
	ready, name, port := true, "http", int32(8080)
	tcp := corev1.ProtocolTCP
	for _, o := range []apiserver.Object{
		&corev1.Node{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: nodeName, UID: "node-uid"},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: p.net.Node.IPv4.String()}}},
		},
		&networkingv1.ServiceCIDR{
			TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "ServiceCIDR"},
			ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}},
		},
		&corev1.Service{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "web-uid"},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.0.10", ClusterIPs: []string{"10.96.0.10"},
				IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}, Ports: []corev1.ServicePort{{Name: name, Protocol: tcp, Port: 80}},
			},
		},
		&discoveryv1.EndpointSlice{
			TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "default", Name: "web-1", UID: "slice-uid", Labels: map[string]string{discoveryv1.LabelServiceName: "web"},
			},
			AddressType: discoveryv1.AddressTypeIPv4,
			Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{"10.244.0.7"}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}},
			Ports:       []discoveryv1.EndpointPort{{Name: &name, Protocol: &tcp, Port: &port}},
		},
	} {
		v, err := versions.Stamp(o)
		if err != nil {
			p.t.Fatal(err)
		}
		feed.Put(v)
	}
	listener, err := p.net.Node.Listen(p.t.Context(), "tcp4", netip.MustParseAddrPort(apiAddress))
	if err != nil {
		p.t.Fatal(err)
	}
	server := &http.Server{Handler: feed, ReadHeaderTimeout: waitTimeout}
	go func() { _ = server.Serve(listener) }() // returns when the test closes the server
	p.t.Cleanup(func() { _ = server.Close() })
}

// response is an HTTP response with its body.
type response struct {
	status int
	header http.Header
	body   string
}

// request sends a request to one of the program's HTTP servers.
func (p *proxy) request(method, address, path, accept, body string) (response, error) {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
		return p.net.Node.Dial(ctx, "tcp", netip.MustParseAddrPort(address))
	}}
	ctx, cancel := context.WithTimeout(p.t.Context(), waitTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "http://"+address+path, strings.NewReader(body))
	if err != nil {
		return response{}, err
	}
	if accept != "" {
		r.Header.Set("Accept", accept)
	}
	got, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		return response{}, err
	}
	defer got.Body.Close()
	text, err := io.ReadAll(got.Body)
	return response{status: got.StatusCode, header: got.Header, body: string(text)}, err
}

// get returns the body of a path of the metrics server, which must have status 200.
func (p *proxy) get(path string) string {
	p.t.Helper()
	got, err := p.request(http.MethodGet, metricsAddress, path, "", "")
	if err != nil || got.status != http.StatusOK {
		p.t.Fatalf("GET %s: status %d, error %v; body:\n%s", path, got.status, err, got.body)
	}
	return got.body
}

// eventually calls check until it returns nil.
func (p *proxy) eventually(check func() error) {
	p.t.Helper()
	deadline := time.Now().Add(waitTimeout)
	for {
		err := check()
		switch {
		case err == nil:
			return
		case time.Now().After(deadline):
			p.t.Fatalf("not within %s: %v", waitTimeout, err)
		}
		select {
		case <-p.done:
			p.t.Fatalf("program has ended: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// awaitProgrammed waits until the program has programmed the Service, and has answered probes.
func (p *proxy) awaitProgrammed() {
	p.t.Helper()
	p.eventually(func() error {
		got, err := p.request(http.MethodGet, metricsAddress, "/metrics", "", "")
		if err == nil && !strings.Contains(got.body, "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"} 1") {
			err = errors.New("nothing programmed")
		}
		return err
	})
	for _, path := range []string{"/healthz", "/livez"} {
		p.eventually(func() error {
			got, err := p.request(http.MethodGet, healthzAddress, path, "", "")
			if err == nil && got.status != http.StatusOK {
				err = fmt.Errorf("%s: status %d: %s", path, got.status, got.body)
			}
			return err
		})
	}
}

// repository is the root of the main module.
const repository = "../.."

// kubeProxy starts the real kube-proxy.
func kubeProxy(t *testing.T, args ...string) *proxy {
	t.Helper()
	path, err := filepath.Abs(filepath.Join(repository, ".cache", "kube-proxy", "kube-proxy"))
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("kube-proxy not found: run `make kube-proxy` (%v)", err)
	}
	return startProxy(t, false, append([]string{path, "--proxy-mode=nftables"}, args...)...)
}

// fairleadBinary is the path of the program that the tests build.
var fairleadBinary string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "fairlead")
	if err == nil {
		defer os.RemoveAll(dir)
		fairleadBinary = filepath.Join(dir, "fairlead")
		build := exec.Command("go", "build", "-o", fairleadBinary, "./cmd/fairlead")
		build.Dir, build.Stdout, build.Stderr = repository, os.Stderr, os.Stderr
		err = build.Run()
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "build fairlead:", err)
		return 1
	}
	return m.Run()
}

// fairlead starts Fairlead.
func fairlead(t *testing.T, args ...string) *proxy {
	t.Helper()
	return startProxy(t, false, append([]string{fairleadBinary, "run", "--mode=nft"}, args...)...)
}
