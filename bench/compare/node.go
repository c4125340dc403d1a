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

// node is the node of one system, with its API server.
type node struct {
	sys     system.System
	env     system.Environment
	testbed *testbed.Testbed
	probe   *testbed.Probe
	server  server
	detach  func() error // from server

	startedAt time.Time // when the system was started
	instance  system.Instance
	settledAt time.Time // when the effect of the last change was observed

	// services are the Services as stored in the API. Only the owner of a Service may change it,
	// see acquireService.
	services []*cluster.Service
	// onlyEndpoint is the Service for result.ReplaceOnlyEndpoint, see createOnlyEndpoint.
	onlyEndpoint *cluster.Service

	mu        sync.Mutex
	usedAddrs int          // number of addresses used so far
	inUse     map[int]bool // indices of Services, see acquireService
}

// newNode creates a node without a running system. Its API server serves the content. The probe
// sends packets at least probeInterval apart.
func newNode(
	ctx context.Context, sys system.System, dir string, s server, c *content, probeInterval time.Duration,
) (_ *node, err error) {
	n := &node{sys: sys, server: s, services: slices.Clone(c.services), usedAddrs: len(c.services) * c.endpoints, inUse: map[int]bool{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("create a node for %s: %w", sys.Name(), err), n.close())
		}
	}()
	if n.testbed, err = testbed.New(testbed.Options{}); err != nil {
		return nil, err
	}
	if n.probe, err = n.testbed.NewProbe(); err != nil {
		return nil, err
	}
	n.probe.MinInterval = probeInterval
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
				cancel(fmt.Errorf("%s ended unexpectedly: %s", n.sys.Name(), n.logTail()))
			}
		}()
	}
	return ctx, func() { cancel(context.Canceled) }
}

// logTail returns the last lines of the system's log.
func (n *node) logTail() string {
	log, err := os.ReadFile(filepath.Join(n.env.Dir, n.sys.Name()+".log"))
	if err != nil {
		return err.Error()
	}
	const maxLines = 3
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	return strings.Join(lines[max(0, len(lines)-maxLines):], " | ")
}

// usage returns the resource usage of the system.
func (n *node) usage() (system.Usage, error) { return system.UsageOf(n.instance.PID()) }

// waitIdle waits until the system uses no processor time, for at most 20 s.
func (n *node) waitIdle(ctx context.Context) error {
	const period, timeout, idlePeriods, busy = 250 * time.Millisecond, 20 * time.Second, 3, 10 * time.Millisecond
	last, err := n.usage()
	if err != nil {
		return err
	}
	for idle, end := 0, time.Now().Add(timeout); idle < idlePeriods && time.Now().Before(end); {
		if err := sleep(ctx, period); err != nil {
			return err
		}
		now, err := n.usage()
		if err != nil {
			return err
		}
		if idle++; now.CPU()-last.CPU() > busy {
			idle = 0
		}
		last = now
	}
	return nil
}

// waitSettled waits until the time d, plus a small random time, has passed since the last change.
// The random time prevents measurements in step with periodic work of the system.
func (n *node) waitSettled(ctx context.Context, d time.Duration) error {
	jitter := time.Duration(rand.Int64N(int64(d/8) + 1)) //nolint:gosec // no secret
	return sleep(ctx, time.Until(n.settledAt.Add(d+jitter)))
}

// nextAddr returns an unused endpoint address.
func (n *node) nextAddr(watched bool) netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.usedAddrs++
	if watched {
		return cluster.WatchedAddr(n.usedAddrs)
	}
	return cluster.NewService(n.usedAddrs, 1).Endpoints[0]
}

// acquireService returns the index of a random Service that no other goroutine uses, until the
// caller calls release. It spins while all Services are in use.
func (n *node) acquireService() (i int, release func()) {
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

// updateEndpoints changes the endpoints of a Service that no other goroutine changes.
func (n *node) updateEndpoints(ctx context.Context, i int, to *cluster.Service) *request {
	n.services[i] = to
	return n.server.update(ctx, to.Slice())
}

// replaceEndpoint replaces an endpoint of a Service by one with an unused address, and returns the
// address.
func (n *node) replaceEndpoint(ctx context.Context, i int, watched bool) (event *request, addr netip.Addr) {
	addr = n.nextAddr(watched)
	return n.updateEndpoints(ctx, i, n.services[i].WithReplacedEndpoint(addr)), addr
}

// observe waits for the effect of a request, which may be in flight, with the given method of the
// probe. It returns when the server has answered and the effect was observed. The result is the time
// since the first event of the request, see request.untilEvent.
func (n *node) observe(ctx context.Context, event *request, wait func(context.Context) (testbed.Observation, error)) (time.Duration, error) {
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		if event.wait() != nil {
			cancel()
		}
	}()
	n.probe.ThrottleUntil(event.done)
	observed, err := wait(waiting)
	if requestErr := event.wait(); requestErr != nil {
		err = requestErr // the reason why no effect was observed
	}
	if err != nil {
		return 0, errors.Join(err, context.Cause(ctx))
	}
	return max(0, observed.After-event.untilEvent()), nil
}

// close stops the system and removes the node. The API server keeps running.
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

// content is the initial content of all API servers.
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

// objects returns newly created objects on each call.
func (c *content) objects() []apiserver.Object {
	objects := []apiserver.Object{cluster.ServiceCIDR(), cluster.Node(testbed.NodeIPv4)}
	for _, s := range c.services {
		objects = append(objects, s.Object(), s.Slice())
	}
	return objects
}
