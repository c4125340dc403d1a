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
	"fairlead.io/fairlead/bench/rig"
	"fairlead.io/fairlead/bench/system"
)

// node is one system's node, with the API that it sees.
type node struct {
	sys    system.System
	env    system.Environment
	rig    *rig.Rig
	probe  *rig.Probe
	server server
	leave  func() error // from the server

	begin   time.Time // of the system
	running system.Running
	settled time.Time // when it was last seen to have done what it was told

	// services are as the API has them. Who has taken one may change it.
	services []*cluster.Service

	mu    sync.Mutex
	fresh int          // the number of the next unused address
	taken map[int]bool // see take
}

// newNode makes a node without a system. The content is what its API serves first.
func newNode(ctx context.Context, sys system.System, dir string, s server, c *content) (_ *node, err error) {
	n := &node{sys: sys, server: s, services: slices.Clone(c.services), fresh: len(c.services) * c.endpoints, taken: map[int]bool{}}
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
	n.env = system.Environment{
		Namespace: n.rig.Node.Namespace, Kubeconfig: filepath.Join(dir, "kubeconfig"),
		ClusterCIDR: rig.ClusterCIDR, ServiceCIDR: rig.ServiceCIDR, NodeName: cluster.NodeName, Dir: dir,
	}
	n.leave, err = s.join(ctx, n.rig, n.env.Kubeconfig)
	return n, err
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
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fresh++
	if watched {
		return cluster.Watched(n.fresh)
	}
	return cluster.New(n.fresh, 1).Endpoints[0]
}

// take returns a Service drawn at random that nobody else has taken, until it is
// given back. There must be one.
func (n *node) take() (i int, giveBack func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		i := rand.IntN(len(n.services)) //nolint:gosec // no secret
		if n.taken[i] {
			continue
		}
		n.taken[i] = true
		return i, func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			delete(n.taken, i)
		}
	}
}

// change changes the list of endpoints of a Service that nobody else changes.
func (n *node) change(ctx context.Context, i int, to *cluster.Service) *request {
	n.services[i] = to
	return n.server.update(ctx, to.Slice())
}

// replace replaces an endpoint of a Service with an unused one.
func (n *node) replace(ctx context.Context, i int, watched bool) (event *request, by netip.Addr) {
	by = n.address(watched)
	return n.change(ctx, i, n.services[i].Replaced(by)), by
}

// see has the probe look for the effect of a request that may be under way. It returns
// when both are done.
func (n *node) see(ctx context.Context, event *request, look func(context.Context) (rig.Sighting, error)) (time.Duration, error) {
	looking, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		if event.wait() != nil {
			cancel()
		}
	}()
	n.probe.Gently(event.done)
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
	if n.running != nil {
		errs = append(errs, n.running.Stop())
	}
	if n.leave != nil {
		errs = append(errs, n.leave())
	}
	if n.probe != nil {
		errs = append(errs, n.probe.Close())
	}
	if n.rig != nil {
		errs = append(errs, n.rig.Close())
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
		s := cluster.New(i, endpoints)
		c.services, c.addrs = append(c.services, s), append(c.addrs, s.Addr())
	}
	return c
}

// objects makes the objects, new ones each time.
func (c *content) objects() []apiserver.Object {
	objects := []apiserver.Object{cluster.ServiceCIDR(), cluster.Node(rig.NodeIPv4)}
	for _, s := range c.services {
		objects = append(objects, s.Object(), s.Slice())
	}
	return objects
}
