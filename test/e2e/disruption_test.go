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

// The tests in this file stop what all scenarios need, and so none runs beside
// another.

// While the API server is away everything works as it was; what changed with it
// is carried out after.
func TestAPIServerRestart(t *testing.T) {
	s := newScenario(t, shared)
	web := s.service("web")
	client, first := s.client(), s.pod("web")
	s.reaches(client, tcpTo(web.at(80)), first)

	load := s.load(client, tcpTo(web.all(80)[0]), tcpTo(web.all(80)[1]))
	s.must(s.cp.StopAPIServer())
	time.Sleep(time.Second) // Long enough to notice.
	s.reaches(client, tcpTo(web.at(80)), first)
	s.must(s.cp.StartAPIServer(s.ctx))

	second := s.pod("web")
	s.reaches(client, tcpTo(web.at(80)), first, second)
	other := s.service("other")
	s.reaches(client, tcpTo(other.at(80)), s.pod("other"))
	s.wentWell(load)
}

// Watches that cannot go on where they were, because etcd and the API server
// have forgotten what was then, begin anew; nothing that happened meanwhile is
// missed, deletions included.
func TestWatchesExpire(t *testing.T) {
	s := newScenario(t, shared)
	web, doomed := s.service("web"), s.service("doomed")
	client, first, lost := s.client(), s.pod("web"), s.pod("doomed")
	s.reaches(client, tcpTo(web.at(80)), first)
	s.reaches(client, tcpTo(doomed.at(80)), lost)

	load := s.load(client, tcpTo(web.at(80)))
	// Fairlead sleeps through it, as on a node that hangs.
	s.must(s.lead.pause())
	web2 := s.service("web2")
	third := s.pod("web2")
	second := s.pod("web")
	doomed.delete()
	s.churn(50)
	s.eventually(func(ctx context.Context) error { return s.endpoints(ctx, "web", 2) })
	s.eventually(func(ctx context.Context) error { return s.endpoints(ctx, "web2", 1) })
	s.must(s.cp.StopAPIServer())
	s.must(s.cp.Compact(s.ctx))
	s.must(s.cp.StartAPIServer(s.ctx))
	s.must(s.lead.resume())

	s.reaches(client, tcpTo(web.at(80)), first, second)
	s.reaches(client, tcpTo(web2.at(80)), third)
	s.fails(client, tcpTo(doomed.at(80)), nettest.ErrRefused, nettest.ErrTimeout)
	s.wentWell(load)
}

// TestEtcdRestore checks that what the API server says after a restore of etcd from a
// backup is programmed, although resource versions went backwards: the API server
// reports no error for a watch that begins at a version it has not reached.
func TestEtcdRestore(t *testing.T) {
	s := newScenario(t, shared)
	web := s.service("web", func(v *corev1.Service) { v.Spec.Selector = nil })
	client, first, second := s.client(), s.pod("first"), s.pod("second")
	s.slice("web", endpoint{pod: first})
	s.reaches(client, tcpTo(web.at(80)), first)
	s.must(s.cp.Backup(s.ctx))

	s.churn(50)
	slices := s.api.DiscoveryV1().EndpointSlices(s.namespace)
	listed, err := slices.List(s.ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=web"})
	s.must(err)
	for _, slice := range listed.Items {
		slice.Endpoints[0].Addresses = []string{second.IPv4.String()}
		_, err := slices.Update(s.ctx, &slice, metav1.UpdateOptions{})
		s.must(err)
	}
	s.reaches(client, tcpTo(web.at(80)), second)
	s.must(s.cp.Restore(s.ctx))
	// Pauses between requests take up to 20 s of the minute that it may last.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		ok, err := s.lead.logged("went backwards", "resource=endpointslices")
		s.must(err)
		if ok {
			break
		}
		if time.Now().After(deadline) {
			s.Fatal("the log does not say that versions went backwards")
		}
	}
	s.reaches(client, tcpTo(web.at(80)), first)
}

// churn raises the resource version.
func (s *scenario) churn(changes int) {
	s.Helper()
	for range changes {
		_, err := s.api.CoreV1().ConfigMaps(s.namespace).Create(s.ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{GenerateName: "churn-"},
		}, metav1.CreateOptions{})
		s.must(err)
	}
}

// endpoints returns an error unless a Service has so many endpoints that are
// ready, in each family.
func (s *scenario) endpoints(ctx context.Context, service string, want int) error {
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

// Fairlead ends and starts again while clients connect. What is programmed
// stays and works; what changed meanwhile is carried out then.
func TestRestart(t *testing.T) {
	for name, end := range map[string]func(*fairlead) error{
		"stopped": (*fairlead).stop,
		"killed":  (*fairlead).kill,
	} {
		t.Run(name, func(t *testing.T) {
			s := newScenario(t, shared)
			web, doomed := s.service("web", both), s.service("doomed")
			client, first, lost := s.client(), s.pod("web"), s.pod("doomed")
			s.reaches(client, tcpTo(web.at(80)), first)
			s.reaches(client, tcpTo(web.all(80)[1]), first)
			s.reaches(client, udpTo(web.at(80)), first)
			s.reaches(client, tcpTo(doomed.at(80)), lost)

			load := s.load(client, tcpTo(web.all(80)[0]), tcpTo(web.all(80)[1]), udpTo(web.at(80)))
			s.must(end(s.lead))
			second := s.pod("web")
			doomed.delete()
			fresh := s.service("fresh")
			third := s.pod("fresh")
			s.reaches(client, tcpTo(web.at(80)), first)
			s.must(s.start(s.ctx))

			for _, to := range []destination{tcpTo(web.all(80)[0]), tcpTo(web.all(80)[1]), udpTo(web.at(80))} {
				s.reaches(client, to, first, second)
			}
			s.reaches(client, tcpTo(fresh.at(80)), third)
			s.fails(client, tcpTo(doomed.at(80)), nettest.ErrRefused, nettest.ErrTimeout)
			s.wentWell(load)
		})
	}
}

// both gives a Service port 80 of TCP and of UDP.
func both(v *corev1.Service) {
	v.Spec.Ports = []corev1.ServicePort{port(80, 8080), udp(port(80, 8080))}
}

// Fairlead starts when there is no API server, and waits for it. What was
// programmed before stays as it is until all is known.
func TestStartWithoutAPIServer(t *testing.T) {
	s := newScenario(t, shared)
	web := s.service("web")
	client, first := s.client(), s.pod("web")
	s.reaches(client, tcpTo(web.at(80)), first)
	load := s.load(client, tcpTo(web.at(80)))
	s.must(s.lead.stop())
	s.must(s.cp.StopAPIServer())
	s.must(s.lead.start())
	time.Sleep(2 * time.Second) // Long enough to do something wrong.
	s.reaches(client, tcpTo(web.at(80)), first)
	if _, err := s.lead.get(s.ctx, healthzAddr, "/healthz"); err == nil {
		t.Error("/healthz says that all is well before anything is known")
	}
	s.must(s.cp.StartAPIServer(s.ctx))
	start := time.Now()
	s.must(s.lead.waitReady(s.ctx))
	t.Logf("programmed %s after the API server was there", time.Since(start).Round(10*time.Millisecond))
	second := s.pod("web")
	// The controller manager may wait before it tries again.
	s.eventually(func(ctx context.Context) error { return s.endpoints(ctx, "web", 2) })
	t.Logf("the controller manager was back %s after the API server", time.Since(start).Round(10*time.Millisecond))
	s.reaches(client, tcpTo(web.at(80)), first, second)
	t.Logf("its work was programmed %s after the API server was there", time.Since(start).Round(10*time.Millisecond))
	s.wentWell(load)
}

// A load balancer learns at /healthz that a node is about to go, while Services
// on it still work.
func TestNodeIsBeingDeleted(t *testing.T) {
	s := newScenario(t, shared)
	web := s.service("web")
	client, only := s.client(), s.pod("web")
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
		_, err := s.lead.get(ctx, healthzAddr, "/healthz")
		if err == nil {
			return errors.New("/healthz says that all is well")
		}
		if !strings.Contains(err.Error(), "503") {
			return err
		}
		return nil
	})
	if _, err := s.lead.get(s.ctx, healthzAddr, "/livez"); err != nil {
		t.Errorf("/livez: %v", err)
	}
	s.reaches(client, tcpTo(web.at(80)), only)
	taint()
	s.must(s.lead.waitReady(s.ctx))
}
