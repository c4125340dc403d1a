//go:build e2e

package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"fairlead.io/fairlead/internal/nettest"
)

// TestExternalTraffic asks for each way into a Service besides its cluster IP, and for
// what narrows the choice of endpoints by the client.
func TestExternalTraffic(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		feature string
		// service is what asks for it; ingress is written into its status.
		service func(*corev1.Service)
		ingress []string
		// works checks it, with a pod on this node and one on the other.
		works func(s *scenario, web *service, here, there *pod)
	}{
		{
			feature: "node ports",
			service: func(v *corev1.Service) { v.Spec.Type = corev1.ServiceTypeNodePort },
			works: func(s *scenario, web *service, here, there *pod) {
				for _, node := range s.net.Node.Addrs() {
					for _, from := range []*nettest.Host{s.net.Outside, s.net.Node, s.addClient()} {
						s.waitReaches(from, tcpTo(netip.AddrPortFrom(node, web.nodePort())), here, there)
					}
				}
			},
		},
		{
			feature: "external IPs",
			service: func(v *corev1.Service) { v.Spec.ExternalIPs = []string{"203.0.113.1", "2001:db8:99::1"} },
			works: func(s *scenario, _ *service, here, there *pod) {
				for _, addr := range []string{"203.0.113.1", "2001:db8:99::1"} {
					for _, from := range []*nettest.Host{s.net.Outside, s.net.Node, s.addClient()} {
						s.waitReaches(from, tcpTo(netip.AddrPortFrom(netip.MustParseAddr(addr), 80)), here, there)
					}
				}
			},
		},
		{
			feature: "load balancers",
			service: func(v *corev1.Service) { v.Spec.Type = corev1.ServiceTypeLoadBalancer },
			ingress: []string{"203.0.113.2", "2001:db8:99::2"},
			works: func(s *scenario, web *service, here, there *pod) {
				for _, addr := range []string{"203.0.113.2", "2001:db8:99::2"} {
					for _, from := range []*nettest.Host{s.net.Outside, s.net.Node, s.addClient()} {
						s.waitReaches(from, tcpTo(netip.AddrPortFrom(netip.MustParseAddr(addr), 80)), here, there)
					}
				}
				web.setIngress() // The cloud takes them away.
				s.waitFails(s.net.Outside, tcpTo(netip.MustParseAddrPort("203.0.113.2:80")), nettest.ErrRefused, nettest.ErrTimeout)
			},
		},
		{
			feature: "externalTrafficPolicy Local",
			service: func(v *corev1.Service) {
				v.Spec.Type = corev1.ServiceTypeNodePort
				v.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			},
			works: func(s *scenario, web *service, here, there *pod) {
				to := tcpTo(netip.AddrPortFrom(s.net.Node.IPv4, web.nodePort()))
				s.waitReaches(s.net.Outside, to, here)
				s.waitReaches(s.addClient(), to, here, there)
				answer, err := connect(s.ctx, s.net.Outside, to, connectTimeout)
				s.must(err)
				if answer.Source.Addr() != s.net.Outside.IPv4 {
					s.Errorf("the pod sees %s, want the client's own address %s", answer.Source, s.net.Outside.IPv4)
				}
				here.markNotReady()
				s.waitUnanswered(s.net.Outside, to)
			},
		},
		{
			feature: "session affinity",
			service: func(v *corev1.Service) { v.Spec.SessionAffinity = corev1.ServiceAffinityClientIP },
			works: func(s *scenario, web *service, here, there *pod) {
				client := s.addClient()
				pods := map[string]*pod{here.Name: here, there.Name: there}
				var first nettest.Answer
				s.eventually(func(ctx context.Context) (err error) {
					first, err = connect(ctx, client, tcpTo(web.addrPort(80)), attemptTimeout)
					return err
				})
				const connections = 30
				for range connections {
					answer, err := connect(s.ctx, client, tcpTo(web.addrPort(80)), connectTimeout)
					s.must(err)
					if answer.Host != first.Host {
						s.Fatalf("a connection ends at %s, earlier ones at %s", answer.Host, first.Host)
					}
				}
				pods[first.Host].markNotReady()
				delete(pods, first.Host)
				for _, other := range pods {
					s.waitReaches(client, tcpTo(web.addrPort(80)), other)
				}
			},
		},
		{
			feature: "load balancer source ranges",
			service: func(v *corev1.Service) {
				v.Spec.Type = corev1.ServiceTypeLoadBalancer
				v.Spec.LoadBalancerSourceRanges = []string{"192.0.2.2/32"}
			},
			ingress: []string{"203.0.113.3"},
			works: func(s *scenario, web *service, here, there *pod) {
				to := tcpTo(netip.MustParseAddrPort("203.0.113.3:80"))
				s.waitReaches(s.net.Outside, to, here, there)
				web.update(func(v *corev1.Service) { v.Spec.LoadBalancerSourceRanges = []string{"198.51.100.0/24"} })
				s.waitUnanswered(s.net.Outside, to)
				s.waitReaches(s.net.Outside, tcpTo(web.addrPort(80)), here, there)
			},
		},
	} {
		t.Run(tc.feature, func(t *testing.T) {
			t.Parallel()
			s := newScenario(t, sharedCluster)
			web := s.createService("web", tc.service)
			if tc.ingress != nil {
				web.setIngress(tc.ingress...)
			}
			here, there := s.createPod("web"), s.createPod("web", onOtherNode)
			tc.works(s, web, here, there)
		})
	}
}

// Of two Services that claim one address the older keeps it, and of two of one
// second the first by name. The other is told
// why it goes without, in an Event and in the log, and what else it asks for
// works. kube-proxy reports nothing of the kind.
func TestConflictReported(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	const claimed = "203.0.113.4"
	claim := func(v *corev1.Service) { v.Spec.ExternalIPs = []string{claimed} }
	first := s.createService("first", claim)
	firstPod := s.createPod("first")
	second := s.createService("second", claim)
	secondPod := s.createPod("second")
	second.waitEvent("spec.externalIPs[0]", s.namespace+"/first")
	s.eventually(func(context.Context) error {
		ok, err := s.fairlead.logged(s.namespace + "/second")
		if err == nil && !ok {
			err = fmt.Errorf("the log says nothing of %s/second", s.namespace)
		}
		return err
	})
	to := tcpTo(netip.AddrPortFrom(netip.MustParseAddr(claimed), 80))
	s.waitReaches(s.net.Outside, to, firstPod)
	s.waitReaches(s.addClient(), tcpTo(second.addrPort(80)), secondPod)
	first.delete()
	s.waitReaches(s.net.Outside, to, secondPod)
}

// A load balancer learns at the Service's health check port whether this node has
// pods that serve, with the answers that it knows from kube-proxy.
func TestHealthCheckNodePort(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	web := s.createService("web", func(v *corev1.Service) {
		v.Spec.Type = corev1.ServiceTypeLoadBalancer
		v.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	})
	here := s.createPod("web")
	s.createPod("web", onOtherNode)
	at := netip.AddrPortFrom(s.net.Node.IPv4, uint16(web.Spec.HealthCheckNodePort))
	type answer struct {
		Service struct {
			Namespace string `json:"namespace"`
			Name      string `json:"name"`
		} `json:"service"`
		LocalEndpoints      int  `json:"localEndpoints"`
		ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
	}
	answers := func(status, endpoints int) {
		t.Helper()
		want := answer{LocalEndpoints: endpoints, ServiceProxyHealthy: true}
		want.Service.Namespace, want.Service.Name = s.namespace, web.Name
		s.eventually(func(ctx context.Context) error {
			got, body, err := httpGet(ctx, s.net.Outside, at, "/")
			if err != nil {
				return err
			}
			var a answer
			if err := json.Unmarshal(body, &a); err != nil {
				return fmt.Errorf("%s: %w", body, err)
			}
			if got != status || a != want {
				return fmt.Errorf("got %d %s, want %d %+v", got, body, status, want)
			}
			return nil
		})
	}
	answers(http.StatusOK, 1)
	here.markNotReady()
	answers(http.StatusServiceUnavailable, 0)
	here.markReady()
	answers(http.StatusOK, 1)
	web.delete()
	s.waitFails(s.net.Outside, tcpTo(at), nettest.ErrRefused)
}

// nodePort returns the node port of the Service's first port.
func (v *service) nodePort() uint16 { return uint16(v.Spec.Ports[0].NodePort) }

// Pods are reached at node ports of TCP on localhost once that is asked for, and
// from then on as they come and go; UDP is refused. kube-proxy has this behind a
// feature gate.
func TestLocalhostNodePorts(t *testing.T) {
	s := newScenario(t, sharedCluster)
	web := s.createService("web", func(v *corev1.Service) {
		v.Spec.Type = corev1.ServiceTypeNodePort
		v.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		v.Spec.Ports = append(v.Spec.Ports, asUDP(tcpPort(80, 8080)))
	})
	here, there := s.createPod("web"), s.createPod("web", onOtherNode)
	s.waitReaches(s.net.Outside, tcpTo(netip.AddrPortFrom(s.net.Node.IPv4, web.nodePort())), here)
	addrs := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	for _, addr := range addrs {
		s.waitRefused(s.net.Node, tcpTo(netip.AddrPortFrom(addr, web.nodePort())))
	}
	s.setConfigField("nodePortAddresses", []string{"primary", "localhost"})
	for _, addr := range addrs {
		to := tcpTo(netip.AddrPortFrom(addr, web.nodePort()))
		s.waitReaches(s.net.Node, to, here, there) // the policy is for others than the node
		s.waitRefused(s.net.Node, udpTo(netip.AddrPortFrom(addr, uint16(web.Spec.Ports[1].NodePort))))
	}
	s.waitReaches(s.net.Outside, tcpTo(netip.AddrPortFrom(s.net.Node.IPv4, web.nodePort())), here)
	there.markNotReady()
	here.remove()
	for _, addr := range addrs {
		s.waitRefused(s.net.Node, tcpTo(netip.AddrPortFrom(addr, web.nodePort())))
	}
	there.markReady()
	for _, addr := range addrs {
		s.waitReaches(s.net.Node, tcpTo(netip.AddrPortFrom(addr, web.nodePort())), there)
	}
	web.delete()
	for _, addr := range addrs {
		s.waitRefused(s.net.Node, tcpTo(netip.AddrPortFrom(addr, web.nodePort())))
	}
}

// setConfigField sets a field of the configuration until the test ends.
func (s *scenario) setConfigField(field string, value any) {
	s.Helper()
	path := filepath.Join(s.dir, configFile)
	before, err := os.ReadFile(path)
	s.must(err)
	var config map[string]any
	s.must(json.Unmarshal(before, &config))
	config[field] = value
	s.must(os.WriteFile(path, patch(config), 0o600))
	s.Cleanup(func() {
		if err := os.WriteFile(path, before, 0o600); err != nil {
			s.Errorf("restore the configuration: %v", err)
		}
	})
}
