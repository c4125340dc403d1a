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

// podCount is the number of pods that serve. Each pod is an endpoint of every Service some of
// the time.
const podCount = 6

// testbed is the node and its environment: network, pods, API server, clients and Fairlead.
type testbed struct {
	options      *options
	recorder     recorder
	dir          string // contains the programs' logs
	net          *nettest.Network
	client       *nettest.Host
	pods         []*nettest.Host
	api          api
	agent        *agent
	secondAgent  *agent // a second instance of the same program
	fairlead     system.Fairlead
	services     []*service
	stopClients  context.CancelFunc
	running      sync.WaitGroup // clients and changeEndpoints
	servers      []*nettest.IdentityServer
	keptOpen     []target      // one element for each connection that keepOpen holds
	spoofedCount atomic.Uint32 // number of unused source addresses used so far
}

// newTestbed creates and starts everything. The caller must close the testbed even after an
// error.
func newTestbed(ctx context.Context, o *options) (*testbed, error) {
	t := &testbed{options: o}
	var err error
	if t.dir, err = os.MkdirTemp("", "chaos-"); err != nil {
		return t, fmt.Errorf("create a directory for logs: %w", err)
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
	if err := t.shortenConntrackTimeouts(); err != nil {
		return t, err
	}
	if err := t.createObjects(ctx); err != nil {
		return t, err
	}
	env := system.Environment{
		Namespace: t.net.Node.Namespace, Kubeconfig: filepath.Join(t.dir, "kubeconfig"), Dir: t.dir,
		NodeName: nodeName, ClusterCIDR: t.net.PodCIDRs[0], ServiceCIDR: serviceCIDRs()[0],
	}
	if err := t.api.writeKubeconfig(env.Kubeconfig); err != nil {
		return t, err
	}
	t.fairlead = system.Fairlead{Binary: o.binary, Mode: o.mode, Args: append(t.clusterCIDRFlag(), strings.Fields(o.args)...)}
	t.agent = &agent{system: t.fairlead, env: env, recorder: &t.recorder}
	t.secondAgent = &agent{system: t.fairlead, env: env, recorder: &t.recorder}
	if err := t.agent.start(ctx); err != nil {
		return t, err
	}
	if err := t.waitTargetsReady(ctx); err != nil {
		return t, err
	}
	t.startClients(ctx)
	return t, nil
}

// waitTargetsReady waits until Fairlead is ready and every target answers.
func (t *testbed) waitTargetsReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := t.agent.waitReady(ctx); err != nil {
		return err
	}
	for _, s := range t.services {
		for _, to := range t.targets(s) {
			for {
				err := t.checkTarget(ctx, to)
				if err == nil {
					break
				}
				if ctx.Err() != nil {
					return fmt.Errorf("%s does not answer: %w", to, err)
				}
				sleep(ctx, 20*time.Millisecond)
			}
		}
	}
	return nil
}

// checkTarget opens one connection to a target.
func (t *testbed) checkTarget(ctx context.Context, to target) error {
	if to.service.name == "steady" {
		dial, cancel := context.WithTimeout(ctx, connectTimeout)
		defer cancel()
		_, err := to.from.Connect(dial, nettest.TCP, to.addr)
		return err
	}
	return to.from.Do(func() error {
		_, _, err := t.connect(ctx, &nettest.IdentityClient{Timeout: connectTimeout}, to)
		return err
	})
}

// clusterCIDRFlag returns the flag with the pod networks of both families.
func (t *testbed) clusterCIDRFlag() []string {
	var cidrs []string
	for _, p := range t.net.PodCIDRs {
		cidrs = append(cidrs, p.String())
	}
	return []string{"--cluster-cidr=" + strings.Join(cidrs, ",")}
}

// close stops everything.
func (t *testbed) close() error {
	var errs []error
	if t.stopClients != nil {
		t.stopClients()
		t.running.Wait()
	}
	for _, a := range []*agent{t.agent, t.secondAgent} {
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

// addPods creates the pods and the Services that they serve.
func (t *testbed) addPods() (err error) {
	if t.client, err = t.net.AddPod("client"); err != nil {
		return err
	}
	t.services = []*service{
		{name: "web", protocol: nettest.TCP, targetPort: 8000, nodePort: 30080},
		{name: "sticky", protocol: nettest.TCP, targetPort: 8001, affinity: time.Second},
		{name: "names", protocol: nettest.UDP, targetPort: 8002, nodePort: 30053},
		{name: "signals", protocol: nettest.SCTP, targetPort: 8003},
		{name: "crowded", protocol: nettest.UDP, targetPort: 8005, affinity: 3 * time.Hour},
		{name: "steady", protocol: nettest.TCP, targetPort: 8004, nodePort: 30090},
	}
	const firstIP = 10
	for i, s := range t.services {
		s.clusterIPs = clusterIPs(firstIP + i)
		if s.name == "crowded" { // the last hexadecimal digit selects the affinity maps of `sticky`
			s.clusterIPs = clusterIPs(firstIP + 1 + 16)
		}
		s.endpoints = [2]*endpoints{newEndpoints(podCount), newEndpoints(podCount)}
	}
	for i := range podCount {
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

// serviceNamed returns a Service that clients connect to.
func (t *testbed) serviceNamed(name string) *service {
	return t.services[slices.IndexFunc(t.services, func(s *service) bool { return s.name == name })]
}

func podName(i int) string { return fmt.Sprintf("pod-%d", i) }

// serve starts the servers of a Service in a pod. Connections to `steady` stay open, and SCTP
// needs another kind of server: both answer with the pod's name.
func (t *testbed) serve(s *service, pod int) error {
	host := t.pods[pod]
	if s.protocol == nettest.SCTP || s.name == "steady" {
		_, err := host.Serve(s.protocol, s.targetPort)
		return err
	}
	for _, addr := range host.Addrs() {
		server, err := host.ServeIdentity(s.protocol, netip.AddrPortFrom(addr, s.targetPort), t.identity(s, pod))
		if err != nil {
			return err
		}
		t.servers = append(t.servers, server)
	}
	return nil
}

// identity returns a pod's answer for a Service. It also identifies the Service, to detect
// connections that reach a server of another Service.
func (t *testbed) identity(s *service, pod int) byte {
	return byte(int(s.targetPort%16)*16 + pod) //nolint:gosec // fits
}

// shortenConntrackTimeouts makes connection tracking forget TCP connections one second after
// they end. Clients reuse their ports sooner than the kernel forgets connections by default,
// and the kernel sends packets of a known connection to its previous endpoint.
func (t *testbed) shortenConntrackTimeouts() error {
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

// createObjects writes all objects to the API.
func (t *testbed) createObjects(ctx context.Context) error {
	if err := t.api.create(ctx, nodeObject(t.net.Node.Addrs(), t.net.PodCIDRs)); err != nil {
		return err
	}
	for _, s := range t.services {
		if err := t.api.create(ctx, s.object()); err != nil {
			return err
		}
		for family := range s.endpoints {
			if err := t.api.create(ctx, s.endpointSlice(family, t.addrs(family, s.endpoints[family].pods()))); err != nil {
				return err
			}
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	const writers = 8
	group.SetLimit(writers)
	for n := range t.options.services {
		group.Go(func() error {
			s, addrs := backgroundService(n)
			errs := []error{t.api.create(ctx, s.object())}
			for family := range addrs {
				errs = append(errs, t.api.create(ctx, s.endpointSlice(family, addrs[family])))
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
		if set.contains(i) {
			addrs = append(addrs, pod.Addrs()[family])
		}
	}
	return addrs
}

// target is an address of a Service and the host that connects to it.
type target struct {
	from    *nettest.Host
	service *service
	family  int
	addr    netip.AddrPort
}

func (g target) String() string {
	return fmt.Sprintf("%s from %s to %s at %s", g.service.protocol, g.from.Name, g.service.name, g.addr)
}

// targets returns all targets of a Service.
func (t *testbed) targets(s *service) []target {
	var all []target
	for family := range s.clusterIPs {
		clients := []*nettest.Host{t.client, t.net.Node}
		if s.protocol == nettest.SCTP {
			clients = clients[:1] // userspace SCTP is slow, and one client is enough
		}
		for _, from := range clients {
			all = append(all, target{from, s, family, s.clusterAddrPort(family)})
		}
		if s.nodePort != 0 {
			all = append(all, target{t.net.Outside, s, family, netip.AddrPortFrom(t.net.Node.Addrs()[family], s.nodePort)})
		}
	}
	return all
}

// startClients starts the clients and changeEndpoints.
func (t *testbed) startClients(ctx context.Context) {
	ctx, t.stopClients = context.WithCancel(ctx)
	for _, s := range t.services {
		for _, to := range t.targets(s) {
			if s.name != "steady" {
				t.running.Go(func() { t.connectRepeatedly(ctx, to) })
				continue
			}
			for range t.options.open {
				t.keptOpen = append(t.keptOpen, to)
			}
		}
	}
	for _, to := range t.keptOpen {
		t.running.Go(func() { t.keepOpen(ctx, to) })
	}
	t.running.Go(func() { t.changeEndpoints(ctx) })
}

// connectTimeout bounds each connection. It is longer than the kernel needs to send a SYN a
// second and a third time.
const connectTimeout = 5 * time.Second

// connectRepeatedly opens connections to a target until ctx is done.
func (t *testbed) connectRepeatedly(ctx context.Context, to target) {
	_ = to.from.Do(func() error {
		client := &nettest.IdentityClient{Timeout: connectTimeout}
		rate := t.options.rate
		if to.service.protocol == nettest.SCTP {
			rate = max(1, rate/20)
		}
		ticker := time.NewTicker(time.Second / time.Duration(rate))
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-ticker.C:
			}
			begin := time.Now()
			pod, resent, err := t.connect(ctx, client, to)
			switch {
			case ctx.Err() != nil:
			case err != nil:
				t.recorder.recordFailed(begin, time.Now(), fmt.Errorf("%s: %w", to, err))
			default:
				t.recorder.recordConnected(to, begin, resent, to.service.endpoints[to.family].staleness(pod, begin))
			}
		}
	})
}

// connect opens a connection and returns the pod that answered. It must run in the client's
// namespace.
func (t *testbed) connect(ctx context.Context, client *nettest.IdentityClient, to target) (pod int, resent uint32, err error) {
	var identity byte
	switch to.service.protocol {
	case nettest.TCP:
		identity, resent, err = client.Connect(to.addr)
	case nettest.UDP:
		identity, resent, err = client.Ask(to.addr)
	default:
		return t.associateSCTP(ctx, to)
	}
	if err != nil {
		return 0, 0, err
	}
	for pod := range podCount {
		if identity == t.identity(to.service, pod) {
			return pod, resent, nil
		}
	}
	return 0, 0, fmt.Errorf("a server of another Service answered with %d", identity)
}

// associateSCTP opens an SCTP association and sends one request. Connection tracking forgets
// an association whose endpoint is removed, so that the client reaches another endpoint. A
// client without an answer therefore associates once more.
func (t *testbed) associateSCTP(ctx context.Context, to target) (pod int, resent uint32, err error) {
	for ; resent < 2; resent++ {
		attemptCtx, cancel := context.WithTimeout(ctx, connectTimeout/2)
		var answer nettest.Answer
		answer, err = to.from.Connect(attemptCtx, to.service.protocol, to.addr)
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

// keepOpen holds a connection open and uses it. When it breaks, keepOpen opens another one.
func (t *testbed) keepOpen(ctx context.Context, to target) {
	const period = 100 * time.Millisecond
	var conn *nettest.Conn
	for again := false; ctx.Err() == nil; again = true {
		used := time.Now()
		dial, cancel := context.WithTimeout(ctx, connectTimeout)
		var err error
		conn, err = to.from.Open(dial, nettest.TCP, to.addr)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				t.recorder.recordFailed(used, time.Now(), fmt.Errorf("%s: %w", to, err))
			}
			continue
		}
		if again {
			t.recorder.recordOpened(1) // in addition to the connections at the start of the fault
		}
		for ctx.Err() == nil {
			ask, cancel := context.WithTimeout(ctx, connectTimeout)
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
			t.recorder.recordBroken(used, time.Now(), fmt.Errorf("%s: %w", to, err))
		}
		_ = conn.Close()
	}
}

// changeEndpoints changes the endpoints of Services, one EndpointSlice at a time, until ctx
// is done. The endpoints of `steady` never change, so that connections to it stay open.
func (t *testbed) changeEndpoints(ctx context.Context) {
	ticker := time.NewTicker(time.Second / time.Duration(t.options.changes))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		s := t.services[rand.IntN(len(t.services)-1)] //nolint:gosec // no secret
		family := rand.IntN(len(s.endpoints))         //nolint:gosec // no secret
		e := s.endpoints[family]
		next := e.pods().nextRandom(podCount)
		err := e.change(next, func() error { return t.api.update(ctx, s.endpointSlice(family, t.addrs(family, next))) })
		if err == nil {
			t.recorder.recordChange()
		}
	}
}

// injectFault injects a fault and returns its record. The record is complete when no
// connection that began during the fault is pending, see [connectTimeout].
func (t *testbed) injectFault(ctx context.Context, f fault) (*record, error) {
	record := t.recorder.beginFault()
	t.recorder.recordOpened(len(t.keptOpen))
	faultCtx, cancel := context.WithTimeout(ctx, t.options.time)
	defer cancel()
	err := f.inject(t, faultCtx)
	<-faultCtx.Done() // even if the fault ended early
	if err == nil {
		err = ctx.Err()
	}
	if err == nil && f.disturbs {
		time.Sleep(repairTime) // the next fault begins with a repaired node
	}
	if err == nil {
		err = t.restoreFairlead(ctx)
	}
	return record, err
}

// restoreFairlead makes sure that exactly one Fairlead is running and ready before the next
// fault.
func (t *testbed) restoreFairlead(ctx context.Context) error {
	if err := t.secondAgent.stop(); err != nil {
		return err
	}
	if t.agent.pid() == 0 {
		if err := t.agent.start(ctx); err != nil {
			return err
		}
	}
	return t.waitTargetsReady(ctx)
}

// kernelRelease returns the output of `uname -r`.
func kernelRelease() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}
