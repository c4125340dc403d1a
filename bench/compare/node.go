package compare

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/bench/testbed"
)

// node is one system's node, with the API that it sees.
type node struct {
	sys     system.System
	env     system.Environment
	testbed *testbed.Testbed
	probe   *testbed.Probe
	server  server
	detach  func() error // from the server

	startedAt time.Time // of the system
	instance  system.Instance
	settledAt time.Time // when it was last seen to have done what it was told

	// services are as the API has them. Who has taken one may change it.
	services []*cluster.Service

	mu        sync.Mutex
	usedAddrs int          // the number of the next unused address
	inUse     map[int]bool // see take
}

// newNode makes a node without a system. The content is what its API serves first.
func newNode(ctx context.Context, sys system.System, dir string, s server, c *content) (_ *node, err error) {
	n := &node{sys: sys, server: s, services: slices.Clone(c.services), usedAddrs: len(c.services) * c.endpoints, inUse: map[int]bool{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make a node for %s: %w", sys.Name(), err), n.close())
		}
	}()
	if n.testbed, err = testbed.New(testbed.Options{}); err != nil {
		return nil, err
	}
	if n.probe, err = n.testbed.NewProbe(); err != nil {
		return nil, err
	}
	n.env = system.Environment{
		Namespace: n.testbed.Node.Namespace, Kubeconfig: filepath.Join(dir, "kubeconfig"),
		ClusterCIDR: testbed.ClusterCIDR, ServiceCIDR: testbed.ServiceCIDR, NodeName: cluster.NodeName, Dir: dir,
	}
	n.detach, err = s.attach(ctx, n.testbed, n.env.Kubeconfig)
	return n, err
}

// start starts the system.
func (n *node) start(ctx context.Context) error {
	n.startedAt = time.Now()
	running, err := n.sys.Start(ctx, n.env)
	if err != nil {
		return err
	}
	n.instance = running
	return nil
}

// contextWhileRunning returns a context that is done when the system ends.
func (n *node) contextWhileRunning(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if p, ok := n.instance.(interface{ Done() <-chan struct{} }); ok {
		go func() {
			select {
			case <-ctx.Done():
			case <-p.Done():
				cancel(fmt.Errorf("%s has ended by itself: %s", n.sys.Name(), n.logTail()))
			}
		}()
	}
	return ctx, func() { cancel(context.Canceled) }
}

// logTail returns the end of the system's log.
func (n *node) logTail() string {
	log, err := os.ReadFile(filepath.Join(n.env.Dir, n.sys.Name()+".log"))
	if err != nil {
		return err.Error()
	}
	const most = 3
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	return strings.Join(lines[max(0, len(lines)-most):], " | ")
}

// usage returns what the system uses.
func (n *node) usage() (system.Usage, error) { return system.UsageOf(n.instance.PID()) }

// waitIdle waits until the system uses no processor time, within reason.
func (n *node) waitIdle(ctx context.Context) error {
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

// waitSettled waits until the system has had time since its last change, and a little
// that is random, so that nothing periodic is always met at the same time.
func (n *node) waitSettled(ctx context.Context, d time.Duration) error {
	jitter := time.Duration(rand.Int64N(int64(d/8) + 1)) //nolint:gosec // no secret
	return sleep(ctx, time.Until(n.settledAt.Add(d+jitter)))
}

// nextAddr returns an address of an endpoint that was not used before.
func (n *node) nextAddr(watched bool) netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.usedAddrs++
	if watched {
		return cluster.WatchedAddr(n.usedAddrs)
	}
	return cluster.NewService(n.usedAddrs, 1).Endpoints[0]
}

// acquireService returns a Service drawn at random that nobody else has taken, until it is
// given back. There must be one.
func (n *node) acquireService() (i int, giveBack func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		i := rand.IntN(len(n.services)) //nolint:gosec // no secret
		if n.inUse[i] {
			continue
		}
		n.inUse[i] = true
		return i, func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			delete(n.inUse, i)
		}
	}
}

// updateEndpoints changes the list of endpoints of a Service that nobody else changes.
func (n *node) updateEndpoints(ctx context.Context, i int, to *cluster.Service) *request {
	n.services[i] = to
	return n.server.update(ctx, to.Slice())
}

// replaceEndpoint replaces an endpoint of a Service with an unused one.
func (n *node) replaceEndpoint(ctx context.Context, i int, watched bool) (event *request, by netip.Addr) {
	by = n.nextAddr(watched)
	return n.updateEndpoints(ctx, i, n.services[i].WithReplacedEndpoint(by)), by
}

// observe has the probe look for the effect of a request that may be under way. It returns
// when both are done.
func (n *node) observe(ctx context.Context, event *request, look func(context.Context) (testbed.Observation, error)) (time.Duration, error) {
	looking, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		if event.wait() != nil {
			cancel()
		}
	}()
	n.probe.ThrottleUntil(event.done)
	seen, err := look(looking)
	if failed := event.wait(); failed != nil {
		err = failed // why there was nothing to see
	}
	if err != nil {
		return 0, errors.Join(err, context.Cause(ctx))
	}
	return seen.After, nil
}

// close ends the system and removes the node. The API server stays.
func (n *node) close() error {
	var errs []error
	if n.instance != nil {
		errs = append(errs, n.instance.Stop())
	}
	if n.detach != nil {
		errs = append(errs, n.detach())
	}
	if n.probe != nil {
		errs = append(errs, n.probe.Close())
	}
	if n.testbed != nil {
		errs = append(errs, n.testbed.Close())
	}
	return errors.Join(errs...)
}

// content is what all API servers serve at the beginning.
type content struct {
	endpoints int
	services  []*cluster.Service
	addrs     []netip.AddrPort
}

func newContent(services, endpoints int) *content {
	c := &content{endpoints: endpoints}
	for i := range services {
		s := cluster.NewService(i, endpoints)
		c.services, c.addrs = append(c.services, s), append(c.addrs, s.Addr())
	}
	return c
}

// objects makes the objects, new ones each time.
func (c *content) objects() []apiserver.Object {
	objects := []apiserver.Object{cluster.ServiceCIDR(), cluster.Node(testbed.NodeIPv4)}
	for _, s := range c.services {
		objects = append(objects, s.Object(), s.Slice())
	}
	return objects
}
