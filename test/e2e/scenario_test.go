//go:build e2e

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"fairlead.io/fairlead/internal/nettest"
)

// scenario is a test with its own Kubernetes namespace. Its methods fail the test on errors.
type scenario struct {
	testing.TB
	*cluster
	ctx       context.Context
	namespace string

	mu        sync.Mutex
	hostCount int // pods and clients created so far
}

// newScenario creates a scenario in the cluster. The end of the test deletes its objects.
func newScenario(t testing.TB, c *cluster) *scenario {
	t.Helper()
	s := &scenario{TB: t, cluster: c, ctx: t.Context()}
	if !c.fairlead.running() {
		t.Logf("an earlier test left Fairlead stopped; end of its log:\n%s", c.fairlead.logTail())
		s.must(c.start(s.ctx))
	}
	name := strings.Trim(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(t.Name())), "-")
	namespace, err := c.api.CoreV1().Namespaces().Create(s.ctx, &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{GenerateName: name[:min(len(name), 40)] + "-"},
	}, metav1.CreateOptions{})
	s.must(err)
	s.namespace = namespace.Name
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of Fairlead's log:\n%s", c.fairlead.logTail())
		}
		ctx := context.WithoutCancel(s.ctx)
		services, err := c.api.CoreV1().Services(s.namespace).List(ctx, metav1.ListOptions{})
		if err == nil {
			for i := range services.Items {
				err = errors.Join(err, ignoreNotFound(
					c.api.CoreV1().Services(s.namespace).Delete(ctx, services.Items[i].Name, metav1.DeleteOptions{})))
			}
		}
		err = errors.Join(err, c.api.CoreV1().Pods(s.namespace).DeleteCollection(ctx,
			metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}, metav1.ListOptions{}))
		err = errors.Join(err, c.api.CoreV1().Namespaces().Delete(ctx, s.namespace, metav1.DeleteOptions{}))
		if err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return s
}

func (s *scenario) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// eventually waits until fn returns nil.
func (s *scenario) eventually(fn func(context.Context) error) {
	s.Helper()
	s.must(eventually(s.ctx, fn))
}

// service is a Service of a scenario.
type service struct {
	*corev1.Service
	scenario *scenario
}

// tcpPort returns a TCP port of a Service. target is the number or the name of the pods'
// port.
func tcpPort(number int32, target any) corev1.ServicePort {
	p := corev1.ServicePort{Name: fmt.Sprintf("tcp-%d", number), Port: number}
	switch to := target.(type) {
	case int:
		p.TargetPort = intstr.FromInt(to)
	case string:
		p.TargetPort = intstr.FromString(to)
	}
	return p
}

// asUDP returns a copy of a port with the protocol UDP.
func asUDP(p corev1.ServicePort) corev1.ServicePort {
	p.Name, p.Protocol = strings.Replace(p.Name, "tcp", "udp", 1), corev1.ProtocolUDP
	return p
}

// createService creates a Service that selects the pods of the app with the same name. By
// default it is dual-stack and has port 80.
func (s *scenario) createService(name string, change ...func(*corev1.Service)) *service {
	s.Helper()
	object := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: s.namespace},
		Spec: corev1.ServiceSpec{
			Selector:       map[string]string{"app": name},
			Ports:          []corev1.ServicePort{tcpPort(80, 8080)},
			IPFamilyPolicy: new(corev1.IPFamilyPolicyPreferDualStack),
		},
	}
	for _, fn := range change {
		fn(object)
	}
	created, err := s.api.CoreV1().Services(s.namespace).Create(s.ctx, object, metav1.CreateOptions{})
	s.must(err)
	return &service{Service: created, scenario: s}
}

// update changes the Service in the API.
func (v *service) update(change func(*corev1.Service)) {
	v.scenario.Helper()
	v.scenario.eventually(func(ctx context.Context) error {
		current, err := v.scenario.api.CoreV1().Services(v.Namespace).Get(ctx, v.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		change(current)
		updated, err := v.scenario.api.CoreV1().Services(v.Namespace).Update(ctx, current, metav1.UpdateOptions{})
		if err == nil {
			v.Service = updated
		}
		return err
	})
}

// setIngress writes the addresses of a load balancer to the status, as a cloud controller
// does.
func (v *service) setIngress(addrs ...string) {
	v.scenario.Helper()
	ingress := make([]map[string]any, 0, len(addrs))
	for _, a := range addrs {
		ingress = append(ingress, map[string]any{"ip": a, "ipMode": "VIP"})
	}
	_, err := v.scenario.api.CoreV1().Services(v.Namespace).Patch(v.scenario.ctx, v.Name, types.MergePatchType,
		patch(ingress, "status", "loadBalancer", "ingress"), metav1.PatchOptions{}, "status")
	v.scenario.must(err)
}

func (v *service) delete() {
	v.scenario.Helper()
	v.scenario.must(v.scenario.api.CoreV1().Services(v.Namespace).Delete(v.scenario.ctx, v.Name, metav1.DeleteOptions{}))
}

// addrPort returns the cluster IP of the first family with a port.
func (v *service) addrPort(number uint16) netip.AddrPort { return v.addrPorts(number)[0] }

// addrPorts returns the cluster IPs of all families with a port.
func (v *service) addrPorts(number uint16) []netip.AddrPort {
	addrs := make([]netip.AddrPort, 0, len(v.Spec.ClusterIPs))
	for _, ip := range v.Spec.ClusterIPs {
		addrs = append(addrs, netip.AddrPortFrom(netip.MustParseAddr(ip), number))
	}
	return addrs
}

// pod is a Pod and its network namespace.
type pod struct {
	*nettest.Host // answers with its Name
	scenario      *scenario
	objectName    string // the name of the Pod object
}

// podOptions configures a pod.
type podOptions struct {
	node     string
	notReady bool
	ports    []corev1.ContainerPort
}

func onOtherNode(o *podOptions) { o.node = otherNode }

func notReady(o *podOptions) { o.notReady = true }

// withTCPPort gives the pod a named TCP port instead of 8080.
func withTCPPort(name string, number int32) func(*podOptions) {
	return func(o *podOptions) {
		o.ports = append(o.ports, corev1.ContainerPort{Name: name, ContainerPort: number, Protocol: corev1.ProtocolTCP})
	}
}

// withUDPPort gives the pod a named UDP port instead of 8080.
func withUDPPort(name string, number int32) func(*podOptions) {
	return func(o *podOptions) {
		o.ports = append(o.ports, corev1.ContainerPort{Name: name, ContainerPort: number, Protocol: corev1.ProtocolUDP})
	}
}

// createPod creates a Pod of an app. By default it runs on this node, is ready, and serves
// TCP and UDP on port 8080.
func (s *scenario) createPod(app string, options ...func(*podOptions)) *pod {
	s.Helper()
	o := podOptions{node: thisNode}
	for _, fn := range options {
		fn(&o)
	}
	s.mu.Lock()
	s.hostCount++
	name := fmt.Sprintf("%s-%d", app, s.hostCount)
	s.mu.Unlock()
	if len(o.ports) == 0 {
		withTCPPort("tcp", 8080)(&o)
		withUDPPort("udp", 8080)(&o)
	}

	host, err := s.net.AddPod(s.namespace + "/" + name)
	s.must(err)
	s.Cleanup(func() {
		if err := host.Close(); err != nil {
			s.Errorf("remove pod %s: %v", name, err)
		}
	})
	object := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: s.namespace, Labels: map[string]string{"app": app}},
		Spec: corev1.PodSpec{
			NodeName:                      o.node,
			TerminationGracePeriodSeconds: new(int64(600)), // the test decides when the pod is removed
			Containers:                    []corev1.Container{{Name: "web", Image: "test", Ports: o.ports}},
		},
	}
	for _, p := range o.ports {
		host.ServeT(s, strings.ToLower(string(p.Protocol)), uint16(p.ContainerPort))
	}
	_, err = s.api.CoreV1().Pods(s.namespace).Create(s.ctx, object, metav1.CreateOptions{})
	s.must(err)
	p := &pod{Host: host, scenario: s, objectName: name}
	p.setReady(!o.notReady)
	return p
}

// createPods creates n Pods of an app on this node.
func (s *scenario) createPods(app string, n int) []*pod {
	s.Helper()
	pods := make([]*pod, 0, n)
	for range n {
		pods = append(pods, s.createPod(app))
	}
	return pods
}

// addClient adds a host to the pod network that serves nothing and that no Service selects.
func (s *scenario) addClient() *nettest.Host {
	s.Helper()
	s.mu.Lock()
	s.hostCount++
	name := fmt.Sprintf("client-%d", s.hostCount)
	s.mu.Unlock()
	host, err := s.net.AddPod(s.namespace + "/" + name)
	s.must(err)
	s.Cleanup(func() {
		if err := host.Close(); err != nil {
			s.Errorf("remove %s: %v", name, err)
		}
	})
	return host
}

// setReady writes the status of a running Pod, as a kubelet does.
func (p *pod) setReady(ready bool) {
	p.scenario.Helper()
	p.scenario.must(p.scenario.setStatus(p.scenario.ctx, p.objectName, ready, p.Addrs()...))
}

// setStatus sets the status of a Pod to running, with these addresses.
func (s *scenario) setStatus(ctx context.Context, name string, ready bool, addrs ...netip.Addr) error {
	condition := corev1.ConditionFalse
	if ready {
		condition = corev1.ConditionTrue
	}
	status := corev1.PodStatus{
		Phase:      corev1.PodRunning,
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: condition}},
		PodIP:      addrs[0].String(),
	}
	for _, a := range addrs {
		status.PodIPs = append(status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	_, err := s.api.CoreV1().Pods(s.namespace).Patch(ctx, name, types.MergePatchType,
		patch(status, "status"), metav1.PatchOptions{}, "status")
	return err
}

// markReady makes the Pod ready.
func (p *pod) markReady() { p.scenario.Helper(); p.setReady(true) }

// markNotReady makes the Pod not ready, as a failing readiness probe does.
func (p *pod) markNotReady() { p.scenario.Helper(); p.setReady(false) }

// terminate deletes the Pod with a grace period: it still serves, and its kubelet waits for
// it.
func (p *pod) terminate() {
	p.scenario.Helper()
	p.scenario.must(p.scenario.api.CoreV1().Pods(p.scenario.namespace).Delete(p.scenario.ctx, p.objectName, metav1.DeleteOptions{}))
}

// remove removes the Pod and its server.
func (p *pod) remove() {
	p.scenario.Helper()
	p.scenario.must(p.scenario.api.CoreV1().Pods(p.scenario.namespace).Delete(p.scenario.ctx, p.objectName, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}))
	p.scenario.must(p.Close())
}

// destination is the network and address that a client connects to.
type destination struct {
	network string
	addr    netip.AddrPort
}

func tcpTo(addr netip.AddrPort) destination { return destination{nettest.TCP, addr} }
func udpTo(addr netip.AddrPort) destination { return destination{nettest.UDP, addr} }

func (d destination) String() string { return d.network + " " + d.addr.String() }

const (
	// attemptTimeout bounds an attempt that is retried. A connection that began before its
	// Service was programmed gets no answer for long: connection tracking on the node
	// remembers where the first packet went.
	attemptTimeout = 500 * time.Millisecond
	// connectTimeout bounds an attempt that must succeed. A lost packet is sent again after
	// one second.
	connectTimeout = 5 * time.Second
)

func connect(ctx context.Context, from *nettest.Host, to destination, timeout time.Duration) (nettest.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return from.Connect(ctx, to.network, to.addr)
}

// waitReaches waits until connections reach all of these pods and no others.
func (s *scenario) waitReaches(from *nettest.Host, to destination, want ...*pod) {
	s.Helper()
	names := map[string]bool{}
	for _, p := range want {
		names[p.Name] = true
	}
	s.eventually(func(ctx context.Context) error {
		got := map[string]int{}
		// With this many random connections, about one round in a hundred misses a pod.
		// Then eventually starts another round.
		for range max(10, 7*len(want)) {
			answer, err := connect(ctx, from, to, attemptTimeout)
			if err != nil {
				return fmt.Errorf("%d hosts answered, then: %w", len(got), err)
			}
			got[answer.Host]++
		}
		for name := range names {
			if got[name] == 0 {
				return fmt.Errorf("%s from %s: %s is not reached; reached %v", to, from.Name, name, got)
			}
		}
		if len(got) != len(names) {
			return fmt.Errorf("%s from %s: reached %v, want %v", to, from.Name, got, slices.Collect(maps.Keys(names)))
		}
		return nil
	})
}

// waitRefused waits until connections are refused.
func (s *scenario) waitRefused(from *nettest.Host, to destination) {
	s.Helper()
	s.waitFails(from, to, nettest.ErrRefused)
}

// waitUnanswered waits until connections time out.
func (s *scenario) waitUnanswered(from *nettest.Host, to destination) {
	s.Helper()
	s.waitFails(from, to, nettest.ErrTimeout)
}

// waitFails waits until connections fail with one of the errors.
func (s *scenario) waitFails(from *nettest.Host, to destination, wants ...error) {
	s.Helper()
	s.eventually(func(ctx context.Context) error {
		answer, err := connect(ctx, from, to, attemptTimeout)
		if err == nil {
			return fmt.Errorf("%s from %s: %s answered, want %v", to, from.Name, answer.Host, wants)
		}
		for _, want := range wants {
			if errors.Is(err, want) {
				return nil
			}
		}
		return fmt.Errorf("got %w, want %v", err, wants)
	})
}

// clientLoad is a set of clients that connect continuously.
type clientLoad struct {
	stop        chan struct{}
	wg          sync.WaitGroup
	connections atomic.Int64

	mu       sync.Mutex
	failures []error
}

// startLoad starts a client for each destination. Each client makes one connection after the
// other until stopLoad, and every connection must succeed.
func (s *scenario) startLoad(from *nettest.Host, to ...destination) *clientLoad {
	l := &clientLoad{stop: make(chan struct{})}
	for _, d := range to {
		l.wg.Go(func() {
			const pause = 2 * time.Millisecond
			for {
				select {
				case <-l.stop:
					return
				case <-time.After(pause):
				}
				if _, err := connect(s.ctx, from, d, connectTimeout); err != nil {
					l.mu.Lock()
					l.failures = append(l.failures, err)
					l.mu.Unlock()
				}
				l.connections.Add(1)
			}
		})
	}
	return l
}

// stopLoad stops the load. It fails the test if a connection failed.
func (s *scenario) stopLoad(l *clientLoad) {
	s.Helper()
	close(l.stop)
	l.wg.Wait()
	if len(l.failures) > 0 {
		s.Errorf("%d of %d connections failed; first error: %v", len(l.failures), l.connections.Load(), l.failures[0])
	}
	const enough = 50
	if l.connections.Load() < enough {
		s.Errorf("only %d connections were made", l.connections.Load())
	}
	s.Logf("%d connections", l.connections.Load())
}

// waitEvent waits for a Warning Event on the Service whose note contains all of the parts.
func (v *service) waitEvent(parts ...string) {
	v.scenario.Helper()
	v.scenario.eventually(func(ctx context.Context) error {
		events, err := v.scenario.api.EventsV1().Events(v.Namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var seen []string
	events:
		for i := range events.Items {
			e := &events.Items[i]
			seen = append(seen, fmt.Sprintf("%s %s/%s: %s: %s", e.Type, e.Regarding.Kind, e.Regarding.Name, e.Reason, e.Note))
			if e.Type != corev1.EventTypeWarning || e.Regarding.Kind != "Service" || e.Regarding.Name != v.Name {
				continue
			}
			for _, part := range parts {
				if !strings.Contains(e.Note, part) {
					continue events
				}
			}
			return nil
		}
		return fmt.Errorf("no Warning Event on Service %s contains %q; Events:\n%s", v.Name, parts, strings.Join(seen, "\n"))
	})
}
