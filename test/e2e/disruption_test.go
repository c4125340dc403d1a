//go:build e2e

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/internal/nettest"
)

// The tests in this file stop shared components, so they do not run in parallel.

// TestAPIServerRestart checks that connections work while the API server is down, and that
// later changes take effect.
func TestAPIServerRestart(t *testing.T) {
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	client, first := s.addClient(), s.createPod("web")
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)

	load := s.startLoad(client, tcpTo(web.addrPorts(80)[0]), tcpTo(web.addrPorts(80)[1]))
	s.must(s.cp.StopAPIServer())
	time.Sleep(time.Second) // long enough for Fairlead to notice
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
	s.must(s.cp.StartAPIServer(s.ctx))

	second := s.createPod("web")
	s.waitReaches(client, tcpTo(web.addrPort(80)), first, second)
	other := s.createService("other")
	s.waitReaches(client, tcpTo(other.addrPort(80)), s.createPod("other"))
	s.stopLoad(load)
}

// TestWatchesExpire checks that Fairlead lists again when etcd and the API server no longer
// have the resource versions of its watches, and that it misses no change, deletions
// included.
func TestWatchesExpire(t *testing.T) {
	s := newScenario(t, sharedCluster)
	web, doomed := s.createService("web"), s.createService("doomed")
	client, first, lost := s.addClient(), s.createPod("web"), s.createPod("doomed")
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
	s.waitReaches(client, tcpTo(doomed.addrPort(80)), lost)

	load := s.startLoad(client, tcpTo(web.addrPort(80)))
	// Fairlead is paused meanwhile, as on a node that hangs.
	s.must(s.fairlead.pause())
	web2 := s.createService("web2")
	third := s.createPod("web2")
	second := s.createPod("web")
	doomed.delete()
	s.advanceResourceVersion(50)
	s.eventually(func(ctx context.Context) error { return s.checkReadyEndpoints(ctx, "web", 2) })
	s.eventually(func(ctx context.Context) error { return s.checkReadyEndpoints(ctx, "web2", 1) })
	s.must(s.cp.StopAPIServer())
	s.must(s.cp.Compact(s.ctx))
	s.must(s.cp.StartAPIServer(s.ctx))
	s.must(s.fairlead.resume())

	s.waitReaches(client, tcpTo(web.addrPort(80)), first, second)
	s.waitReaches(client, tcpTo(web2.addrPort(80)), third)
	s.waitFails(client, tcpTo(doomed.addrPort(80)), nettest.ErrRefused, nettest.ErrTimeout)
	s.stopLoad(load)
}

// TestEtcdRestore checks that Fairlead programs the state of the API server after etcd was
// restored from a backup, although resource versions went backwards. The API server reports
// no error for a watch that starts at a version it has not reached yet.
func TestEtcdRestore(t *testing.T) {
	s := newScenario(t, sharedCluster)
	web := s.createService("web", func(v *corev1.Service) { v.Spec.Selector = nil })
	client, first, second := s.addClient(), s.createPod("first"), s.createPod("second")
	s.createSlice("web", sliceEndpoint{pod: first})
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
	s.must(s.cp.Backup(s.ctx))

	s.advanceResourceVersion(50)
	slices := s.api.DiscoveryV1().EndpointSlices(s.namespace)
	listed, err := slices.List(s.ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=web"})
	s.must(err)
	for _, slice := range listed.Items {
		slice.Endpoints[0].Addresses = []string{second.IPv4.String()}
		_, err := slices.Update(s.ctx, &slice, metav1.UpdateOptions{})
		s.must(err)
	}
	s.waitReaches(client, tcpTo(web.addrPort(80)), second)
	s.must(s.cp.Restore(s.ctx))
	// Delays between requests may use up to 20 s of the minute.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		ok, err := s.fairlead.logged("went backwards", "resource=endpointslices")
		s.must(err)
		if ok {
			break
		}
		if time.Now().After(deadline) {
			s.Fatal("Fairlead does not log that resource versions went backwards")
		}
	}
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
}

// advanceResourceVersion makes changes that do not concern Services, to raise the resource
// version.
func (s *scenario) advanceResourceVersion(changes int) {
	s.Helper()
	for range changes {
		_, err := s.api.CoreV1().ConfigMaps(s.namespace).Create(s.ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{GenerateName: "churn-"},
		}, metav1.CreateOptions{})
		s.must(err)
	}
}

// checkReadyEndpoints returns an error unless the Service has the given number of ready
// endpoints in each family.
func (s *scenario) checkReadyEndpoints(ctx context.Context, service string, want int) error {
	slices, err := s.api.DiscoveryV1().EndpointSlices(s.namespace).List(ctx, metav1.ListOptions{
		LabelSelector: "kubernetes.io/service-name=" + service,
	})
	if err != nil {
		return err
	}
	got := map[string]int{"IPv4": 0, "IPv6": 0}
	for i := range slices.Items {
		for j := range slices.Items[i].Endpoints {
			if ready := slices.Items[i].Endpoints[j].Conditions.Ready; ready != nil && *ready {
				got[string(slices.Items[i].AddressType)]++
			}
		}
	}
	if got["IPv4"] != want || got["IPv6"] != want {
		return fmt.Errorf("Service %s has %v ready endpoints, want %d of each family", service, got, want)
	}
	return nil
}

// TestRestart restarts Fairlead while clients connect. The programmed state stays in place
// meanwhile, and changes made in the meantime take effect after the restart.
func TestRestart(t *testing.T) {
	for name, end := range map[string]func(*fairlead) error{
		"stopped": (*fairlead).stop,
		"killed":  (*fairlead).kill,
	} {
		t.Run(name, func(t *testing.T) {
			s := newScenario(t, sharedCluster)
			web, doomed := s.createService("web", tcpAndUDP), s.createService("doomed")
			client, first, lost := s.addClient(), s.createPod("web"), s.createPod("doomed")
			s.waitReaches(client, tcpTo(web.addrPort(80)), first)
			s.waitReaches(client, tcpTo(web.addrPorts(80)[1]), first)
			s.waitReaches(client, udpTo(web.addrPort(80)), first)
			s.waitReaches(client, tcpTo(doomed.addrPort(80)), lost)

			load := s.startLoad(client, tcpTo(web.addrPorts(80)[0]), tcpTo(web.addrPorts(80)[1]), udpTo(web.addrPort(80)))
			s.must(end(s.fairlead))
			second := s.createPod("web")
			doomed.delete()
			fresh := s.createService("fresh")
			third := s.createPod("fresh")
			s.waitReaches(client, tcpTo(web.addrPort(80)), first)
			s.must(s.start(s.ctx))

			for _, to := range []destination{tcpTo(web.addrPorts(80)[0]), tcpTo(web.addrPorts(80)[1]), udpTo(web.addrPort(80))} {
				s.waitReaches(client, to, first, second)
			}
			s.waitReaches(client, tcpTo(fresh.addrPort(80)), third)
			s.waitFails(client, tcpTo(doomed.addrPort(80)), nettest.ErrRefused, nettest.ErrTimeout)
			s.stopLoad(load)
		})
	}
}

// tcpAndUDP gives a Service port 80 for TCP and UDP.
func tcpAndUDP(v *corev1.Service) {
	v.Spec.Ports = []corev1.ServicePort{tcpPort(80, 8080), asUDP(tcpPort(80, 8080))}
}

// TestStartWithoutAPIServer checks that Fairlead starts and waits while the API server is
// down, and keeps the programmed state until it has listed all objects.
func TestStartWithoutAPIServer(t *testing.T) {
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	client, first := s.addClient(), s.createPod("web")
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
	load := s.startLoad(client, tcpTo(web.addrPort(80)))
	s.must(s.fairlead.stop())
	s.must(s.cp.StopAPIServer())
	s.must(s.fairlead.start())
	time.Sleep(2 * time.Second) // long enough for a mistake to show
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
	if _, err := s.fairlead.get(s.ctx, healthzAddr, "/healthz"); err == nil {
		t.Error("/healthz reports a healthy node before Fairlead has listed anything")
	}
	s.must(s.cp.StartAPIServer(s.ctx))
	start := time.Now()
	s.must(s.fairlead.waitReady(s.ctx))
	t.Logf("programmed %s after the API server was ready", time.Since(start).Round(10*time.Millisecond))
	second := s.createPod("web")
	// The controller manager may wait before it retries.
	s.eventually(func(ctx context.Context) error { return s.checkReadyEndpoints(ctx, "web", 2) })
	t.Logf("the controller manager was ready %s after the API server", time.Since(start).Round(10*time.Millisecond))
	s.waitReaches(client, tcpTo(web.addrPort(80)), first, second)
	t.Logf("its changes were programmed %s after the API server was ready", time.Since(start).Round(10*time.Millisecond))
	s.stopLoad(load)
}

// TestNodeDeletionTaint checks that /healthz tells load balancers that a node is about to be
// deleted, while Services on the node still work.
func TestNodeDeletionTaint(t *testing.T) {
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	client, only := s.addClient(), s.createPod("web")
	nodes := s.api.CoreV1().Nodes()
	taint := func(taints ...corev1.Taint) {
		t.Helper()
		ctx := context.WithoutCancel(s.ctx)
		s.must(eventually(ctx, func(ctx context.Context) error {
			node, err := nodes.Get(ctx, thisNode, metav1.GetOptions{})
			if err != nil {
				return err
			}
			node.Spec.Taints = taints
			_, err = nodes.Update(ctx, node, metav1.UpdateOptions{})
			return err
		}))
	}
	t.Cleanup(func() { taint() })
	taint(corev1.Taint{Key: "ToBeDeletedByClusterAutoscaler", Effect: corev1.TaintEffectNoSchedule})
	s.eventually(func(ctx context.Context) error {
		_, err := s.fairlead.get(ctx, healthzAddr, "/healthz")
		if err == nil {
			return errors.New("/healthz reports an eligible node")
		}
		if !strings.Contains(err.Error(), "503") {
			return err
		}
		return nil
	})
	if _, err := s.fairlead.get(s.ctx, healthzAddr, "/livez"); err != nil {
		t.Errorf("/livez: %v", err)
	}
	s.waitReaches(client, tcpTo(web.addrPort(80)), only)
	taint()
	s.must(s.fairlead.waitReady(s.ctx))
}
