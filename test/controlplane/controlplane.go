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

// ProgramsEnv names the environment variable that says where the programs etcd,
// kube-apiserver and kube-controller-manager are. Without it they are where
// `make controlplane` puts them, in .cache/controlplane below the root of the
// module that the working directory is in.
const ProgramsEnv = "FAIRLEAD_CONTROLPLANE"

// The programs by their names.
const (
	etcdName              = "etcd"
	apiserverName         = "kube-apiserver"
	controllerManagerName = "kube-controller-manager"
)

// DefaultStartTimeout is how long [New] waits for readiness, unless its context
// ends before. It takes some seconds on an idle machine.
const DefaultStartTimeout = 2 * time.Minute

// Namespace is where the programs run. [fairlead.io/fairlead/internal/nettest.Namespace] is
// one.
type Namespace interface {
	// Fd is the file descriptor of the network namespace.
	Fd() int
	// Dial connects from the namespace.
	Dial(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)
}

// Options say how a control plane is started. The zero value is usable.
type Options struct {
	// Programs is the folder with the programs. Unset, it is the one that [ProgramsEnv] names,
	// or the default.
	Programs string
	// Namespace is the network namespace that the API server listens in and
	// the configurations of Config connect from. Unset, it is the caller's.
	Namespace Namespace
	// Address is where the API server listens. It must be an address in the
	// namespace. Unset, it is 127.0.0.1. Anything but a loopback address is
	// also the endpoint of the Service default/kubernetes, which has none
	// otherwise.
	Address netip.Addr
	// Port is where the API server listens. 0 means a free one.
	Port uint16
	// ServiceCIDRs are what Services get their addresses from, one network a
	// family, the primary family first. Unset they are 10.96.0.0/16 and
	// fd00:96::/112.
	ServiceCIDRs []netip.Prefix
	// ControllerManager starts kube-controller-manager too, with the
	// controllers that Services need: those that write EndpointSlices, collect
	// garbage, empty namespaces that end, and look after ServiceCIDRs and
	// Service accounts.
	ControllerManager bool
	// APIServerArgs and ControllerManagerArgs are further flags for these
	// programs. A flag that is set by this package too is overridden.
	APIServerArgs, ControllerManagerArgs []string
}

func (o Options) validate() error {
	if o.Address.IsUnspecified() {
		return fmt.Errorf("options: Address %s: want an address that clients can connect to", o.Address)
	}
	seen := map[bool]bool{}
	for _, p := range o.ServiceCIDRs {
		if !p.IsValid() || p != p.Masked() {
			return fmt.Errorf("options: ServiceCIDRs: %s is no network; set host bits to zero", p)
		}
		if seen[p.Addr().Is4()] {
			return errors.New("options: ServiceCIDRs: two networks of one family")
		}
		seen[p.Addr().Is4()] = true
	}
	return nil
}

// ControlPlane is a running control plane. Its methods may be called
// concurrently, except that those which start and stop programs wait for one
// another.
type ControlPlane struct {
	options    Options
	dir        *tempDir
	programDir string
	keys       *keys
	runner     *runner
	addr       netip.AddrPort
	admin      *http.Client // speaks to the API server as cluster-admin

	mu                sync.Mutex // held while programs are started or stopped
	closed            bool
	etcd              *program
	apiserver         *program
	controllerManager *program

	controllerManagerArgs []string // set before programs start
}

// TB is the part of testing.TB that [Start] needs. The package does not import
// testing, for the sake of programs.
type TB interface {
	Helper()
	Context() context.Context
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Start is [New] for a test: it fails the test if the control plane does not
// get ready, and closes it when the test ends.
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

// New starts a control plane and returns when the API server is ready. The
// controller manager is then starting. ctx bounds the start only. Everything
// that was started is ended by Close. An error has the last lines of the log of
// the program that failed.
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
		return fmt.Errorf("make a client: %w", err)
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
	cp.controllerManagerArgs = append(controllerManagerArgs(config), cp.options.ControllerManagerArgs...)
	// The API server waits for etcd by itself, so both start at once.
	return cp.startAPIServer(ctx)
}

// choosePort finds a free port below those that the kernel gives to clients, so
// that no client takes it while the API server restarts.
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

// findPrograms returns the folder of the programs.
func findPrograms(options Options) (string, error) {
	dir, from := options.Programs, ""
	if dir == "" {
		dir, from = os.Getenv(ProgramsEnv), " ("+ProgramsEnv+")"
	}
	if dir == "" {
		root, err := moduleRoot()
		if err != nil {
			return "", err
		}
		dir, from = filepath.Join(root, ".cache", "controlplane"), " (the default)"
	}
	names := []string{etcdName, apiserverName}
	if options.ControllerManager {
		names = append(names, controllerManagerName)
	}
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("no %s in %s%s: run `make controlplane`: %w", name, dir, from, err)
		}
	}
	return filepath.Abs(dir)
}

// Programs returns the folder that the programs are in: dir, or if that is empty the
// one that [New] takes without Programs. The error says that etcd or kube-apiserver
// is not there.
func Programs(dir string) (string, error) { return findPrograms(Options{Programs: dir}) }

// Version returns what the kube-apiserver in a folder of programs says it is, such as
// v1.33.1.
func Version(ctx context.Context, dir string) (string, error) {
	dir, err := filepath.Abs(dir) // in the folder "." too, and not in PATH
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, apiserverName)
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", path, err)
	}
	return strings.TrimPrefix(strings.TrimSpace(string(out)), "Kubernetes "), nil
}

func moduleRoot() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the module's root: %w", err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("find the module's root: no go.mod in %s or above; set %s", start, ProgramsEnv)
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

// waitReady returns when /readyz says so: not before the roles are there.
func (cp *ControlPlane) waitReady(ctx context.Context) error {
	const period = 50 * time.Millisecond
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	last := errors.New("not asked yet")
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
	defer response.Body.Close() //nolint:errcheck // only read from
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// URL returns the address of the API server, https://HOST:PORT.
func (cp *ControlPlane) URL() string { return "https://" + cp.addr.String() }

// Dir returns a folder for files that are to go with the control plane, also if
// the process is killed: then the next control plane removes it.
func (cp *ControlPlane) Dir() string { return cp.dir.path }

// ServiceCIDRs returns what Services get their addresses from.
func (cp *ControlPlane) ServiceCIDRs() []netip.Prefix { return cp.options.ServiceCIDRs }

// StopAPIServer ends the API server at once, as a crash would: connections break
// and none is accepted until StartAPIServer. The controller manager ends with
// it, which otherwise would wait for up to half a minute before it tries again;
// etcd goes on. It is no error if it is stopped already.
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

// StartAPIServer starts the API server again at the same address, and with it the
// controller manager, if there is one. It returns when the API server is ready.
func (cp *ControlPlane) StartAPIServer(ctx context.Context) error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.closed {
		return fmt.Errorf("start kube-apiserver: %w", os.ErrClosed)
	}
	select {
	case <-cp.apiserver.done:
	default:
		return errors.New("start kube-apiserver: it is running; stop it first")
	}
	ctx, cancel := context.WithTimeout(ctx, DefaultStartTimeout)
	defer cancel()
	// Connections that the last one left behind would fail the first request.
	cp.admin.CloseIdleConnections()
	if err := cp.startAPIServer(ctx); err != nil {
		return fmt.Errorf("start kube-apiserver again: %w", err)
	}
	return nil
}

// Log returns the last lines that a program has written: etcd, kube-apiserver
// or kube-controller-manager. It is for the messages of tests that fail.
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

// Close ends the programs and removes what they wrote. When it returns they
// have ended. Closing twice is no error.
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

// Config returns a configuration for clients with all rights, the user admin of
// the group system:masters. It is not limited in requests per second. The
// caller may change it.
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

// Store writes values straight into etcd, by their keys, and so past all that the
// API server does with an object: it neither checks it nor gives it an address
// or a UID. It reads objects from JSON. For a test that needs many: the API
// server goes through all addresses of Services for each that it gives.
func (cp *ControlPlane) Store(ctx context.Context, values map[string][]byte) error {
	if err := putAll(ctx, cp.socket(), values); err != nil {
		return fmt.Errorf("write into etcd: %w", err)
	}
	return nil
}

func (cp *ControlPlane) socket() string { return filepath.Join(cp.dir.path, "etcd.sock") }

// CertPool returns the authority that the API server's certificate is from.
func (cp *ControlPlane) CertPool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(cp.keys.ca.cert)
	return pool
}

func etcdArgs() []string {
	// Sockets, relative to the folder that the programs run in: no port to
	// find, and the same in every network namespace.
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
		// Otherwise it looks for the address of the default route.
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
		// Pods would have to wait for the Service accounts of new namespaces,
		// which need a controller manager.
		"--disable-admission-plugins=ServiceAccount",
		"--profiling=false",
		// One test's requests must not wait for another's.
		"--enable-priority-and-fairness=false",
		"--max-requests-inflight=0",
		"--max-mutating-requests-inflight=0",
	}
	if cp.addr.Addr().IsLoopback() {
		// An endpoint must not be a loopback address.
		args = append(args, "--endpoint-reconciler-type=none")
	}
	return args
}

func controllerManagerArgs(kubeconfig string) []string {
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
		"--controllers=" + strings.Join([]string{
			"endpointslice-controller",
			"endpointslice-mirroring-controller",
			"garbage-collector-controller",
			"namespace-controller",
			"root-ca-certificate-publisher-controller",
			"service-cidr-controller",
			"serviceaccount-controller",
		}, ","),
	}
}

// Compact makes etcd forget the past, and with it all resource versions but the
// current ones. Watches that begin, or are resumed, at an older one answer 410
// Gone; so do those that the API server's cache holds no longer, after a
// restart.
func (cp *ControlPlane) Compact(ctx context.Context) error {
	if err := compact(ctx, cp.socket()); err != nil {
		return fmt.Errorf("compact etcd: %w", err)
	}
	return nil
}
