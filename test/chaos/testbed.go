package main

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
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/internal/nettest"
)

// pods is the number of pods that serve. Each is an endpoint of every Service at
// times.
const pods = 6

// testbed is the node with all that is around it.
type testbed struct {
	options   *options
	recorder  recorder
	dir       string // with the programs' logs
	net       *nettest.Network
	client    *nettest.Host
	pods      []*nettest.Host
	api       api
	agent     *agent
	second    *agent // the same program once more
	fairlead  system.Fairlead
	services  []*service
	stopAll   context.CancelFunc
	running   sync.WaitGroup // clients and what changes endpoints
	servers   []*nettest.IdentityServer
	openConns []target      // that keepers keep open
	spoofed   atomic.Uint32 // addresses that nobody has and that datagrams were sent from
}

// newTestbed makes everything and starts it. The caller closes the testbed also
// after an error.
func newTestbed(ctx context.Context, o *options) (*testbed, error) {
	t := &testbed{options: o}
	var err error
	if t.dir, err = os.MkdirTemp("", "chaos-"); err != nil {
		return t, fmt.Errorf("make a folder for logs: %w", err)
	}
	if t.net, err = nettest.New(nettest.Options{}); err != nil {
		return t, err
	}
	if err := t.addPods(); err != nil { //nolint:contextcheck // servers end with their hosts
		return t, err
	}
	if o.api == "real" {
		t.api, err = newRealAPI(ctx, t.net.Outside)
	} else {
		t.api, err = newFeedAPI(ctx, t.net.Node)
	}
	if err != nil {
		return t, err
	}
	if err := t.forgetSoon(); err != nil {
		return t, err
	}
	if err := t.fill(ctx); err != nil {
		return t, err
	}
	env := system.Environment{
		Namespace: t.net.Node.Namespace, Kubeconfig: filepath.Join(t.dir, "kubeconfig"), Dir: t.dir,
		NodeName: nodeName, ClusterCIDR: t.net.PodCIDRs[0], ServiceCIDR: serviceCIDRs()[0],
	}
	if err := t.api.kubeconfig(env.Kubeconfig); err != nil {
		return t, err
	}
	t.fairlead = system.Fairlead{Binary: o.binary, Mode: o.mode, Args: append(t.networks(), strings.Fields(o.args)...)}
	t.agent = &agent{system: t.fairlead, env: env, recorder: &t.recorder}
	t.second = &agent{system: t.fairlead, env: env, recorder: &t.recorder}
	if err := t.agent.start(ctx); err != nil {
		return t, err
	}
	if err := t.waitServed(ctx); err != nil {
		return t, err
	}
	t.run(ctx)
	return t, nil
}

// waitServed returns when Fairlead is ready and every target answers.
func (t *testbed) waitServed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := t.agent.waitReady(ctx); err != nil {
		return err
	}
	for _, s := range t.services {
		for _, to := range t.targets(s) {
			for {
				err := t.answers(ctx, to)
				if err == nil {
					break
				}
				if ctx.Err() != nil {
					return fmt.Errorf("%s does not answer: %w", to, err)
				}
				pause(ctx, 20*time.Millisecond)
			}
		}
	}
	return nil
}

// answers opens one connection to a target.
func (t *testbed) answers(ctx context.Context, to target) error {
	if to.service.name == "steady" {
		dial, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		_, err := to.from.Connect(dial, nettest.TCP, to.addr)
		return err
	}
	return to.from.Do(func() error {
		_, _, err := t.connect(ctx, &nettest.IdentityClient{Timeout: timeout}, to)
		return err
	})
}

// networks returns the flag with the pods' networks of both families.
func (t *testbed) networks() []string {
	var cidrs []string
	for _, p := range t.net.PodCIDRs {
		cidrs = append(cidrs, p.String())
	}
	return []string{"--cluster-cidr=" + strings.Join(cidrs, ",")}
}

// close ends everything that was started.
func (t *testbed) close() error {
	var errs []error
	if t.stopAll != nil {
		t.stopAll()
		t.running.Wait()
	}
	for _, a := range []*agent{t.agent, t.second} {
		if a != nil {
			errs = append(errs, a.kill())
		}
	}
	if t.api != nil {
		errs = append(errs, t.api.close())
	}
	for _, s := range t.servers {
		errs = append(errs, s.Close())
	}
	if t.net != nil {
		errs = append(errs, t.net.Close())
	}
	switch {
	case t.dir == "":
	case t.options.keepLogs:
		fmt.Fprintln(os.Stderr, "chaos: the logs are in", t.dir)
	default:
		errs = append(errs, os.RemoveAll(t.dir))
	}
	return errors.Join(errs...)
}

// addPods makes the pods and the Services that they serve.
func (t *testbed) addPods() (err error) {
	if t.client, err = t.net.AddPod("client"); err != nil {
		return err
	}
	t.services = []*service{
		{name: "web", protocol: nettest.TCP, target: 8000, nodePort: 30080},
		{name: "sticky", protocol: nettest.TCP, target: 8001, affinity: time.Second},
		{name: "names", protocol: nettest.UDP, target: 8002, nodePort: 30053},
		{name: "signals", protocol: nettest.SCTP, target: 8003},
		{name: "crowded", protocol: nettest.UDP, target: 8005, affinity: 3 * time.Hour},
		{name: "steady", protocol: nettest.TCP, target: 8004, nodePort: 30090},
	}
	const firstIP = 10
	for i, s := range t.services {
		s.clusterIPs = clusterIPs(firstIP + i)
		if s.name == "crowded" { // shares its maps of clients with `sticky`, by the last digit of the address
			s.clusterIPs = clusterIPs(firstIP + 1 + 16)
		}
		s.endpoints = [2]*endpoints{newEndpoints(pods), newEndpoints(pods)}
	}
	for i := range pods {
		pod, err := t.net.AddPod(podName(i))
		if err != nil {
			return err
		}
		t.pods = append(t.pods, pod)
		for _, s := range t.services {
			if err := t.serve(s, i); err != nil {
				return err
			}
		}
	}
	return nil
}

// serviceNamed returns one of the Services that clients connect to.
func (t *testbed) serviceNamed(name string) *service {
	return t.services[slices.IndexFunc(t.services, func(s *service) bool { return s.name == name })]
}

func podName(i int) string { return fmt.Sprintf("pod-%d", i) }

// serve has a pod serve a Service. Connections to `steady` stay open and SCTP needs
// its own server: both answer with the pod's name.
func (t *testbed) serve(s *service, pod int) error {
	host := t.pods[pod]
	if s.protocol == nettest.SCTP || s.name == "steady" {
		_, err := host.Serve(s.protocol, s.target)
		return err
	}
	for _, addr := range host.Addrs() {
		server, err := host.ServeIdentity(s.protocol, netip.AddrPortFrom(addr, s.target), t.identity(s, pod))
		if err != nil {
			return err
		}
		t.servers = append(t.servers, server)
	}
	return nil
}

// identity is how a pod answers for a Service: a connection that ends at another
// Service's server is told by it.
func (t *testbed) identity(s *service, pod int) byte {
	return byte(int(s.target%16)*16 + pod) //nolint:gosec // fits
}

// forgetSoon has connection tracking forget TCP connections a second after their
// end. Clients use their ports again sooner than the kernel forgets them by itself,
// and the kernel sends a connection that it remembers where it went before.
func (t *testbed) forgetSoon() error {
	return t.net.Node.Do(func() error {
		for _, state := range []string{"fin_wait", "close_wait", "last_ack", "time_wait", "close"} {
			file := "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_" + state
			if err := os.WriteFile(file, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("set a sysctl: %w", err)
			}
		}
		return nil
	})
}

// fill writes all objects to the API.
func (t *testbed) fill(ctx context.Context) error {
	if err := t.api.create(ctx, node(t.net.Node.Addrs(), t.net.PodCIDRs)); err != nil {
		return err
	}
	for _, s := range t.services {
		if err := t.api.create(ctx, s.object()); err != nil {
			return err
		}
		for family := range s.endpoints {
			if err := t.api.create(ctx, s.slice(family, t.addrs(family, s.endpoints[family].pods()))); err != nil {
				return err
			}
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	const writers = 8
	group.SetLimit(writers)
	for n := range t.options.services {
		group.Go(func() error {
			s, addrs := background(n)
			errs := []error{t.api.create(ctx, s.object())}
			for family := range addrs {
				errs = append(errs, t.api.create(ctx, s.slice(family, addrs[family])))
			}
			return errors.Join(errs...)
		})
	}
	return group.Wait()
}

// addrs returns the addresses of pods in a family.
func (t *testbed) addrs(family int, set podSet) []netip.Addr {
	var addrs []netip.Addr
	for i, pod := range t.pods {
		if set.has(i) {
			addrs = append(addrs, pod.Addrs()[family])
		}
	}
	return addrs
}

// target is what a client connects to.
type target struct {
	from    *nettest.Host
	service *service
	family  int
	addr    netip.AddrPort
}

func (g target) String() string {
	return fmt.Sprintf("%s from %s to %s at %s", g.service.protocol, g.from.Name, g.service.name, g.addr)
}

// targets returns all kinds of connections to a Service.
func (t *testbed) targets(s *service) []target {
	var all []target
	for family := range s.clusterIPs {
		clients := []*nettest.Host{t.client, t.net.Node}
		if s.protocol == nettest.SCTP {
			clients = clients[:1] // userspace SCTP is slow, and one client shows it
		}
		for _, from := range clients {
			all = append(all, target{from, s, family, s.frontend(family)})
		}
		if s.nodePort != 0 {
			all = append(all, target{t.net.Outside, s, family, netip.AddrPortFrom(t.net.Node.Addrs()[family], s.nodePort)})
		}
	}
	return all
}

// run starts the clients, and what changes endpoints.
func (t *testbed) run(ctx context.Context) {
	ctx, t.stopAll = context.WithCancel(ctx)
	for _, s := range t.services {
		for _, to := range t.targets(s) {
			if s.name != "steady" {
				t.running.Go(func() { t.connectAll(ctx, to) })
				continue
			}
			for range t.options.open {
				t.openConns = append(t.openConns, to)
			}
		}
	}
	for _, to := range t.openConns {
		t.running.Go(func() { t.keep(ctx, to) })
	}
	t.running.Go(func() { t.changeEndpoints(ctx) })
}

// timeout bounds each connection. It is longer than the kernel takes to send a SYN a
// second and a third time.
const timeout = 5 * time.Second

// connectAll opens connections to a target until ctx is done.
func (t *testbed) connectAll(ctx context.Context, to target) {
	_ = to.from.Do(func() error {
		client := &nettest.IdentityClient{Timeout: timeout}
		rate := t.options.rate
		if to.service.protocol == nettest.SCTP {
			rate = max(1, rate/20)
		}
		pace := time.NewTicker(time.Second / time.Duration(rate))
		defer pace.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-pace.C:
			}
			begin := time.Now()
			pod, resent, err := t.connect(ctx, client, to)
			switch {
			case ctx.Err() != nil:
			case err != nil:
				t.recorder.failed(begin, time.Now(), fmt.Errorf("%s: %w", to, err))
			default:
				t.recorder.connected(to, begin, resent, to.service.endpoints[to.family].staleness(pod, begin))
			}
		}
	})
}

// connect opens a connection and returns which pod answered. It runs in the
// client's namespace.
func (t *testbed) connect(ctx context.Context, client *nettest.IdentityClient, to target) (pod int, resent uint32, err error) {
	var identity byte
	switch to.service.protocol {
	case nettest.TCP:
		identity, resent, err = client.Connect(to.addr)
	case nettest.UDP:
		identity, resent, err = client.Ask(to.addr)
	default:
		return t.associate(ctx, to)
	}
	if err != nil {
		return 0, 0, err
	}
	for pod := range pods {
		if identity == t.identity(to.service, pod) {
			return pod, resent, nil
		}
	}
	return 0, 0, fmt.Errorf("a server of another Service answered with %d", identity)
}

// associate opens an SCTP association and asks once. An association whose endpoint is
// removed meanwhile is forgotten by connection tracking, as its client is to reach
// another one: so a client that gets no answer associates once more.
func (t *testbed) associate(ctx context.Context, to target) (pod int, resent uint32, err error) {
	for ; resent < 2; resent++ {
		within, cancel := context.WithTimeout(ctx, timeout/2)
		var answer nettest.Answer
		answer, err = to.from.Connect(within, to.service.protocol, to.addr)
		cancel()
		if err == nil {
			_, err = fmt.Sscanf(answer.Host, "pod-%d", &pod)
			return pod, resent, err
		}
		if !errors.Is(err, nettest.ErrTimeout) {
			break
		}
	}
	return 0, resent, err
}

// keep holds a connection open and uses it, and opens another when it breaks.
func (t *testbed) keep(ctx context.Context, to target) {
	const period = 100 * time.Millisecond
	var conn *nettest.Conn
	for again := false; ctx.Err() == nil; again = true {
		used := time.Now()
		dial, cancel := context.WithTimeout(ctx, timeout)
		var err error
		conn, err = to.from.Open(dial, nettest.TCP, to.addr)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				t.recorder.failed(used, time.Now(), fmt.Errorf("%s: %w", to, err))
			}
			continue
		}
		if again {
			t.recorder.opened(1) // besides those that the fault began with
		}
		for ctx.Err() == nil {
			ask, cancel := context.WithTimeout(ctx, timeout)
			_, err = conn.Ask(ask)
			cancel()
			if err != nil {
				break
			}
			used = time.Now()
			select {
			case <-ctx.Done():
			case <-time.After(period/2 + rand.N(period)): //nolint:gosec // no secret
			}
		}
		if ctx.Err() == nil {
			t.recorder.broke(used, time.Now(), fmt.Errorf("%s: %w", to, err))
		}
		_ = conn.Close()
	}
}

// changeEndpoints changes the endpoints of Services, one EndpointSlice at a time,
// until ctx is done. Those of `steady` stay, as connections to it must.
func (t *testbed) changeEndpoints(ctx context.Context) {
	pace := time.NewTicker(time.Second / time.Duration(t.options.changes))
	defer pace.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
		s := t.services[rand.IntN(len(t.services)-1)] //nolint:gosec // no secret
		family := rand.IntN(len(s.endpoints))         //nolint:gosec // no secret
		e := s.endpoints[family]
		next := e.pods().next(pods)
		err := e.change(next, func() error { return t.api.update(ctx, s.slice(family, t.addrs(family, next))) })
		if err == nil {
			t.recorder.changed()
		}
	}
}

// cause causes a fault and returns the record of it. The record is complete when no
// connection that began meanwhile waits any more, see [timeout].
func (t *testbed) cause(ctx context.Context, f fault) (*record, error) {
	record := t.recorder.beginFault()
	t.recorder.opened(len(t.openConns))
	within, cancel := context.WithTimeout(ctx, t.options.time)
	defer cancel()
	err := f.cause(t, within)
	<-within.Done() // also if the fault took less
	if err == nil {
		err = ctx.Err()
	}
	if err == nil && f.disturbs {
		time.Sleep(settleTime) // The next fault begins in order.
	}
	if err == nil {
		err = t.restore(ctx)
	}
	return record, err
}

// restore makes sure that the next fault begins with one Fairlead that is ready.
func (t *testbed) restore(ctx context.Context) error {
	if err := t.second.stop(); err != nil {
		return err
	}
	if t.agent.pid() == 0 {
		if err := t.agent.start(ctx); err != nil {
			return err
		}
	}
	return t.waitServed(ctx)
}

// kernelRelease returns what `uname -r` prints.
func kernelRelease() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}
