package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

// Apps: the values of the pods' label app, and the names of their Services.
const (
	frontendApp   = "frontend"
	backendApp    = "backend"
	redisApp      = "redis"
	publicService = "public" // a second Service of the back ends
)

const (
	httpPort = 8080 // of back ends
	dnsPort  = 53   // of the node
	// requestCounter is the Redis key in which back ends count requests.
	requestCounter = "hits"
	// serviceCIDRs are the networks that contain the addresses of Services.
	serviceCIDRs = "10.96.0.0/16,fd00:10:96::/112"
)

// cluster is a node with pods and a running fairlead.
type cluster struct {
	opts      options
	cleanup   *cleanupStack
	net       *nettest.Network
	temp      string // directory of all files
	manifests string // directory that fairlead watches
	pods      []*pod // in the order of their creation
	fairlead  *process
	command   []string // arguments of fairlead
	log       *agentLog
}

// pod is a pod and its program.
type pod struct {
	*nettest.Host
	app         string
	description string       // of the program in the pod
	stop        func() error // may be called more than once
}

// newCluster creates the cluster with its initial pods and Services. It adds everything it creates
// to u, also if it fails.
func newCluster(ctx context.Context, o options, u *cleanupStack) (*cluster, error) {
	c := &cluster{opts: o, cleanup: u}
	var err error
	var removeTemp func() error
	if c.temp, removeTemp, err = makeTemp(); err != nil {
		return nil, fmt.Errorf("create a temporary directory: %w", err)
	}
	u.add(removeTemp)
	c.manifests = filepath.Join(c.temp, "manifests")
	if err := os.Mkdir(c.manifests, 0o755); err != nil { //nolint:gosec // readable for users
		return nil, err
	}
	for _, service := range []string{backendApp, redisApp} {
		text, err := os.ReadFile(filepath.Join(o.services, service+".yaml"))
		if err != nil {
			return nil, err
		}
		if err := c.writeManifest("service-"+service, text); err != nil {
			return nil, err
		}
	}

	var netOptions nettest.Options
	if o.keep {
		netOptions.Name = o.name
	}
	c.net, err = nettest.New(netOptions)
	if err != nil {
		return nil, fmt.Errorf("%w\nThe demo needs a kernel with network namespaces, veth, IPv6 and nf_tables, "+
			"and all of root's capabilities, which containers have only with --privileged", err)
	}
	u.add(c.net.Close)
	if o.keep {
		u.add(func() error { return removeNetnsConfig(o.name + "-*") })
	}
	for _, p := range []struct {
		app   string
		count int
	}{{frontendApp, 3}, {backendApp, 3}, {redisApp, 1}} {
		for i := range p.count {
			name := fmt.Sprintf("%s-%d", p.app, i+1)
			if p.count == 1 {
				name = p.app
			}
			pod, err := c.addPod(ctx, p.app, name)
			if err == nil {
				err = c.createManifest(pod)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return c, c.startFairlead(ctx)
}

// addPod creates a pod and starts its program. The Service does not include the pod before
// createManifest.
func (c *cluster) addPod(ctx context.Context, app, name string) (*pod, error) {
	host, err := c.net.AddPod(name)
	if err != nil {
		return nil, err
	}
	p := &pod{Host: host, app: app}
	if c.opts.keep {
		if err := addNetnsConfig(c.opts.name+"-"+name, c.resolvConf()); err != nil {
			return nil, fmt.Errorf("pod %s: %w", name, err)
		}
	}
	var stop func() error
	switch app {
	case frontendApp:
		p.description = "an HTTP client"
	case backendApp:
		p.description = fmt.Sprintf("an HTTP server on port %d", httpPort)
		stop, err = c.startBackend(ctx, host)
	case redisApp:
		p.description, stop, err = startRedis(ctx, host, c.temp)
	}
	if err != nil {
		return nil, fmt.Errorf("pod %s: %w", name, err)
	}
	p.stop = sync.OnceValue(func() error {
		if stop == nil {
			return nil
		}
		return stop()
	})
	c.cleanup.add(p.stop)
	c.pods = append(c.pods, p)
	return p, nil
}

// createManifest writes the pod's manifest with the status ready.
func (c *cluster) createManifest(p *pod) error {
	if err := c.writeManifest(p.Name, p.manifest()); err != nil {
		return fmt.Errorf("pod %s: %w", p.Name, err)
	}
	return nil
}

// deleteManifest removes the pod's manifest, which removes the pod from its Service.
func (c *cluster) deleteManifest(p *pod) error { return os.Remove(c.manifestFile(p.Name)) }

// removePod ends the pod's program and removes the pod.
func (c *cluster) removePod(p *pod) error {
	c.pods = slices.DeleteFunc(c.pods, func(other *pod) bool { return other == p })
	err := errors.Join(p.stop(), p.Close())
	if c.opts.keep {
		err = errors.Join(err, removeNetnsConfig(c.opts.name+"-"+p.Name))
	}
	return err
}

// podsOf returns the pods of an app.
func (c *cluster) podsOf(app string) []*pod {
	var pods []*pod
	for _, p := range c.pods {
		if p.app == app {
			pods = append(pods, p)
		}
	}
	return pods
}

func (c *cluster) manifestFile(name string) string {
	return filepath.Join(c.manifests, name+".yaml")
}

// writeManifest writes a file in the directory that fairlead watches. It renames the file into
// place, so that fairlead never reads an incomplete file.
func (c *cluster) writeManifest(name string, text []byte) error {
	draft := filepath.Join(c.temp, name+".draft")
	if err := os.WriteFile(draft, text, 0o644); err != nil { //nolint:gosec // readable for users
		return err
	}
	return os.Rename(draft, c.manifestFile(name))
}

// manifest returns the Pod object as YAML.
func (p *pod) manifest() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Pod\nmetadata:\n  name: %s\n  labels:\n    app: %s\n", p.Name, p.app)
	fmt.Fprintf(&b, "spec:\n  containers:\n    - name: %s\n", p.app)
	switch p.app {
	case backendApp:
		fmt.Fprintf(&b, "      ports:\n        - name: http\n          containerPort: %d\n", httpPort)
	case redisApp:
		fmt.Fprintf(&b, "      ports:\n        - name: redis\n          containerPort: %d\n", redisPort)
	}
	b.WriteString("status:\n  phase: Running\n  conditions:\n    - type: Ready\n      status: \"True\"\n  podIPs:\n")
	for _, addr := range p.Addrs() {
		fmt.Fprintf(&b, "    - ip: %s\n", addr)
	}
	return []byte(b.String())
}

// startBackend serves HTTP on all addresses of a pod. For each request, it increments a counter in
// Redis, which it finds by the name of its Service, and responds with the name of the pod.
func (c *cluster) startBackend(ctx context.Context, host *nettest.Host) (stop func() error, err error) {
	resolver := c.resolver(host)
	server := &http.Server{
		ReadHeaderTimeout: requestTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			conn, err := resolver.dial(r.Context(), "tcp", fmt.Sprintf("%s:%d", redisApp, redisPort))
			if err == nil {
				_, err = redisCommand(r.Context(), conn, "INCR", requestCounter)
			}
			if err != nil {
				http.Error(w, fmt.Sprintf("%s: count the request: %v", host.Name, err), http.StatusServiceUnavailable)
				return
			}
			_, _ = io.WriteString(w, host.Name+"\n")
		}),
	}
	stop = func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			return server.Close()
		}
		return nil
	}
	for _, addr := range host.Addrs() {
		l, err := host.Listen(ctx, "tcp", netip.AddrPortFrom(addr, httpPort))
		if err != nil {
			return nil, errors.Join(err, stop())
		}
		go func() { _ = server.Serve(l) }() // returns an error when stop is called
	}
	return stop, nil
}

// startFairlead starts fairlead on the node. It returns when the kernel has the Services and the
// name server answers for them.
func (c *cluster) startFairlead(ctx context.Context) error {
	program, err := filepath.Abs(c.opts.fairlead)
	if err != nil {
		return err
	}
	file, err := os.Create(c.logFile())
	if err != nil {
		return err
	}
	c.cleanup.add(file.Close)
	c.log = newAgentLog(file)
	pods := make([]string, 0, len(c.net.PodCIDRs))
	for _, p := range c.net.PodCIDRs {
		pods = append(pods, p.String())
	}
	c.command = []string{
		"run", "--mode=" + c.opts.mode, "--manifests=" + c.manifests, "--service-cidr=" + serviceCIDRs,
		"--cluster-cidr=" + strings.Join(pods, ","), "--dns-listen=" + c.nameServer().String(),
		"--hostname-override=node", "--log-level=debug", "--log-format=json",
		"--conntrack-max-per-core=0", // the maximum belongs to the host
	}
	c.fairlead, err = startProcess(ctx, c.net.Node.Namespace, c.log, program, c.command...)
	if err != nil {
		return err
	}
	c.cleanup.add(c.fairlead.stop)
	if _, err := c.log.waitCommit(ctx, c.fairlead, 0); err != nil {
		return err
	}
	// fairlead programs the kernel before the name server has the names.
	resolver := c.resolver(c.podsOf(frontendApp)[0].Host)
	for _, service := range []string{backendApp, redisApp} {
		err := eventually(ctx, func() error {
			_, err := resolver.lookup(ctx, service)
			return err
		})
		if err != nil {
			return fmt.Errorf("look up the Service %s: %w", service, err)
		}
	}
	return nil
}

func (c *cluster) logFile() string { return filepath.Join(c.temp, "fairlead.log") }

func (c *cluster) nameServer() netip.AddrPort { return netip.AddrPortFrom(c.net.Node.IPv4, dnsPort) }

// eventually calls try until it returns nil or a [permanentError], for at most 5 s.
func eventually(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		err := try()
		if err == nil || errors.As(err, new(permanentError)) {
			return err
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		}
	}
}

// permanentError is an error that repeated attempts cannot resolve.
type permanentError struct{ error }

func (f permanentError) Unwrap() error { return f.error }
