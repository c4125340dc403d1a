package controlplane

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/rest"
)

// ProgramsEnv names the environment variable with the directory of etcd, kube-apiserver and
// kube-controller-manager. The default is .cache/controlplane below the root of the module
// that contains the working directory, where `make controlplane` puts them.
const ProgramsEnv = "FAIRLEAD_CONTROLPLANE"

// Names of the programs.
const (
	etcdName              = "etcd"
	apiserverName         = "kube-apiserver"
	controllerManagerName = "kube-controller-manager"
)

// DefaultStartTimeout bounds the wait for readiness in [New], in addition to its context.
// Starting takes some seconds on an idle machine, and minutes on one that is very busy.
const DefaultStartTimeout = 5 * time.Minute

// Namespace is the network namespace of the programs. A
// [fairlead.io/fairlead/internal/nettest.Namespace] implements it.
type Namespace interface {
	// Fd returns the file descriptor of the network namespace.
	Fd() int
	// Dial connects from the namespace.
	Dial(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)
}

// Options configures a control plane. The zero value is usable.
type Options struct {
	// Programs is the directory of the programs. The default is the value of [ProgramsEnv],
	// or if that is empty, .cache/controlplane in the module root.
	Programs string
	// Namespace is the network namespace that the API server listens in and that clients of
	// Config connect from. The default is the caller's namespace.
	Namespace Namespace
	// Address is the address of the API server. It must be an address of the namespace. The
	// default is 127.0.0.1. An address that is not a loopback address also becomes the
	// endpoint of the Service default/kubernetes, which otherwise has none.
	Address netip.Addr
	// Port is the port of the API server. 0 means a free port.
	Port uint16
	// ServiceCIDRs are the networks for Service addresses, one per family, the primary family
	// first. The default is 10.96.0.0/16 and fd00:96::/112.
	ServiceCIDRs []netip.Prefix
	// ControllerManager also starts kube-controller-manager with the controllers that
	// Services need: for EndpointSlices, garbage collection, deleted namespaces, ServiceCIDRs
	// and Service accounts.
	ControllerManager bool
	// Nodes prepares the control plane for kubelets: the API server connects to them, lets
	// each change only its own objects, and requires Service accounts for Pods. With
	// ControllerManager, all default controllers run.
	Nodes bool
	// APIServerArgs and ControllerManagerArgs are additional flags of these programs. They
	// override the flags that this package sets.
	APIServerArgs, ControllerManagerArgs []string
}

func (o Options) validate() error {
	if o.Address.IsUnspecified() {
		return fmt.Errorf("options: Address %s: want an address that clients can connect to", o.Address)
	}
	seen := map[bool]bool{}
	for _, p := range o.ServiceCIDRs {
		if !p.IsValid() || p != p.Masked() {
			return fmt.Errorf("options: ServiceCIDRs: %s is not a network: set the host bits to zero", p)
		}
		if seen[p.Addr().Is4()] {
			return errors.New("options: ServiceCIDRs: two networks of one family")
		}
		seen[p.Addr().Is4()] = true
	}
	return nil
}

// ControlPlane is a running control plane. Its methods may be called concurrently; methods
// that start or stop programs wait for one another.
type ControlPlane struct {
	options    Options
	dir        *tempDir
	programDir string
	keys       *keys
	runner     *runner
	addr       netip.AddrPort
	admin      *http.Client // authenticates to the API server as cluster-admin

	mu                sync.Mutex // held while programs start or stop
	closed            bool
	etcd              *program
	apiserver         *program
	controllerManager *program

	controllerManagerArgs []string // read-only after start
}

// TB is the part of testing.TB that [Start] needs. The package does not import testing,
// because programs use it too.
type TB interface {
	Helper()
	Context() context.Context
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Start calls [New] for a test. It fails the test if the control plane does not become ready,
// and closes it at the end of the test.
func Start(t TB, options Options) *ControlPlane {
	t.Helper()
	cp, err := New(t.Context(), options)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := cp.Close(); err != nil {
			t.Errorf("close the control plane: %v", err)
		}
	})
	return cp
}

// New starts a control plane and returns when the API server is ready; the controller manager
// may still be starting. ctx bounds only the start. The caller must call Close. An error
// contains the last log lines of the program that failed.
func New(ctx context.Context, options Options) (*ControlPlane, error) {
	if !options.Address.IsValid() {
		options.Address = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if len(options.ServiceCIDRs) == 0 {
		options.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")}
	}
	if err := options.validate(); err != nil {
		return nil, fmt.Errorf("control plane: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, DefaultStartTimeout)
	defer cancel()
	cp := &ControlPlane{options: options}
	if err := cp.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start a control plane: %w", err), cp.Close())
	}
	return cp, nil
}

func (cp *ControlPlane) start(ctx context.Context) error {
	var err error
	if cp.programDir, err = findPrograms(cp.options); err != nil {
		return err
	}
	if cp.dir, err = newTempDir(); err != nil {
		return err
	}
	if cp.runner, err = newRunner(cp.options.Namespace, cp.dir.path); err != nil {
		return err
	}
	if err := cp.choosePort(ctx); err != nil {
		return err
	}
	if cp.keys, err = newKeys(cp.dir.path, cp.options.Address, cp.options.ServiceCIDRs); err != nil {
		return err
	}
	client, err := rest.HTTPClientFor(cp.Config())
	if err != nil {
		return fmt.Errorf("create a client: %w", err)
	}
	cp.admin = client

	cp.mu.Lock()
	defer cp.mu.Unlock()
	if err := cp.startEtcd(); err != nil {
		return err
	}
	config := filepath.Join(cp.dir.path, "controller-manager.kubeconfig")
	if err := cp.Kubeconfig(config, "system:kube-controller-manager", "system:masters"); err != nil {
		return err
	}
	cp.controllerManagerArgs = controllerManagerArgs(config)
	if cp.options.Nodes {
		cp.controllerManagerArgs = append(commonControllerManagerArgs(config), nodeControllerArgs(cp.keys)...)
	}
	cp.controllerManagerArgs = append(cp.controllerManagerArgs, cp.options.ControllerManagerArgs...)
	// The API server waits for etcd, so both can start at once.
	return cp.startAPIServer(ctx)
}

// choosePort finds a free port outside of the kernel's range for clients, so that no client
// takes it while the API server restarts.
func (cp *ControlPlane) choosePort(ctx context.Context) error {
	const tries = 50
	var err error
	for range tries {
		cp.addr = netip.AddrPortFrom(cp.options.Address, cp.options.Port)
		if cp.options.Port == 0 {
			cp.addr = netip.AddrPortFrom(cp.options.Address, randomPort())
		}
		err = cp.runner.do(func() error {
			l, err := new(net.ListenConfig).Listen(ctx, "tcp", cp.addr.String())
			if err != nil {
				return err
			}
			return l.Close()
		})
		if err == nil || cp.options.Port != 0 {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("find a port for the API server: %w", err)
	}
	return nil
}

// findPrograms returns the directory of the programs.
func findPrograms(options Options) (string, error) {
	dir, origin := options.Programs, ""
	if dir == "" {
		dir, origin = os.Getenv(ProgramsEnv), " ("+ProgramsEnv+")"
	}
	if dir == "" {
		root, err := moduleRoot()
		if err != nil {
			return "", err
		}
		dir, origin = filepath.Join(root, ".cache", "controlplane"), " (the default)"
	}
	names := []string{etcdName, apiserverName}
	if options.ControllerManager {
		names = append(names, controllerManagerName)
	}
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("no %s in %s%s: run `make controlplane`: %w", name, dir, origin, err)
		}
	}
	return filepath.Abs(dir)
}

// Programs returns the directory of the programs: dir, or if it is empty the directory that
// [New] uses without Options.Programs. It returns an error if etcd or kube-apiserver is
// missing.
func Programs(dir string) (string, error) { return findPrograms(Options{Programs: dir}) }

// Version returns the version of the kube-apiserver in a directory, such as v1.33.1.
func Version(ctx context.Context, dir string) (string, error) {
	dir, err := filepath.Abs(dir) // otherwise "." would mean a lookup in PATH
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, apiserverName)
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("get the version of %s: %w", path, err)
	}
	return strings.TrimPrefix(strings.TrimSpace(string(out)), "Kubernetes "), nil
}

func moduleRoot() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the module root: %w", err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("find the module root: no go.mod in %s or its parents: set %s", start, ProgramsEnv)
		}
	}
}

func (cp *ControlPlane) startEtcd() (err error) {
	cp.etcd, err = cp.runner.start(etcdName, filepath.Join(cp.programDir, etcdName), etcdArgs())
	return err
}

func (cp *ControlPlane) startAPIServer(ctx context.Context) error {
	args := append(cp.apiserverArgs(), cp.options.APIServerArgs...)
	var err error
	cp.apiserver, err = cp.runner.start(apiserverName, filepath.Join(cp.programDir, apiserverName), args)
	if err != nil {
		return err
	}
	if err := cp.waitReady(ctx); err != nil || !cp.options.ControllerManager {
		return err
	}
	cp.controllerManager, err = cp.runner.start(controllerManagerName, filepath.Join(cp.programDir, controllerManagerName), cp.controllerManagerArgs)
	return err
}

// waitReady waits until /readyz succeeds, which includes the creation of the default roles.
func (cp *ControlPlane) waitReady(ctx context.Context) error {
	const period = 50 * time.Millisecond
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	last := errors.New("no request yet")
	for {
		select {
		case <-cp.apiserver.done:
			return cp.apiserver.exitError()
		case <-cp.etcd.done:
			return cp.etcd.exitError()
		case <-ctx.Done():
			return fmt.Errorf("wait for kube-apiserver: %w; /readyz: %w\n%s", ctx.Err(), last, cp.apiserver.logTail())
		case <-ticker.C:
			if last = cp.checkReady(ctx); last == nil {
				return nil
			}
		}
	}
}

func (cp *ControlPlane) checkReady(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, cp.URL()+"/readyz", http.NoBody)
	if err != nil {
		return err
	}
	response, err := cp.admin.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close() //nolint:errcheck // read-only
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// URL returns the URL of the API server, https://HOST:PORT.
func (cp *ControlPlane) URL() string { return "https://" + cp.addr.String() }

// Dir returns a directory for files that must be removed with the control plane. If the
// process is killed, the next control plane removes it.
func (cp *ControlPlane) Dir() string { return cp.dir.path }

// ServiceCIDRs returns the networks for Service addresses.
func (cp *ControlPlane) ServiceCIDRs() []netip.Prefix { return cp.options.ServiceCIDRs }

// StopAPIServer kills the API server, if it is running, like a crash: connections break, and
// none succeeds until StartAPIServer. It also kills the controller manager, which otherwise
// might wait for half a minute before it retries. etcd keeps running.
func (cp *ControlPlane) StopAPIServer() error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.closed {
		return fmt.Errorf("stop kube-apiserver: %w", os.ErrClosed)
	}
	var errs []error
	if cp.controllerManager != nil {
		errs = append(errs, cp.controllerManager.stop())
	}
	return errors.Join(append(errs, cp.apiserver.stop())...)
}

// StartAPIServer starts the API server again at the same address, and the controller manager
// if Options request it. It returns when the API server is ready.
func (cp *ControlPlane) StartAPIServer(ctx context.Context) error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.closed {
		return fmt.Errorf("start kube-apiserver: %w", os.ErrClosed)
	}
	select {
	case <-cp.apiserver.done:
	default:
		return errors.New("start kube-apiserver: already running: stop it first")
	}
	ctx, cancel := context.WithTimeout(ctx, DefaultStartTimeout)
	defer cancel()
	// Idle connections to the previous process would fail the first request.
	cp.admin.CloseIdleConnections()
	if err := cp.startAPIServer(ctx); err != nil {
		return fmt.Errorf("start kube-apiserver again: %w", err)
	}
	return nil
}

// APIServerPID returns the process ID of the running API server. StartAPIServer changes it.
func (cp *ControlPlane) APIServerPID() (int, error) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.closed {
		return 0, fmt.Errorf("process ID of kube-apiserver: %w", os.ErrClosed)
	}
	select {
	case <-cp.apiserver.done:
		return 0, fmt.Errorf("process ID of kube-apiserver: %w", os.ErrProcessDone)
	default:
		return cp.apiserver.cmd.Process.Pid, nil
	}
}

// Log returns the last log lines of etcd, kube-apiserver or kube-controller-manager, for
// failure messages of tests.
func (cp *ControlPlane) Log(name string) string {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	for _, p := range []*program{cp.etcd, cp.apiserver, cp.controllerManager} {
		if p != nil && p.name == name {
			return p.logTail()
		}
	}
	return ""
}

// Close ends the programs, waits until they have exited, and removes their files. Calling
// Close again does nothing.
func (cp *ControlPlane) Close() error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.closed {
		return nil
	}
	cp.closed = true
	var errs []error
	for _, p := range []*program{cp.controllerManager, cp.apiserver, cp.etcd} {
		if p != nil {
			errs = append(errs, p.stop())
		}
	}
	if cp.runner != nil {
		cp.runner.close()
	}
	if cp.admin != nil {
		cp.admin.CloseIdleConnections()
	}
	if cp.dir != nil {
		errs = append(errs, cp.dir.remove())
	}
	return errors.Join(errs...)
}

// Config returns a client configuration with all permissions: user admin in group
// system:masters. It has no request rate limit. The caller may modify it.
func (cp *ControlPlane) Config() *rest.Config {
	config := &rest.Config{
		Host:  cp.URL(),
		QPS:   -1,
		Burst: -1,
		TLSClientConfig: rest.TLSClientConfig{
			CAData:   cp.keys.ca.certPEM,
			CertData: cp.keys.admin.certPEM,
			KeyData:  cp.keys.admin.keyPEM,
		},
	}
	if ns := cp.options.Namespace; ns != nil {
		config.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			to, err := netip.ParseAddrPort(addr)
			if err != nil {
				return nil, fmt.Errorf("connect to the API server: %w", err)
			}
			return ns.Dial(ctx, network, to)
		}
	}
	return config
}

// Store writes values directly to etcd, by key. The API server does not see these writes, so
// it neither validates objects nor allocates addresses or UIDs. It reads objects in JSON. Use
// Store to create many Services: for each Service, the API server searches all Service
// addresses.
func (cp *ControlPlane) Store(ctx context.Context, values map[string][]byte) error {
	if err := putAll(ctx, cp.socket(), values); err != nil {
		return fmt.Errorf("write to etcd: %w", err)
	}
	return nil
}

func (cp *ControlPlane) socket() string { return filepath.Join(cp.dir.path, "etcd.sock") }

// CertPool returns the certificate authority of the API server's certificate.
func (cp *ControlPlane) CertPool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(cp.keys.ca.cert)
	return pool
}

// CAFile returns the file with the certificate authority of all certificates, which
// [ControlPlane.Dir] contains.
func (cp *ControlPlane) CAFile() string { return cp.keys.ca.certFile }

func etcdArgs() []string {
	// Unix sockets relative to the working directory of the programs need no free port, and
	// work in every network namespace.
	const client, peer = "unix://etcd.sock", "unix://peer.sock"
	return []string{
		"--name=etcd",
		"--data-dir=" + dataDir,
		"--listen-client-urls=" + client,
		"--advertise-client-urls=" + client,
		"--listen-peer-urls=" + peer,
		"--initial-advertise-peer-urls=" + peer,
		"--initial-cluster=etcd=" + peer,
		"--unsafe-no-fsync",
		"--log-level=warn",
	}
}

func (cp *ControlPlane) apiserverArgs() []string {
	cidrs := make([]string, 0, len(cp.options.ServiceCIDRs))
	for _, p := range cp.options.ServiceCIDRs {
		cidrs = append(cidrs, p.String())
	}
	k := cp.keys
	args := []string{
		// The default is the address of the default route.
		"--advertise-address=" + cp.addr.Addr().String(),
		"--etcd-servers=unix://etcd.sock",
		"--bind-address=" + cp.addr.Addr().String(),
		fmt.Sprintf("--secure-port=%d", cp.addr.Port()),
		"--tls-cert-file=" + k.serving.certFile,
		"--tls-private-key-file=" + k.serving.keyFile,
		"--client-ca-file=" + k.ca.certFile,
		"--authorization-mode=Node,RBAC",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + k.serviceAccount.keyFile,
		"--service-account-signing-key-file=" + k.serviceAccount.keyFile,
		"--service-cluster-ip-range=" + strings.Join(cidrs, ","),
		"--allow-privileged",
		"--profiling=false",
		// Requests of one test must not wait for requests of another.
		"--enable-priority-and-fairness=false",
		"--max-requests-inflight=0",
		"--max-mutating-requests-inflight=0",
	}
	if cp.addr.Addr().IsLoopback() {
		// Endpoints must not be loopback addresses.
		args = append(args, "--endpoint-reconciler-type=none")
	}
	if cp.options.Nodes {
		return append(args,
			"--enable-admission-plugins=NodeRestriction",
			"--kubelet-client-certificate="+k.admin.certFile,
			"--kubelet-client-key="+k.admin.keyFile,
			"--kubelet-preferred-address-types=InternalIP",
		)
	}
	// Otherwise Pods would have to wait for the Service accounts of new namespaces, which only a
	// controller manager creates.
	return append(args, "--disable-admission-plugins=ServiceAccount")
}

// nodeControllerArgs are the flags of controllers that [Options.Nodes] adds.
func nodeControllerArgs(k *keys) []string {
	return []string{
		"--use-service-account-credentials",
		"--root-ca-file=" + k.ca.certFile,
		"--service-account-private-key-file=" + k.serviceAccount.keyFile,
		"--cluster-signing-cert-file=" + k.ca.certFile,
		"--cluster-signing-key-file=" + k.ca.keyFile,
		"--allocate-node-cidrs=false",
	}
}

func controllerManagerArgs(kubeconfig string) []string {
	return append(commonControllerManagerArgs(kubeconfig),
		"--controllers="+strings.Join([]string{
			"endpointslice-controller",
			"endpointslice-mirroring-controller",
			"garbage-collector-controller",
			"namespace-controller",
			"root-ca-certificate-publisher-controller",
			"service-cidr-controller",
			"serviceaccount-controller",
		}, ","),
	)
}

func commonControllerManagerArgs(kubeconfig string) []string {
	return []string{
		"--kubeconfig=" + kubeconfig,
		"--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--secure-port=0",
		"--leader-elect=false",
		"--profiling=false",
		"--kube-api-qps=500",
		"--kube-api-burst=1000",
		"--concurrent-service-endpoint-syncs=10",
	}
}

// Compact deletes all but the current revisions from etcd. Watches from an older resource
// version then fail with 410 Gone, unless the API server's cache still has that version.
// After a restart of the API server the cache is empty.
func (cp *ControlPlane) Compact(ctx context.Context) error {
	if err := compact(ctx, cp.socket()); err != nil {
		return fmt.Errorf("compact etcd: %w", err)
	}
	return nil
}
