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

// The apps: what the labels of pods say, and the names of their Services.
const (
	frontendApp   = "frontend"
	backendApp    = "backend"
	redisApp      = "redis"
	publicService = "public" // a second Service of the back ends
)

const (
	httpPort = 8080 // of back ends
	dnsPort  = 53   // of the node
	// requestCounter is what back ends count requests with, in Redis.
	requestCounter = "hits"
	// serviceCIDRs are where the Services get their addresses from.
	serviceCIDRs = "10.96.0.0/16,fd00:10:96::/112"
)

// cluster is a node with pods, and a fairlead that runs on it.
type cluster struct {
	opts      options
	cleanup   *cleanupStack
	net       *nettest.Network
	temp      string // the folder that holds all files
	manifests string // the folder that fairlead watches
	pods      []*pod // in the order that they were made in
	fairlead  *process
	command   []string // how fairlead was started
	log       *agentLog
}

// pod is a pod and what runs in it.
type pod struct {
	*nettest.Host
	app         string
	description string       // runs in it
	stop        func() error // may be called again
}

// newCluster makes the cluster with its first pods and Services. What it makes
// is added to u, also when it fails.
func newCluster(ctx context.Context, o options, u *cleanupStack) (*cluster, error) {
	c := &cluster{opts: o, cleanup: u}
	var err error
	var removeTemp func() error
	if c.temp, removeTemp, err = makeTemp(); err != nil {
		return nil, fmt.Errorf("make a folder: %w", err)
	}
	u.add(removeTemp)
	c.manifests = filepath.Join(c.temp, "manifests")
	if err := os.Mkdir(c.manifests, 0o755); err != nil { //nolint:gosec // for people to look at
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
			"and all of root's capabilities, which containers have with --privileged only", err)
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

// addPod makes a pod and starts what is to run in it. Until announce, nobody
// knows of it.
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

// createManifest writes the pod's manifest, which says that it is ready.
func (c *cluster) createManifest(p *pod) error {
	if err := c.writeManifest(p.Name, p.manifest()); err != nil {
		return fmt.Errorf("pod %s: %w", p.Name, err)
	}
	return nil
}

// deleteManifest removes the pod's manifest: the pod is to be used no more.
func (c *cluster) deleteManifest(p *pod) error { return os.Remove(c.manifestFile(p.Name)) }

// removePod ends what runs in the pod, and the pod.
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

// writeManifest puts a file into the folder that fairlead watches, by renaming
// it, so that fairlead sees it whole.
func (c *cluster) writeManifest(name string, text []byte) error {
	draft := filepath.Join(c.temp, name+".draft")
	if err := os.WriteFile(draft, text, 0o644); err != nil { //nolint:gosec // for people to look at
		return err
	}
	return os.Rename(draft, c.manifestFile(name))
}

// manifest returns what a cluster would know of the pod, as YAML.
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

// startBackend serves HTTP on all addresses of a pod. Each request is counted
// in Redis, which is found by the name of its Service, and answered with the
// pod's name.
func (c *cluster) startBackend(ctx context.Context, host *nettest.Host) (stop func() error, err error) {
	names := c.resolver(host)
	server := &http.Server{
		ReadHeaderTimeout: requestTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			conn, err := names.dial(r.Context(), "tcp", fmt.Sprintf("%s:%d", redisApp, redisPort))
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
		go func() { _ = server.Serve(l) }() // It ends, always with an error, with stop.
	}
	return stop, nil
}

// startFairlead starts fairlead on the node, and returns when the kernel has
// the Services and their names are answered.
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
	}
	c.fairlead, err = startProcess(ctx, c.net.Node.Namespace, c.log, program, c.command...)
	if err != nil {
		return err
	}
	c.cleanup.add(c.fairlead.stop)
	if _, err := c.log.waitCommit(ctx, c.fairlead, 0); err != nil {
		return err
	}
	// fairlead programs the kernel before it knows the names.
	names := c.resolver(c.podsOf(frontendApp)[0].Host)
	for _, service := range []string{backendApp, redisApp} {
		err := eventually(ctx, func() error {
			_, err := names.lookup(ctx, service)
			return err
		})
		if err != nil {
			return fmt.Errorf("find the Service %s by name: %w", service, err)
		}
	}
	return nil
}

func (c *cluster) logFile() string { return filepath.Join(c.temp, "fairlead.log") }

func (c *cluster) nameServer() netip.AddrPort { return netip.AddrPortFrom(c.net.Node.IPv4, dnsPort) }

// eventually calls try until it returns nil or a [permanentError] error, for a few
// seconds.
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

// permanentError is an error that does not go away.
type permanentError struct{ error }

func (f permanentError) Unwrap() error { return f.error }
