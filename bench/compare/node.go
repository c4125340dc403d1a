package compare

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"fairlead/bench/apiserver"
	"fairlead/bench/cluster"
	"fairlead/bench/rig"
	"fairlead/bench/system"
)

// apiPort is where a node's API server listens, at its loopback address.
const apiPort = 8080

// node is one system's node, with the API that it sees.
type node struct {
	sys    system.System
	env    system.Environment
	rig    *rig.Rig
	probe  *rig.Probe
	api    *apiserver.Server
	server *http.Server

	begin   time.Time // of the system
	running system.Running
	settled time.Time // when it was last seen to have done what it was told

	mu       sync.Mutex
	clock    *apiserver.Clock
	services []*cluster.Service // as the API has them
	fresh    int                // the number of the next unused address
	reserved int                // the Service that any does not return
}

// newNode makes a node without a system. The content is what its API serves first.
func newNode(ctx context.Context, sys system.System, dir string, c *content) (_ *node, err error) {
	n := &node{sys: sys, clock: c.clock, services: append([]*cluster.Service(nil), c.services...), api: apiserver.New(), reserved: -1}
	n.fresh = len(c.services) * c.endpoints
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make a node for %s: %w", sys.Name(), err), n.close())
		}
	}()
	if n.rig, err = rig.New(rig.Options{}); err != nil {
		return nil, err
	}
	if n.probe, err = n.rig.NewProbe(); err != nil {
		return nil, err
	}
	nodeObject, err := c.clock.Version(cluster.Node(n.rig.Node.IPv4))
	if err != nil {
		return nil, err
	}
	n.api.Put(c.versions...)
	n.api.Put(nodeObject)
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), apiPort)
	listener, err := n.rig.Node.Listen(ctx, "tcp4", at)
	if err != nil {
		return nil, err
	}
	n.server = &http.Server{
		Handler: n.api, ReadHeaderTimeout: time.Minute,
		// Requests end with the server, which Close alone does not tell them.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	go func() { _ = n.server.Serve(listener) }() // returns when it is closed
	n.env = system.Environment{
		Namespace: n.rig.Node.Namespace, APIServer: "http://" + at.String(), Kubeconfig: filepath.Join(dir, "kubeconfig"),
		ClusterCIDR: rig.ClusterCIDR, ServiceCIDR: rig.ServiceCIDR, NodeName: cluster.NodeName, Dir: dir,
	}
	return n, writeKubeconfig(n.env)
}

// writeKubeconfig writes how the API server is reached: without TLS, so that no
// system spends time on it.
func writeKubeconfig(env system.Environment) error {
	text := `apiVersion: v1
kind: Config
clusters:
- name: bench
  cluster: {server: "` + env.APIServer + `"}
users:
- name: bench
contexts:
- name: bench
  context: {cluster: bench, user: bench}
current-context: bench
`
	if err := os.WriteFile(env.Kubeconfig, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write a kubeconfig: %w", err)
	}
	return nil
}

// start starts the system.
func (n *node) start(ctx context.Context) error {
	n.begin = time.Now()
	running, err := n.sys.Start(ctx, n.env)
	if err != nil {
		return err
	}
	n.running = running
	return nil
}

// whileRunning returns a context that is done when the system ends.
func (n *node) whileRunning(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if p, ok := n.running.(interface{ Done() <-chan struct{} }); ok {
		go func() {
			select {
			case <-ctx.Done():
			case <-p.Done():
				cancel(fmt.Errorf("%s has ended by itself: %s", n.sys.Name(), n.lastWords()))
			}
		}()
	}
	return ctx, func() { cancel(context.Canceled) }
}

// lastWords returns the end of the system's log.
func (n *node) lastWords() string {
	log, err := os.ReadFile(filepath.Join(n.env.Dir, n.sys.Name()+".log"))
	if err != nil {
		return err.Error()
	}
	const most = 3
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	return strings.Join(lines[max(0, len(lines)-most):], " | ")
}

// usage returns what the system uses.
func (n *node) usage() (system.Usage, error) { return system.UsageOf(n.running.PID()) }

// quiesce waits until the system uses no processor time, within reason.
func (n *node) quiesce(ctx context.Context) error {
	const step, most, idle, busy = 250 * time.Millisecond, 20 * time.Second, 3, 10 * time.Millisecond
	last, err := n.usage()
	if err != nil {
		return err
	}
	for quiet, end := 0, time.Now().Add(most); quiet < idle && time.Now().Before(end); {
		if err := sleep(ctx, step); err != nil {
			return err
		}
		now, err := n.usage()
		if err != nil {
			return err
		}
		if quiet++; now.CPU()-last.CPU() > busy {
			quiet = 0
		}
		last = now
	}
	return nil
}

// settle waits until the system has had time since its last change, and a little
// that is random, so that nothing periodic is always met at the same time.
func (n *node) settle(ctx context.Context, d time.Duration) error {
	jitter := time.Duration(rand.Int64N(int64(d/8) + 1)) //nolint:gosec // no secret
	return sleep(ctx, time.Until(n.settled.Add(d+jitter)))
}

// address returns an address of an endpoint that was not used before.
func (n *node) address(watched bool) netip.Addr {
	n.fresh++
	if watched {
		return cluster.Watched(n.fresh)
	}
	return cluster.New(n.fresh, 1).Endpoints[0]
}

// any returns a Service drawn at random, but not the reserved one.
func (n *node) any() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		if i := rand.IntN(len(n.services)); i != n.reserved { //nolint:gosec // no secret
			return i
		}
	}
}

// reserve returns a Service drawn at random, that any does not return until the
// next call.
func (n *node) reserve() int {
	i := n.any()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.reserved = i
	return i
}

// change hands a changed list of endpoints to the system, and returns when it did.
func (n *node) change(i int, to func(*cluster.Service) *cluster.Service) (time.Time, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.services[i] = to(n.services[i])
	v, err := n.clock.Version(n.services[i].Slice())
	if err != nil {
		return time.Time{}, err
	}
	at := time.Now()
	n.api.Put(v)
	return at, nil
}

// replace replaces an endpoint of a Service with an unused one.
func (n *node) replace(i int, watched bool) (at time.Time, by netip.Addr, err error) {
	at, err = n.change(i, func(s *cluster.Service) *cluster.Service {
		by = n.address(watched)
		return s.Replaced(by)
	})
	return at, by, err
}

// both creates or deletes a Service with its endpoints.
func (n *node) both(s *cluster.Service, act func(...*apiserver.Version)) (time.Time, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	service, err := n.clock.Version(s.Object())
	if err != nil {
		return time.Time{}, err
	}
	slice, err := n.clock.Version(s.Slice())
	if err != nil {
		return time.Time{}, err
	}
	at := time.Now()
	act(service, slice)
	return at, nil
}

// close ends the system and removes the node.
func (n *node) close() error {
	var errs []error
	if n.running != nil {
		errs = append(errs, n.running.Stop())
	}
	if n.server != nil {
		errs = append(errs, n.server.Close())
	}
	if n.probe != nil {
		errs = append(errs, n.probe.Close())
	}
	if n.rig != nil {
		errs = append(errs, n.rig.Close())
	}
	return errors.Join(errs...)
}

// content is what all API servers serve at the beginning. Its versions are shared,
// so that each object is encoded once.
type content struct {
	endpoints int
	services  []*cluster.Service
	addrs     []netip.AddrPort
	clock     *apiserver.Clock
	versions  []*apiserver.Version
}

func newContent(services, endpoints int) (*content, error) {
	c := &content{endpoints: endpoints, clock: &apiserver.Clock{}}
	add := func(o apiserver.Object) error {
		v, err := c.clock.Version(o)
		c.versions = append(c.versions, v)
		return err
	}
	err := add(cluster.ServiceCIDR())
	for i := range services {
		s := cluster.New(i, endpoints)
		c.services, c.addrs = append(c.services, s), append(c.addrs, s.Addr())
		err = errors.Join(err, add(s.Object()), add(s.Slice()))
	}
	return c, err
}
