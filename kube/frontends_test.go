package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// TestFrontends checks the frontends of a Service.
func TestFrontends(t *testing.T) {
	t.Parallel()
	const (
		cluster, cluster6   = "default/web:http IPv4", "default/web:http IPv6"
		node, node6         = "default/web:http IPv4 NodePort", "default/web:http IPv6 NodePort"
		external, external6 = "default/web:http IPv4 ExternalIP", "default/web:http IPv6 ExternalIP"
		balancer, balancer6 = "default/web:http IPv4 LoadBalancer", "default/web:http IPv6 LoadBalancer"
	)
	testConversion(t, []conversionTest{
		{
			name:     "a ClusterIP Service has its cluster IP only",
			services: one(newService("web", "10.96.0.1")),
			want:     want{cluster: "10.96.0.1:80/TCP ->"},
		},
		{
			name:     "a NodePort Service also has its node port, with every client masqueraded",
			services: one(newService("web", "10.96.0.1", nodePorts(30080))),
			slices:   slice("10.0.0.1 @there"),
			want: want{
				cluster: "10.96.0.1:80/TCP -> 10.0.0.1:8080",
				node:    "0.0.0.0:30080/TCP -> 10.0.0.1:8080, masquerade always",
			},
		},
		{
			name: "a node port is ignored if the type has no node ports",
			services: one(newService("web", "10.96.0.1", nodePorts(30080), ofType(corev1.ServiceTypeClusterIP),
				externalIPs("192.0.2.1"))),
			want: want{cluster: "10.96.0.1:80/TCP ->", external: "192.0.2.1:80/TCP ->, masquerade always"},
		},
		{
			name:     "a LoadBalancer Service has its load balancer IPs, and its node port if any",
			services: one(newService("web", "10.96.0.1", ingress("192.0.2.1", "192.0.2.2"), nodePorts(30080))),
			want: want{
				cluster:  "10.96.0.1:80/TCP ->",
				node:     "0.0.0.0:30080/TCP ->, masquerade always",
				balancer: "192.0.2.1:80/TCP 192.0.2.2:80/TCP ->, masquerade always",
			},
		},
		{
			name:     "a LoadBalancer Service without node ports and load balancer IPs has its cluster IP only",
			services: one(newService("web", "10.96.0.1", ingress())),
			want:     want{cluster: "10.96.0.1:80/TCP ->"},
		},
		{
			name: "load balancers with ipMode Proxy or only a host name are skipped",
			services: one(newService("web", "10.96.0.1", ingress("192.0.2.1", "192.0.2.2", "192.0.2.3", ""), func(svc *corev1.Service) {
				list := svc.Status.LoadBalancer.Ingress
				list[0].IPMode = new(corev1.LoadBalancerIPModeVIP)
				list[1].IPMode = new(corev1.LoadBalancerIPModeProxy)
				list[2].IPMode = new(corev1.LoadBalancerIPMode("Tunnel"))
				list[3].Hostname = "web.example.com"
			})),
			want: want{cluster: "10.96.0.1:80/TCP ->", balancer: "192.0.2.1:80/TCP ->, masquerade always"},
		},
		{
			name: "external IPs apply to any type of Service and are deduplicated",
			services: one(newService("web", "10.96.0.1", nodePorts(30080),
				externalIPs("192.0.2.2", "192.0.2.1", "192.0.2.2", "192.0.2.001", ""))),
			want: want{
				cluster:  "10.96.0.1:80/TCP ->",
				node:     "0.0.0.0:30080/TCP ->, masquerade always",
				external: "192.0.2.1:80/TCP 192.0.2.2:80/TCP ->, masquerade always",
			},
		},
		{
			name: "an external IP that is also a load balancer IP is only a load balancer IP, with source ranges",
			services: one(newService("web", "10.96.0.1", ingress("192.0.2.1"), externalIPs("192.0.2.1", "192.0.2.2"),
				sourceRangesOf("203.0.113.0/24"))),
			want: want{
				cluster:  "10.96.0.1:80/TCP ->",
				external: "192.0.2.2:80/TCP ->, masquerade always",
				balancer: "192.0.2.1:80/TCP ->, masquerade always, from [203.0.113.0/24]",
			},
		},
		{
			name: "dual stack: each kind in each family, with addresses and endpoints of the family",
			services: one(newService("web", "10.96.0.1 fd00::1", ingress("192.0.2.1", "2001:db8::1"), nodePorts(30080),
				externalIPs("2001:db8::2", "192.0.2.2"))),
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-4", "web", eps("10.0.0.1 @there")), newSlice("web-6", "web", eps("fd01::1 @there")),
			},
			want: want{
				cluster:   "10.96.0.1:80/TCP -> 10.0.0.1:8080",
				node:      "0.0.0.0:30080/TCP -> 10.0.0.1:8080, masquerade always",
				external:  "192.0.2.2:80/TCP -> 10.0.0.1:8080, masquerade always",
				balancer:  "192.0.2.1:80/TCP -> 10.0.0.1:8080, masquerade always",
				cluster6:  "[fd00::1]:80/TCP -> [fd01::1]:8080",
				node6:     "[::]:30080/TCP -> [fd01::1]:8080, masquerade always",
				external6: "[2001:db8::2]:80/TCP -> [fd01::1]:8080, masquerade always",
				balancer6: "[2001:db8::1]:80/TCP -> [fd01::1]:8080, masquerade always",
			},
		},
		{
			name: "a Service has no frontends in a family without a cluster IP",
			services: one(newService("web", "10.96.0.1", ingress("2001:db8::1"), nodePorts(30080),
				externalIPs("2001:db8::2"))),
			want: want{cluster: "10.96.0.1:80/TCP ->", node: "0.0.0.0:30080/TCP ->, masquerade always"},
			problems: []string{
				"default/web: spec.externalIPs[0]: 2001:db8::2 is not served, because the Service has no cluster IP of the family IPv6: add the family to spec.ipFamilies, or remove the address",
			},
		},
		{
			name:     "a Service without a cluster IP has no frontends and no problem",
			services: one(newService("web", "", ingress("192.0.2.1"), nodePorts(30080), externalIPs("192.0.2.2"))),
			want:     want{},
		},
		{
			name: "headless, ExternalName and another proxy's Services have no frontends, whatever addresses they list",
			services: []*corev1.Service{
				newService("a", "None", externalIPs("192.0.2.1")),
				newService("b", "10.96.0.1", ingress("192.0.2.2"), nodePorts(30080), ofType(corev1.ServiceTypeExternalName)),
				newService("c", "10.96.0.2", ingress("192.0.2.3"), nodePorts(30081), func(svc *corev1.Service) {
					svc.Labels = map[string]string{LabelServiceProxyName: ""}
				}),
			},
			want: want{},
		},
		{
			name: "TCP, UDP and SCTP of every kind, with the same port numbers",
			services: one(newService("dns", "10.96.0.1", ports(
				port("t", corev1.ProtocolTCP, 53), port("u", corev1.ProtocolUDP, 53), port("s", corev1.ProtocolSCTP, 53),
			), nodePorts(30053, 30053, 30053), externalIPs("192.0.2.1"))),
			want: want{
				"default/dns:t IPv4":            "10.96.0.1:53/TCP ->",
				"default/dns:u IPv4":            "10.96.0.1:53/UDP ->",
				"default/dns:s IPv4":            "10.96.0.1:53/SCTP ->",
				"default/dns:t IPv4 NodePort":   "0.0.0.0:30053/TCP ->, masquerade always",
				"default/dns:u IPv4 NodePort":   "0.0.0.0:30053/UDP ->, masquerade always",
				"default/dns:s IPv4 NodePort":   "0.0.0.0:30053/SCTP ->, masquerade always",
				"default/dns:t IPv4 ExternalIP": "192.0.2.1:53/TCP ->, masquerade always",
				"default/dns:u IPv4 ExternalIP": "192.0.2.1:53/UDP ->, masquerade always",
				"default/dns:s IPv4 ExternalIP": "192.0.2.1:53/SCTP ->, masquerade always",
			},
		},
		{
			name: "invalid addresses are reported and skipped, and the others served",
			services: one(newService("web", "10.96.0.1", ofType("Balancer"),
				externalIPs("127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "::ffff:127.0.0.1", "fe80::1%eth0", "x", "192.0.2.9"),
				func(svc *corev1.Service) {
					svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{
						{IP: "127.0.0.1"}, {IP: "y"}, {IP: "224.0.0.1"}, {IP: "192.0.2.8"},
					}
				})),
			want: want{
				cluster:  "10.96.0.1:80/TCP ->",
				external: "192.0.2.9:80/TCP ->, masquerade always",
				balancer: "192.0.2.8:80/TCP ->, masquerade always",
			},
			problems: []string{
				`default/web: spec.externalIPs[0]: "127.0.0.1" is a loopback address: use an address that clients can connect to`,
				`default/web: spec.externalIPs[1]: "169.254.1.1" is a link-local address: use an address that clients can connect to`,
				`default/web: spec.externalIPs[2]: "224.0.0.1" is a multicast address: use an address that clients can connect to`,
				`default/web: spec.externalIPs[3]: "0.0.0.0" is the unspecified address: use an address that clients can connect to`,
				`default/web: spec.externalIPs[4]: "::ffff:127.0.0.1" is a loopback address: use an address that clients can connect to`,
				`default/web: spec.externalIPs[5]: "fe80::1%eth0" has a zone: use an address that clients can connect to`,
				`default/web: spec.externalIPs[6]: "x" is not an IP address: use an address that clients can connect to`,
				`default/web: spec.type: "Balancer" is not a type of Service: use ClusterIP, NodePort or LoadBalancer`,
				`default/web: status.loadBalancer.ingress[0].ip: "127.0.0.1" is a loopback address: the load balancer's controller must set an address that clients can connect to`,
				`default/web: status.loadBalancer.ingress[1].ip: "y" is not an IP address: the load balancer's controller must set an address that clients can connect to`,
				`default/web: status.loadBalancer.ingress[2].ip: "224.0.0.1" is a multicast address: the load balancer's controller must set an address that clients can connect to`,
			},
		},
		{
			name:     "leading zeros are decimal in every address",
			services: one(newService("web", "010.096.000.001", ingress("192.0.2.08"), externalIPs("192.0.02.9"))),
			want: want{
				cluster:  "10.96.0.1:80/TCP ->",
				external: "192.0.2.9:80/TCP ->, masquerade always",
				balancer: "192.0.2.8:80/TCP ->, masquerade always",
			},
		},
		{
			name:     "an invalid node port is reported and skipped",
			services: one(newService("web", "10.96.0.1", nodePorts(70000))),
			want:     want{cluster: "10.96.0.1:80/TCP ->"},
			problems: []string{
				"default/web: spec.ports[0].nodePort: 70000 is not a port: use 1 to 65535, or leave it out",
			},
		},
	})
}
