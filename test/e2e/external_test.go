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

// TestExternalTraffic covers all addresses of a Service besides its cluster IP, and the
// fields that restrict endpoints or clients.
func TestExternalTraffic(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		feature string
		// service sets the fields under test; ingress is written to the status.
		service func(*corev1.Service)
		ingress []string
		// check runs with one pod on this node and one on the other node.
		check func(s *scenario, web *service, here, there *pod)
	}{
		{
			feature: "node ports",
			service: func(v *corev1.Service) { v.Spec.Type = corev1.ServiceTypeNodePort },
			check: func(s *scenario, web *service, here, there *pod) {
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
			check: func(s *scenario, _ *service, here, there *pod) {
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
			check: func(s *scenario, web *service, here, there *pod) {
				for _, addr := range []string{"203.0.113.2", "2001:db8:99::2"} {
					for _, from := range []*nettest.Host{s.net.Outside, s.net.Node, s.addClient()} {
						s.waitReaches(from, tcpTo(netip.AddrPortFrom(netip.MustParseAddr(addr), 80)), here, there)
					}
				}
				web.setIngress() // the cloud provider removes the addresses
				s.waitFails(s.net.Outside, tcpTo(netip.MustParseAddrPort("203.0.113.2:80")), nettest.ErrRefused, nettest.ErrTimeout)
			},
		},
		{
			feature: "externalTrafficPolicy Local",
			service: func(v *corev1.Service) {
				v.Spec.Type = corev1.ServiceTypeNodePort
				v.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			},
			check: func(s *scenario, web *service, here, there *pod) {
				to := tcpTo(netip.AddrPortFrom(s.net.Node.IPv4, web.nodePort()))
				s.waitReaches(s.net.Outside, to, here)
				s.waitReaches(s.addClient(), to, here, there)
				answer, err := connect(s.ctx, s.net.Outside, to, connectTimeout)
				s.must(err)
				if answer.Source.Addr() != s.net.Outside.IPv4 {
					s.Errorf("the pod sees the client address %s, want %s", answer.Source, s.net.Outside.IPv4)
				}
				here.markNotReady()
				s.waitUnanswered(s.net.Outside, to)
			},
		},
		{
			feature: "session affinity",
			service: func(v *corev1.Service) { v.Spec.SessionAffinity = corev1.ServiceAffinityClientIP },
			check: func(s *scenario, web *service, here, there *pod) {
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
						s.Fatalf("a connection reaches %s, earlier ones %s", answer.Host, first.Host)
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
			check: func(s *scenario, web *service, here, there *pod) {
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
			tc.check(s, web, here, there)
		})
	}
}

// TestConflictReported creates two Services with the same address. The older Service keeps
// it, and among Services of the same age the first by name. Fairlead reports the conflict on
// the other Service in an Event and in the log, and programs the rest of that Service.
// kube-proxy reports nothing.
func TestConflictReported(t *testing.T) {
	t.Parallel()
	s := newScenario(t, sharedCluster)
	const contested = "203.0.113.4"
	setExternalIP := func(v *corev1.Service) { v.Spec.ExternalIPs = []string{contested} }
	first := s.createService("first", setExternalIP)
	firstPod := s.createPod("first")
	second := s.createService("second", setExternalIP)
	secondPod := s.createPod("second")
	second.waitEvent("spec.externalIPs[0]", s.namespace+"/first")
	s.eventually(func(context.Context) error {
		ok, err := s.fairlead.logged(s.namespace + "/second")
		if err == nil && !ok {
			err = fmt.Errorf("the log does not mention %s/second", s.namespace)
		}
		return err
	})
	to := tcpTo(netip.AddrPortFrom(netip.MustParseAddr(contested), 80))
	s.waitReaches(s.net.Outside, to, firstPod)
	s.waitReaches(s.addClient(), tcpTo(second.addrPort(80)), secondPod)
	first.delete()
	s.waitReaches(s.net.Outside, to, secondPod)
}

// TestHealthCheckNodePort checks that the health-check node port tells load balancers whether
// this node has ready pods, with the same responses as kube-proxy.
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
	type response struct {
		Service struct {
			Namespace string `json:"namespace"`
			Name      string `json:"name"`
		} `json:"service"`
		LocalEndpoints      int  `json:"localEndpoints"`
		ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
	}
	waitResponse := func(status, endpoints int) {
		t.Helper()
		want := response{LocalEndpoints: endpoints, ServiceProxyHealthy: true}
		want.Service.Namespace, want.Service.Name = s.namespace, web.Name
		s.eventually(func(ctx context.Context) error {
			got, body, err := httpGet(ctx, s.net.Outside, at, "/")
			if err != nil {
				return err
			}
			var r response
			if err := json.Unmarshal(body, &r); err != nil {
				return fmt.Errorf("%s: %w", body, err)
			}
			if got != status || r != want {
				return fmt.Errorf("got %d %s, want %d %+v", got, body, status, want)
			}
			return nil
		})
	}
	waitResponse(http.StatusOK, 1)
	here.markNotReady()
	waitResponse(http.StatusServiceUnavailable, 0)
	here.markReady()
	waitResponse(http.StatusOK, 1)
	web.delete()
	s.waitFails(s.net.Outside, tcpTo(at), nettest.ErrRefused)
}

// nodePort returns the node port of the first port.
func (v *service) nodePort() uint16 { return uint16(v.Spec.Ports[0].NodePort) }

// TestLocalhostNodePorts checks that TCP node ports work on localhost once nodePortAddresses
// includes it, and follow the pods from then on. UDP is refused. kube-proxy has this behind a
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
		s.waitReaches(s.net.Node, to, here, there) // the policy does not apply to the node itself
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

// setConfigField sets a field of the configuration file until the test ends.
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
