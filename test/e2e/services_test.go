//go:build e2e

package e2e_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/internal/nettest"
)

// TestClusterIP checks that pods, the node and the outside host reach a Service over TCP and
// UDP at its cluster IPs of both families.
func TestClusterIP(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web", tcpAndUDP)
	here, there := s.createPod("web"), s.createPod("web", onOtherNode)
	if len(web.Spec.ClusterIPs) != 2 {
		t.Fatalf("cluster IPs %v, want two", web.Spec.ClusterIPs)
	}
	for _, addr := range web.addrPorts(80) {
		for _, from := range []*nettest.Host{s.addClient(), s.net.Node, s.net.Outside} {
			s.waitReaches(from, tcpTo(addr), here, there)
			s.waitReaches(from, udpTo(addr), here, there)
		}
	}
}

// TestHairpin checks that a pod can reach itself through its own Service.
func TestHairpin(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	only := s.createPod("web")
	for _, addr := range web.addrPorts(80) {
		s.waitReaches(only.Host, tcpTo(addr), only)
	}
}

// TestSourceAddress checks that pods see the addresses of clients that are pods, and an
// address of the node for all other clients.
func TestSourceAddress(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	only, client := s.createPod("web"), s.addClient()
	for i, addr := range web.addrPorts(80) {
		s.waitReaches(client, tcpTo(addr), only)
		for _, tc := range []struct {
			from *nettest.Host
			want netip.Addr
		}{
			{client, client.Addrs()[i]},
			{s.net.Outside, s.net.Node.Addrs()[i]},
		} {
			answer, err := connect(s.ctx, tc.from, tcpTo(addr), connectTimeout)
			s.must(err)
			if answer.Source.Addr() != tc.want {
				t.Errorf("from %s to %s: the pod sees %s, want %s", tc.from.Name, addr, answer.Source, tc.want)
			}
		}
	}
}

// TestTargetPorts checks numeric and named target ports. A name can have a different port
// number in each pod.
func TestTargetPorts(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web", func(v *corev1.Service) {
		v.Spec.Ports = []corev1.ServicePort{tcpPort(80, "http"), tcpPort(443, 8443), asUDP(tcpPort(53, "dns"))}
	})
	first := s.createPod("web", withTCPPort("http", 8080), withTCPPort("https", 8443), withUDPPort("dns", 5353))
	second := s.createPod("web", withTCPPort("http", 9090), withTCPPort("https", 8443))
	client := s.addClient()
	s.waitReaches(client, tcpTo(web.addrPort(80)), first, second)
	s.waitReaches(client, tcpTo(web.addrPort(443)), first, second)
	s.waitReaches(client, udpTo(web.addrPort(53)), first)
	for _, tc := range []struct {
		to   destination
		pod  *pod
		want uint16
	}{
		{tcpTo(web.addrPort(80)), first, 8080},
		{tcpTo(web.addrPort(80)), second, 9090},
		{tcpTo(web.addrPort(443)), second, 8443},
		{udpTo(web.addrPort(53)), first, 5353},
	} {
		s.eventually(func(ctx context.Context) error {
			answer, err := connect(ctx, client, tc.to, attemptTimeout)
			if err == nil && answer.Host != tc.pod.Name {
				err = errors.New("another pod answered")
			}
			if err == nil && answer.Endpoint.Port() != tc.want {
				t.Errorf("%s reaches %s, want port %d", tc.to, answer.Endpoint, tc.want)
			}
			return err
		})
	}
}

// TestScale checks that connections are refused while a Service has no pods, and otherwise
// follow the pods.
func TestScale(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web", tcpAndUDP)
	client := s.addClient()
	check := func(pods ...*pod) {
		t.Helper()
		for _, to := range []destination{tcpTo(web.addrPorts(80)[0]), tcpTo(web.addrPorts(80)[1]), udpTo(web.addrPort(80))} {
			if len(pods) == 0 {
				s.waitRefused(client, to)
			} else {
				s.waitReaches(client, to, pods...)
			}
		}
	}
	check()
	pods := s.createPods("web", 1)
	check(pods...)
	pods = append(pods, s.createPods("web", 4)...)
	check(pods...)
	for _, p := range pods[2:] {
		p.terminate()
		p.remove()
	}
	check(pods[:2]...)
	for _, p := range pods[:2] {
		p.terminate()
		p.remove()
	}
	check()
	check(s.createPod("web"))
}

// TestRollingUpdate replaces pods like a Deployment: each new pod is ready before an old one
// is deleted, and an old pod serves until no client connects to it any more. No connection
// may fail, and open connections must continue.
func TestRollingUpdate(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web", tcpAndUDP)
	client := s.addClient()
	serving := s.createPods("web", 3)
	s.waitReaches(client, tcpTo(web.addrPort(80)), serving...)
	s.waitReaches(client, tcpTo(web.addrPorts(80)[1]), serving...)
	s.waitReaches(client, udpTo(web.addrPort(80)), serving...)

	load := s.startLoad(client, tcpTo(web.addrPorts(80)[0]), tcpTo(web.addrPorts(80)[1]), udpTo(web.addrPort(80)))
	for range serving {
		fresh := s.createPod("web", notReady)
		fresh.markReady()
		s.waitReaches(client, tcpTo(web.addrPort(80)), append(serving, fresh)...)
		old := serving[0]
		serving = append(serving[1:], fresh)

		open := s.openTo(client, tcpTo(web.addrPort(80)), old)
		old.terminate()
		for _, to := range []destination{tcpTo(web.addrPorts(80)[0]), tcpTo(web.addrPorts(80)[1]), udpTo(web.addrPort(80))} {
			s.waitReaches(client, to, serving...)
		}
		if answer, err := open.Ask(s.ctx); err != nil || answer.Host != old.Name {
			t.Errorf("an open connection to a terminating pod: got %v, %v", answer, err)
		}
		s.must(open.Close())
		old.remove()
	}
	s.stopLoad(load)
}

// openTo returns an open connection that reaches the pod.
func (s *scenario) openTo(from *nettest.Host, to destination, want *pod) *nettest.Conn {
	s.Helper()
	var opened *nettest.Conn
	s.eventually(func(ctx context.Context) error {
		conn, err := from.Open(ctx, to.network, to.addr)
		if err != nil {
			return err
		}
		answer, err := conn.Ask(ctx)
		if err == nil && answer.Host == want.Name {
			opened = conn
			return nil
		}
		return errors.Join(fmt.Errorf("reached %s: %w", answer.Host, err), conn.Close())
	})
	return opened
}

// TestReadiness checks that a pod that is not ready gets no new connections and keeps its
// open ones, unless the Service has publishNotReadyAddresses.
func TestReadiness(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	all := s.createService("all", func(v *corev1.Service) {
		v.Spec.PublishNotReadyAddresses = true
		v.Spec.Selector = map[string]string{"app": "web"}
	})
	client := s.addClient()
	first, second := s.createPod("web"), s.createPod("web", notReady)
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
	s.waitReaches(client, tcpTo(all.addrPort(80)), first, second)

	second.markReady()
	s.waitReaches(client, tcpTo(web.addrPort(80)), first, second)
	open := s.openTo(client, tcpTo(web.addrPort(80)), first)
	first.markNotReady()
	s.waitReaches(client, tcpTo(web.addrPort(80)), second)
	s.waitReaches(client, tcpTo(all.addrPort(80)), first, second)
	if answer, err := open.Ask(s.ctx); err != nil || answer.Host != first.Name {
		t.Errorf("an open connection to a pod that is not ready: got %v, %v", answer, err)
	}
	s.must(open.Close())
	second.markNotReady()
	s.waitRefused(client, tcpTo(web.addrPort(80)))
	first.markReady()
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
}

// TestTerminatingEndpoints checks that terminating pods that are still serving get
// connections if no other pods are left.
func TestTerminatingEndpoints(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	client := s.addClient()
	first, second := s.createPod("web"), s.createPod("web")
	s.waitReaches(client, tcpTo(web.addrPort(80)), first, second)

	first.terminate()
	s.waitReaches(client, tcpTo(web.addrPort(80)), second)
	second.terminate()
	s.waitReaches(client, tcpTo(web.addrPort(80)), first, second)
	second.markNotReady()
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
	fresh := s.createPod("web")
	s.waitReaches(client, tcpTo(web.addrPort(80)), fresh)
	fresh.terminate()
	fresh.remove()
	s.waitReaches(client, tcpTo(web.addrPort(80)), first)
	first.remove()
	second.remove()
	s.waitRefused(client, tcpTo(web.addrPort(80)))
}

// TestInternalTrafficPolicyLocal checks that with internalTrafficPolicy Local only pods on
// the client's node serve, and that without such pods connections are dropped.
func TestInternalTrafficPolicyLocal(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web", func(v *corev1.Service) {
		v.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
	})
	client := s.addClient()
	here, there := s.createPod("web"), s.createPod("web", onOtherNode)
	for _, from := range []*nettest.Host{client, s.net.Node} {
		s.waitReaches(from, tcpTo(web.addrPort(80)), here)
	}
	here.markNotReady()
	s.waitUnanswered(client, tcpTo(web.addrPort(80)))
	web.update(func(v *corev1.Service) {
		v.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyCluster)
	})
	s.waitReaches(client, tcpTo(web.addrPort(80)), there)
	web.update(func(v *corev1.Service) { v.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal) })
	here.markReady()
	s.waitReaches(client, tcpTo(web.addrPort(80)), here)
}

// TestTopology checks that with trafficDistribution PreferSameZone connections stay in the
// node's zone while it has pods, and follow the node's zone label.
//
// It changes the Node, so it does not run in parallel.
func TestTopology(t *testing.T) {
	s := newScenario(t, sharedCluster)
	zone := func(name string) {
		t.Helper()
		_, err := s.api.CoreV1().Nodes().Patch(context.WithoutCancel(s.ctx), thisNode, types.MergePatchType,
			patch(name, "metadata", "labels", corev1.LabelTopologyZone), metav1.PatchOptions{})
		s.must(err)
	}
	web := s.createService("web", func(v *corev1.Service) {
		v.Spec.TrafficDistribution = new(corev1.ServiceTrafficDistributionPreferSameZone)
	})
	client := s.addClient()
	// The controller derives a pod's zone from its node; each zone has one pod.
	here, there := s.createPod("web"), s.createPod("web", onOtherNode)
	s.waitReaches(client, tcpTo(web.addrPort(80)), here)
	here.markNotReady()
	s.waitReaches(client, tcpTo(web.addrPort(80)), there)
	here.markReady()
	s.waitReaches(client, tcpTo(web.addrPort(80)), here)

	// With PreferSameNode, hints name nodes, and zones do not matter.
	web.update(func(v *corev1.Service) {
		v.Spec.TrafficDistribution = new(corev1.ServiceTrafficDistributionPreferSameNode)
	})
	s.waitReaches(client, tcpTo(web.addrPort(80)), here)
	web.update(func(v *corev1.Service) { v.Spec.TrafficDistribution = nil })
	s.waitReaches(client, tcpTo(web.addrPort(80)), here, there)

	// The test writes this EndpointSlice, so no controller changes its hints with the Node.
	fixed := s.createService("fixed", func(v *corev1.Service) { v.Spec.Selector = nil })
	s.createSlice("fixed", sliceEndpoint{here, thisZone}, sliceEndpoint{there, otherZone})
	t.Cleanup(func() { zone(thisZone) })
	s.waitReaches(client, tcpTo(fixed.addrPort(80)), here)
	zone(otherZone)
	s.waitReaches(client, tcpTo(fixed.addrPort(80)), there)
	zone("zone-without-pods")
	s.waitReaches(client, tcpTo(fixed.addrPort(80)), here, there)
	zone(thisZone)
	s.waitReaches(client, tcpTo(fixed.addrPort(80)), here)
}

// TestIPFamilies checks that a Service has its requested families in the requested order, and
// that the second family can be added and removed.
func TestIPFamilies(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web", func(v *corev1.Service) {
		v.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack)
		v.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv6Protocol}
	})
	only, client := s.createPod("web"), s.addClient()
	if !web.addrPort(80).Addr().Is6() {
		t.Fatalf("cluster IP %s, want IPv6", web.addrPort(80))
	}
	s.waitReaches(client, tcpTo(web.addrPort(80)), only)
	web.update(func(v *corev1.Service) { v.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack) })
	both := web.addrPorts(80)
	for _, addr := range both {
		s.waitReaches(client, tcpTo(addr), only)
	}
	web.update(func(v *corev1.Service) {
		v.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack)
		v.Spec.IPFamilies, v.Spec.ClusterIPs = v.Spec.IPFamilies[:1], v.Spec.ClusterIPs[:1]
	})
	s.waitFails(client, tcpTo(both[1]), nettest.ErrRefused, nettest.ErrTimeout)
	s.waitReaches(client, tcpTo(both[0]), only)
}

// TestPortsChange checks that ports of a Service can be changed and removed.
func TestPortsChange(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web", func(v *corev1.Service) {
		v.Spec.Ports = []corev1.ServicePort{tcpPort(80, 8080), tcpPort(81, 8080)}
	})
	only, client := s.createPod("web"), s.addClient()
	s.waitReaches(client, tcpTo(web.addrPort(80)), only)
	s.waitReaches(client, tcpTo(web.addrPort(81)), only)
	web.update(func(v *corev1.Service) { v.Spec.Ports = []corev1.ServicePort{tcpPort(80, 8080), tcpPort(82, 8080)} })
	s.waitReaches(client, tcpTo(web.addrPort(82)), only)
	s.waitFails(client, tcpTo(web.addrPort(81)), nettest.ErrRefused, nettest.ErrTimeout)
	s.waitReaches(client, tcpTo(web.addrPort(80)), only)
}

// TestDeleteAndRecreate checks that a deleted Service does not answer, and that a new Service
// of the same name does, even at the same address.
func TestDeleteAndRecreate(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	only, client := s.createPod("web"), s.addClient()
	s.waitReaches(client, tcpTo(web.addrPort(80)), only)
	addrs := web.addrPorts(80)
	web.delete()
	for _, addr := range addrs {
		s.waitFails(client, tcpTo(addr), nettest.ErrRefused, nettest.ErrTimeout)
	}
	// The new Service differs only in its UID, and the EndpointSlices of the old one may
	// still exist.
	web = s.createService("web", func(v *corev1.Service) {
		v.Spec.ClusterIP, v.Spec.ClusterIPs = addrs[0].Addr().String(), []string{addrs[0].Addr().String(), addrs[1].Addr().String()}
	})
	for _, addr := range addrs {
		s.waitReaches(client, tcpTo(addr), only)
	}
	// Recreate it immediately with another port.
	web.delete()
	web = s.createService("web", func(v *corev1.Service) { v.Spec.Ports = []corev1.ServicePort{tcpPort(90, 8080)} })
	s.waitReaches(client, tcpTo(web.addrPort(90)), only)
	s.waitFails(client, tcpTo(addrs[0]), nettest.ErrRefused, nettest.ErrTimeout)
}

// TestSelectorChanges checks that connections follow a changed selector.
func TestSelectorChanges(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	client, blue, green := s.addClient(), s.createPod("web"), s.createPod("green")
	s.waitReaches(client, tcpTo(web.addrPort(80)), blue)
	web.update(func(v *corev1.Service) { v.Spec.Selector = map[string]string{"app": "green"} })
	s.waitReaches(client, tcpTo(web.addrPort(80)), green)
}

// TestServiceProxyName checks that Fairlead ignores a Service with a service-proxy-name label
// as soon as the label is set.
func TestServiceProxyName(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web")
	only, client := s.createPod("web"), s.addClient()
	s.waitReaches(client, tcpTo(web.addrPort(80)), only)
	web.update(func(v *corev1.Service) {
		v.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "another"}
	})
	s.waitFails(client, tcpTo(web.addrPort(80)), nettest.ErrRefused, nettest.ErrTimeout)
	web.update(func(v *corev1.Service) { v.Labels = nil })
	s.waitReaches(client, tcpTo(web.addrPort(80)), only)
}

// TestNamedProxy runs Fairlead with --service-proxy-name beside the real kube-proxy. Each serves only
// its own Services, and a Service changes its proxy with its label.
func TestNamedProxy(t *testing.T) {
	if os.Getenv(kubeProxyEnv) != "" {
		t.Skip("kube-proxy runs in place of Fairlead")
	}
	s := newScenario(t, sharedCluster)
	args := s.fairlead.args
	s.must(s.fairlead.stop())
	report := []string{"rules of another Service proxy found", "table ip kube-proxy"}
	reports, err := s.fairlead.countLogged(report...)
	s.must(err)
	s.fairlead.args = append(slices.Clone(args), "--service-proxy-name=try")
	t.Cleanup(func() { // after kube-proxy's cleanup, which starts Fairlead
		s.fairlead.args = args
		s.must(s.fairlead.kill())
		s.must(s.start(context.WithoutCancel(s.ctx)))
	})
	labeled := func(v *corev1.Service) {
		v.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "try"}
	}
	mine, other := s.createService("mine", labeled), s.createService("other")
	minePod, otherPod, client := s.createPod("mine"), s.createPod("other"), s.addClient()
	s.must(s.start(s.ctx))
	s.waitReaches(client, tcpTo(mine.addrPort(80)), minePod)
	kubeProxy := newKubeProxy(s, "nftables", "")
	kubeProxy.startAndWait(otherPod)
	s.checkReaches(client, []destination{tcpTo(other.addrPort(80))}, otherPod)
	s.checkReaches(client, []destination{tcpTo(mine.addrPort(80))}, minePod)
	for _, table := range []struct {
		name              string
		served, notServed *pod
	}{{"fairlead", minePod, otherPod}, {"kube-proxy", otherPod, minePod}} {
		listing, err := kubeProxy.output("nft", "list", "table", "ip", table.name)
		s.must(err)
		if !strings.Contains(listing, table.served.IPv4.String()) || strings.Contains(listing, table.notServed.IPv4.String()) {
			t.Errorf("table %s serves other Services than its own:\n%s", table.name, listing)
		}
	}
	reportsAfter, err := s.fairlead.countLogged(report...)
	s.must(err)
	if reportsAfter != reports {
		t.Errorf("Fairlead reports kube-proxy's rules %d times as a problem", reportsAfter-reports)
	}
	other.update(labeled)
	s.eventually(func(context.Context) error {
		listing, err := kubeProxy.output("nft", "list", "table", "ip", "fairlead")
		if err == nil && !strings.Contains(listing, otherPod.IPv4.String()) {
			err = errors.New("Fairlead does not serve the labeled Service")
		}
		return err
	})
	s.waitReaches(client, tcpTo(other.addrPort(80)), otherPod)
	mine.update(func(v *corev1.Service) { v.Labels = nil })
	kubeProxy.waitProgrammed(minePod)
	s.waitReaches(client, tcpTo(mine.addrPort(80)), minePod)
}

// TestKubernetesService checks that the API server is reachable through its own Service,
// which has no selector.
func TestKubernetesService(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	client := s.addClient()
	kubernetes, err := s.api.CoreV1().Services("default").Get(s.ctx, "kubernetes", metav1.GetOptions{})
	s.must(err)
	s.eventually(func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
		defer cancel()
		conn, err := client.Dial(ctx, nettest.TCP, netip.MustParseAddrPort(kubernetes.Spec.ClusterIP+":443"))
		if err != nil {
			return err
		}
		defer conn.Close()
		config := &tls.Config{ServerName: "kubernetes.default.svc", RootCAs: s.cp.CertPool()}
		secure := tls.Client(conn, config)
		if err := secure.HandshakeContext(ctx); err != nil {
			return err
		}
		// The certificate in the handshake proves that the API server has answered.
		return secure.Close()
	})
}

// TestServiceCIDR checks that Services in an added ServiceCIDR work immediately.
func TestServiceCIDR(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	cidrs := s.api.NetworkingV1().ServiceCIDRs()
	_, err := cidrs.Create(s.ctx, &networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{Name: s.namespace}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.197.0.0/24"}},
	}, metav1.CreateOptions{})
	s.must(err)
	t.Cleanup(func() {
		// The deletion completes when the last Service in the network is deleted.
		if err := cidrs.Delete(context.WithoutCancel(s.ctx), s.namespace, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	only, client := s.createPod("web"), s.addClient()
	s.eventually(func(ctx context.Context) error { // until the API server's allocator knows the ServiceCIDR
		_, err := s.api.CoreV1().Services(s.namespace).Create(ctx, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: "web"},
			Spec: corev1.ServiceSpec{
				ClusterIP: "10.197.0.9", Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{tcpPort(80, 8080)},
			},
		}, metav1.CreateOptions{})
		return err
	})
	s.waitReaches(client, tcpTo(netip.MustParseAddrPort("10.197.0.9:80")), only)
}
