package dns_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	miekg "github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/manifest/dns"
)

// startServer serves s on loopback until the test ends, and returns the address.
func startServer(t *testing.T, s *dns.Server, address string) string {
	t.Helper()
	sockets, err := dns.Listen(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, sockets) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return sockets.Addr()
}

// query is one question. By default it is sent over UDP without EDNS.
type query struct {
	name        string
	rrtype      uint16
	class       uint16
	network     string
	ednsSize    uint16
	ednsVersion uint8
}

func (q query) message() *miekg.Msg {
	m := new(miekg.Msg).SetQuestion(miekg.Fqdn(q.name), q.rrtype)
	if q.class != 0 {
		m.Question[0].Qclass = q.class
	}
	if q.ednsSize != 0 {
		m.SetEdns0(q.ednsSize, false)
		m.IsEdns0().SetVersion(q.ednsVersion)
	}
	return m
}

func exchange(t *testing.T, address string, q query) *miekg.Msg {
	t.Helper()
	client := miekg.Client{Net: q.network, Timeout: 5 * time.Second}
	reply, _, err := client.ExchangeContext(t.Context(), q.message(), address)
	if err != nil {
		t.Fatalf("%s %s: %v", q.name, miekg.TypeToString[q.rrtype], err)
	}
	return reply
}

// recordText returns records in zone file format with single spaces, sorted; nil for no
// records.
func recordText(rrs []miekg.RR) []string {
	var lines []string
	for _, rr := range rrs {
		if rr.Header().Rrtype != miekg.TypeOPT {
			lines = append(lines, strings.Join(strings.Fields(rr.String()), " "))
		}
	}
	slices.Sort(lines)
	return lines
}

func newService(namespace, name string, change func(*corev1.ServiceSpec)) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	s.Spec.Type = corev1.ServiceTypeClusterIP
	change(&s.Spec)
	return s
}

func withClusterIPs(ips ...string) func(*corev1.ServiceSpec) {
	return func(s *corev1.ServiceSpec) { s.ClusterIP, s.ClusterIPs = ips[0], ips }
}

func asHeadless(s *corev1.ServiceSpec) { s.ClusterIP, s.ClusterIPs = "None", []string{"None"} }

func withExternalName(target string) func(*corev1.ServiceSpec) {
	return func(s *corev1.ServiceSpec) { s.Type, s.ExternalName = corev1.ServiceTypeExternalName, target }
}

// newSlice returns an EndpointSlice in the default namespace.
func newSlice(name, owner string, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: name,
			Labels: map[string]string{discoveryv1.LabelServiceName: owner},
		},
		Endpoints: endpoints,
		Ports: []discoveryv1.EndpointPort{
			{Name: new("http"), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)},
			{Name: new(""), Port: new(int32(9090))},
		},
	}
}

func newEndpoint(hostname string, addrs ...string) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: addrs}
	if hostname != "" {
		e.Hostname = &hostname
	}
	return e
}

func asNotReady(e discoveryv1.Endpoint) discoveryv1.Endpoint {
	e.Conditions.Ready = new(false)
	return e
}

func asReady(e discoveryv1.Endpoint) discoveryv1.Endpoint {
	e.Conditions.Ready = new(true)
	return e
}

// exampleDelta has the objects for TestAnswers.
func exampleDelta() kube.Delta {
	return kube.Delta{
		Services: []*corev1.Service{
			newService("default", "backend", func(s *corev1.ServiceSpec) {
				withClusterIPs("10.96.0.10", "fd00:96::10")(s)
				s.Ports = []corev1.ServicePort{
					{Name: "http", Port: 80}, {Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}, {Port: 81},
				}
			}),
			newService("default", "single", func(s *corev1.ServiceSpec) { s.ClusterIP = "10.96.0.11" }),
			newService("default", "pending", func(*corev1.ServiceSpec) {}),
			newService("default", "db", asHeadless),
			newService("default", "empty", asHeadless),
			newService("shop", "backend", withClusterIPs("10.96.0.12")),
			newService("shop", "search", withExternalName("search.example.com")),
			newService("shop", "alias", withExternalName("Backend.Default.svc.cluster.local.")),
			newService("shop", "dangling", withExternalName("nothing.default.svc.cluster.local")),
			newService("shop", "loop", withExternalName("loop.shop.svc.cluster.local")),
			newService("shop", "bad", withExternalName("two..dots")),
		},
		EndpointSlices: []*discoveryv1.EndpointSlice{
			newSlice("db-1", "db",
				asReady(newEndpoint("db-0", "10.1.0.5")), newEndpoint("", "10.1.0.6"), asNotReady(newEndpoint("db-2", "10.1.0.7"))),
			newSlice("db-2", "db", newEndpoint("db-0", "fd00:1::5")),
			newSlice("empty-1", "empty", asNotReady(newEndpoint("", "10.1.0.8"))),
			newSlice("backend-1", "backend", newEndpoint("", "10.1.0.9")),
			{
				ObjectMeta:  newSlice("db-3", "db").ObjectMeta,
				AddressType: discoveryv1.AddressTypeFQDN,
				Endpoints:   []discoveryv1.Endpoint{newEndpoint("named", "10.1.0.10")},
			},
		},
	}
}

const soaText = "cluster.local. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 5"

func TestAnswers(t *testing.T) {
	t.Parallel()
	const (
		ok       = miekg.RcodeSuccess
		nxdomain = miekg.RcodeNameError
		refused  = miekg.RcodeRefused
		servfail = miekg.RcodeServerFailure
	)
	server := dns.New(dns.Options{})
	server.Apply(exampleDelta())
	addresses := map[string]string{"IPv4": startServer(t, server, "127.0.0.1:0"), "IPv6": startServer(t, server, "[::1]:0")}

	for _, tc := range []struct {
		what   string
		name   string
		rrtype uint16
		rcode  int
		answer []string
		extra  []string
		soa    bool
	}{
		// A Service with cluster IPs.
		{
			what: "address", name: "backend.default.svc.cluster.local", rrtype: miekg.TypeA,
			answer: []string{"backend.default.svc.cluster.local. 5 IN A 10.96.0.10"},
		},
		{
			what: "IPv6 address", name: "backend.default.svc.cluster.local", rrtype: miekg.TypeAAAA,
			answer: []string{"backend.default.svc.cluster.local. 5 IN AAAA fd00:96::10"},
		},
		{
			what: "any type", name: "backend.default.svc.cluster.local", rrtype: miekg.TypeANY,
			answer: []string{
				"backend.default.svc.cluster.local. 5 IN A 10.96.0.10",
				"backend.default.svc.cluster.local. 5 IN AAAA fd00:96::10",
			},
		},
		{
			what: "another namespace", name: "backend.shop.svc.cluster.local", rrtype: miekg.TypeA,
			answer: []string{"backend.shop.svc.cluster.local. 5 IN A 10.96.0.12"},
		},
		{
			what: "case is kept and ignored", name: "BackEnd.default.SVC.Cluster.local", rrtype: miekg.TypeA,
			answer: []string{"BackEnd.default.SVC.Cluster.local. 5 IN A 10.96.0.10"},
		},
		{
			what: "only clusterIP is set", name: "single.default.svc.cluster.local", rrtype: miekg.TypeA,
			answer: []string{"single.default.svc.cluster.local. 5 IN A 10.96.0.11"},
		},
		{what: "no address of that family", name: "single.default.svc.cluster.local", rrtype: miekg.TypeAAAA, soa: true},
		{what: "no record of that type", name: "backend.default.svc.cluster.local", rrtype: miekg.TypeMX, soa: true},
		{what: "no address yet", name: "pending.default.svc.cluster.local", rrtype: miekg.TypeA, soa: true},
		{
			what: "port", name: "_http._tcp.backend.default.svc.cluster.local", rrtype: miekg.TypeSRV,
			answer: []string{"_http._tcp.backend.default.svc.cluster.local. 5 IN SRV 0 100 80 backend.default.svc.cluster.local."},
			extra: []string{
				"backend.default.svc.cluster.local. 5 IN A 10.96.0.10",
				"backend.default.svc.cluster.local. 5 IN AAAA fd00:96::10",
			},
		},
		{
			what: "UDP port", name: "_dns._udp.backend.default.svc.cluster.local", rrtype: miekg.TypeSRV,
			answer: []string{"_dns._udp.backend.default.svc.cluster.local. 5 IN SRV 0 100 53 backend.default.svc.cluster.local."},
			extra: []string{
				"backend.default.svc.cluster.local. 5 IN A 10.96.0.10",
				"backend.default.svc.cluster.local. 5 IN AAAA fd00:96::10",
			},
		},
		{what: "port, other type", name: "_http._tcp.backend.default.svc.cluster.local", rrtype: miekg.TypeA, soa: true},
		{what: "port of the other protocol", name: "_http._udp.backend.default.svc.cluster.local", rrtype: miekg.TypeSRV, rcode: nxdomain, soa: true},
		{what: "unnamed port", name: "_._tcp.backend.default.svc.cluster.local", rrtype: miekg.TypeSRV, rcode: nxdomain, soa: true},
		{what: "protocol with ports", name: "_tcp.backend.default.svc.cluster.local", rrtype: miekg.TypeSRV, soa: true},
		{what: "protocol without ports", name: "_sctp.backend.default.svc.cluster.local", rrtype: miekg.TypeSRV, rcode: nxdomain, soa: true},
		{what: "endpoints of a Service with a cluster IP have no names", name: "10-1-0-9.backend.default.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},

		// A headless Service.
		{
			what: "ready endpoints, also with unset readiness", name: "db.default.svc.cluster.local", rrtype: miekg.TypeA,
			answer: []string{"db.default.svc.cluster.local. 5 IN A 10.1.0.5", "db.default.svc.cluster.local. 5 IN A 10.1.0.6"},
		},
		{
			what: "endpoint of another slice", name: "db.default.svc.cluster.local", rrtype: miekg.TypeAAAA,
			answer: []string{"db.default.svc.cluster.local. 5 IN AAAA fd00:1::5"},
		},
		{
			what: "endpoint with hostname", name: "db-0.db.default.svc.cluster.local", rrtype: miekg.TypeA,
			answer: []string{"db-0.db.default.svc.cluster.local. 5 IN A 10.1.0.5"},
		},
		{
			what: "endpoint with hostname, IPv6", name: "db-0.db.default.svc.cluster.local", rrtype: miekg.TypeAAAA,
			answer: []string{"db-0.db.default.svc.cluster.local. 5 IN AAAA fd00:1::5"},
		},
		{
			what: "endpoint without hostname", name: "10-1-0-6.db.default.svc.cluster.local", rrtype: miekg.TypeA,
			answer: []string{"10-1-0-6.db.default.svc.cluster.local. 5 IN A 10.1.0.6"},
		},
		{what: "unready endpoint", name: "db-2.db.default.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},
		{what: "endpoint with an FQDN address", name: "named.db.default.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},
		{
			what: "ports of endpoints, each once", name: "_http._tcp.db.default.svc.cluster.local", rrtype: miekg.TypeSRV,
			answer: []string{
				"_http._tcp.db.default.svc.cluster.local. 5 IN SRV 0 100 8080 10-1-0-6.db.default.svc.cluster.local.",
				"_http._tcp.db.default.svc.cluster.local. 5 IN SRV 0 100 8080 db-0.db.default.svc.cluster.local.",
			},
			extra: []string{
				"10-1-0-6.db.default.svc.cluster.local. 5 IN A 10.1.0.6",
				"db-0.db.default.svc.cluster.local. 5 IN A 10.1.0.5",
				"db-0.db.default.svc.cluster.local. 5 IN AAAA fd00:1::5",
			},
		},
		{what: "no ready endpoint", name: "empty.default.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},

		// A Service of type ExternalName.
		{
			what: "external name", name: "search.shop.svc.cluster.local", rrtype: miekg.TypeA,
			answer: []string{"search.shop.svc.cluster.local. 5 IN CNAME search.example.com."},
		},
		{
			what: "external name itself", name: "search.shop.svc.cluster.local", rrtype: miekg.TypeCNAME,
			answer: []string{"search.shop.svc.cluster.local. 5 IN CNAME search.example.com."},
		},
		{
			what: "external name that is a Service", name: "alias.shop.svc.cluster.local", rrtype: miekg.TypeA,
			answer: []string{
				"Backend.Default.svc.cluster.local. 5 IN A 10.96.0.10",
				"alias.shop.svc.cluster.local. 5 IN CNAME Backend.Default.svc.cluster.local.",
			},
		},
		{
			what: "external name of a missing Service", name: "dangling.shop.svc.cluster.local", rrtype: miekg.TypeA,
			rcode: nxdomain, soa: true,
			answer: []string{"dangling.shop.svc.cluster.local. 5 IN CNAME nothing.default.svc.cluster.local."},
		},
		{
			what: "external name in a loop", name: "loop.shop.svc.cluster.local", rrtype: miekg.TypeA, rcode: servfail,
			answer: slices.Repeat([]string{"loop.shop.svc.cluster.local. 5 IN CNAME loop.shop.svc.cluster.local."}, 9),
		},
		{what: "invalid external name", name: "bad.shop.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},

		// Addresses.
		{
			what: "reverse", name: "10.0.96.10.in-addr.arpa", rrtype: miekg.TypePTR,
			answer: []string{"10.0.96.10.in-addr.arpa. 5 IN PTR backend.default.svc.cluster.local."},
		},
		{
			what: "reverse, IPv6", name: reverseName(t, "fd00:96::10"), rrtype: miekg.TypePTR,
			answer: []string{reverseName(t, "fd00:96::10") + " 5 IN PTR backend.default.svc.cluster.local."},
		},
		{
			what: "reverse of an endpoint", name: reverseName(t, "10.1.0.5"), rrtype: miekg.TypePTR,
			answer: []string{reverseName(t, "10.1.0.5") + " 5 IN PTR db-0.db.default.svc.cluster.local."},
		},
		{what: "reverse, other type", name: "10.0.96.10.in-addr.arpa", rrtype: miekg.TypeA},
		{what: "reverse of an unready endpoint", name: reverseName(t, "10.1.0.7"), rrtype: miekg.TypePTR, rcode: refused},
		{what: "reverse of an endpoint of a Service with a cluster IP", name: reverseName(t, "10.1.0.9"), rrtype: miekg.TypePTR, rcode: refused},
		{what: "reverse of a network", name: "96.10.in-addr.arpa", rrtype: miekg.TypePTR, rcode: refused},
		{what: "reverse with leading zero", name: "010.0.96.10.in-addr.arpa", rrtype: miekg.TypePTR, rcode: refused},
		{
			what: "pod", name: "10-1-2-3.default.pod.cluster.local", rrtype: miekg.TypeA,
			answer: []string{"10-1-2-3.default.pod.cluster.local. 5 IN A 10.1.2.3"},
		},
		{
			what: "pod, IPv6", name: "fd00--1.shop.pod.cluster.local", rrtype: miekg.TypeAAAA,
			answer: []string{"fd00--1.shop.pod.cluster.local. 5 IN AAAA fd00::1"},
		},
		{what: "pod, other family", name: "10-1-2-3.default.pod.cluster.local", rrtype: miekg.TypeAAAA, soa: true},
		{what: "pod by name", name: "web.default.pod.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},
		{what: "pod in no namespace", name: "10-1-2-3.nowhere.pod.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},

		// The zone.
		{what: "schema", name: "dns-version.cluster.local", rrtype: miekg.TypeTXT, answer: []string{`dns-version.cluster.local. 5 IN TXT "1.1.0"`}},
		{what: "apex", name: "cluster.local", rrtype: miekg.TypeSOA, answer: []string{soaText}},
		{what: "apex, other type", name: "cluster.local", rrtype: miekg.TypeA, soa: true},
		{what: "svc", name: "svc.cluster.local", rrtype: miekg.TypeA, soa: true},
		{what: "namespace", name: "shop.svc.cluster.local", rrtype: miekg.TypeA, soa: true},
		{what: "unknown namespace", name: "nowhere.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},
		{what: "unknown Service", name: "nothing.default.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},
		{what: "Service of another namespace", name: "db.shop.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},
		{what: "unknown endpoint", name: "db-9.db.default.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},
		{what: "too deep", name: "a.b.c.backend.default.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},
		{what: "name without a known form", name: "backend.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},
		{what: "search list appended to an outside name", name: "example.com.default.svc.cluster.local", rrtype: miekg.TypeA, rcode: nxdomain, soa: true},

		// Names of clients without a search list.
		{what: "short", name: "backend", rrtype: miekg.TypeA, answer: []string{"backend. 5 IN A 10.96.0.10"}},
		{what: "short, case", name: "BACKEND", rrtype: miekg.TypeA, answer: []string{"BACKEND. 5 IN A 10.96.0.10"}},
		{what: "short with namespace", name: "backend.default", rrtype: miekg.TypeA, answer: []string{"backend.default. 5 IN A 10.96.0.10"}},
		{what: "short with other namespace", name: "backend.shop", rrtype: miekg.TypeA, answer: []string{"backend.shop. 5 IN A 10.96.0.12"}},
		{what: "short with svc", name: "backend.default.svc", rrtype: miekg.TypeAAAA, answer: []string{"backend.default.svc. 5 IN AAAA fd00:96::10"}},
		{what: "short, no address of that family", name: "single", rrtype: miekg.TypeAAAA},
		{what: "short endpoint", name: "db-0.db", rrtype: miekg.TypeA, answer: []string{"db-0.db. 5 IN A 10.1.0.5"}},
		{
			what: "short port", name: "_http._tcp.backend", rrtype: miekg.TypeSRV,
			answer: []string{"_http._tcp.backend. 5 IN SRV 0 100 80 backend.default.svc.cluster.local."},
			extra: []string{
				"backend.default.svc.cluster.local. 5 IN A 10.96.0.10",
				"backend.default.svc.cluster.local. 5 IN AAAA fd00:96::10",
			},
		},
		{what: "short, unknown", name: "nothing", rrtype: miekg.TypeA, rcode: nxdomain},
		{what: "short, of another namespace", name: "search", rrtype: miekg.TypeA, rcode: nxdomain},
		{what: "short, unknown in a namespace or in a top-level domain shop", name: "nothing.shop", rrtype: miekg.TypeA, rcode: refused},
		{what: "short, unknown with svc", name: "nothing.default.svc", rrtype: miekg.TypeA, rcode: nxdomain},
		{what: "short, a namespace is no Service", name: "shop", rrtype: miekg.TypeA, rcode: nxdomain},

		// Other names.
		{what: "outside", name: "example.com", rrtype: miekg.TypeA, rcode: refused},
		{what: "outside, with the same suffix", name: "notcluster.local", rrtype: miekg.TypeA, rcode: refused},
		{what: "above", name: "local", rrtype: miekg.TypeA, rcode: refused},
		{what: "root", name: ".", rrtype: miekg.TypeNS, rcode: refused},
	} {
		t.Run(tc.what, func(t *testing.T) {
			t.Parallel()
			for family, address := range addresses {
				for _, network := range []string{"udp", "tcp"} {
					reply := exchange(t, address, query{name: tc.name, rrtype: tc.rrtype, network: network, ednsSize: 1232})
					where := fmt.Sprintf("%s %s over %s %s", tc.name, miekg.TypeToString[tc.rrtype], family, network)
					if reply.Rcode != tc.rcode {
						t.Errorf("%s: got %s, want %s", where, miekg.RcodeToString[reply.Rcode], miekg.RcodeToString[tc.rcode])
					}
					if want := tc.rcode == ok || tc.rcode == nxdomain; reply.Authoritative != want {
						t.Errorf("%s: authoritative is %v, want %v", where, reply.Authoritative, want)
					}
					if reply.Truncated {
						t.Errorf("%s: truncated", where)
					}
					if diff := cmp.Diff(tc.answer, recordText(reply.Answer)); diff != "" {
						t.Errorf("%s: answer (-want +got):\n%s", where, diff)
					}
					if diff := cmp.Diff(tc.extra, recordText(reply.Extra)); diff != "" {
						t.Errorf("%s: additional (-want +got):\n%s", where, diff)
					}
					var authority []string
					if tc.soa {
						authority = append(authority, soaText)
					}
					if diff := cmp.Diff(authority, recordText(reply.Ns)); diff != "" {
						t.Errorf("%s: authority (-want +got):\n%s", where, diff)
					}
				}
			}
		})
	}
}

func reverseName(t *testing.T, addr string) string {
	t.Helper()
	name, err := miekg.ReverseAddr(addr)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func TestOptions(t *testing.T) {
	t.Parallel()
	server := dns.New(dns.Options{ClusterDomain: "Example.ORG.", DefaultNamespace: "shop", TTL: 30 * time.Second})
	server.Apply(exampleDelta())
	address := startServer(t, server, "127.0.0.1:0")
	for name, want := range map[string]string{
		"backend.shop.svc.example.org": "backend.shop.svc.example.org. 30 IN A 10.96.0.12",
		"backend":                      "backend. 30 IN A 10.96.0.12",
	} {
		if diff := cmp.Diff([]string{want}, recordText(exchange(t, address, query{name: name, rrtype: miekg.TypeA}).Answer)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestUnsupportedQueries(t *testing.T) {
	t.Parallel()
	server := dns.New(dns.Options{})
	server.Apply(exampleDelta())
	address := startServer(t, server, "127.0.0.1:0")
	for what, tc := range map[string]struct {
		query query
		want  int
	}{
		"class CHAOS":    {query{name: "backend", rrtype: miekg.TypeA, class: miekg.ClassCHAOS}, miekg.RcodeRefused},
		"EDNS version 1": {query{name: "backend", rrtype: miekg.TypeA, ednsSize: 1232, ednsVersion: 1}, miekg.RcodeBadVers},
	} {
		if reply := exchange(t, address, tc.query); reply.Rcode != tc.want || len(reply.Answer) != 0 {
			t.Errorf("%s: got %s with %v, want %s", what, miekg.RcodeToString[reply.Rcode], reply.Answer, miekg.RcodeToString[tc.want])
		}
	}
	notify := query{name: "backend", rrtype: miekg.TypeSOA}.message()
	notify.Opcode = miekg.OpcodeNotify
	reply, _, err := new(miekg.Client).ExchangeContext(t.Context(), notify, address)
	if err != nil {
		t.Fatal(err)
	}
	if reply.Rcode != miekg.RcodeNotImplemented {
		t.Errorf("NOTIFY: got %s, want NOTIMP", miekg.RcodeToString[reply.Rcode])
	}
}

// TestServerFailureBeforeFirstDelta checks that the server answers SERVFAIL before the
// first Delta, because clients would cache NXDOMAIN.
func TestServerFailureBeforeFirstDelta(t *testing.T) {
	t.Parallel()
	server := dns.New(dns.Options{})
	address := startServer(t, server, "127.0.0.1:0")
	q := query{name: "backend", rrtype: miekg.TypeA}
	if reply := exchange(t, address, q); reply.Rcode != miekg.RcodeServerFailure {
		t.Errorf("before: got %s, want SERVFAIL", miekg.RcodeToString[reply.Rcode])
	}
	server.Apply(kube.Delta{})
	if reply := exchange(t, address, q); reply.Rcode != miekg.RcodeNameError {
		t.Errorf("after an empty Delta: got %s, want NXDOMAIN", miekg.RcodeToString[reply.Rcode])
	}
}

// deltaWithEndpoints returns a headless Service with the given number of endpoints.
func deltaWithEndpoints(endpoints int) kube.Delta {
	s := newSlice("many-1", "many")
	addr := netip.MustParseAddr("10.2.0.0")
	for range endpoints {
		addr = addr.Next()
		s.Endpoints = append(s.Endpoints, newEndpoint("", addr.String()))
	}
	return kube.Delta{
		Services:       []*corev1.Service{newService("default", "many", asHeadless)},
		EndpointSlices: []*discoveryv1.EndpointSlice{s},
	}
}

// TestTruncation checks that UDP answers are truncated to the client's limit and that TCP
// answers are complete.
func TestTruncation(t *testing.T) {
	t.Parallel()
	const endpoints = 1000
	server := dns.New(dns.Options{})
	server.Apply(deltaWithEndpoints(endpoints))
	address := startServer(t, server, "127.0.0.1:0")
	const header, record, opt = 12 + 4 + 35, 16, 11 // bytes
	for what, tc := range map[string]struct {
		query      query
		maxLength  int
		minRecords int
		truncated  bool
	}{
		"UDP":                       {query{ednsSize: 0}, 512, (512 - header) / record, true},
		"UDP, EDNS":                 {query{ednsSize: 1000}, 1000, (1000 - header - opt) / record, true},
		"UDP, EDNS above the limit": {query{ednsSize: 4096}, 1232, (1232 - header - opt) / record, true},
		"UDP, EDNS too small":       {query{ednsSize: 100}, 512, (512 - header - opt) / record, true},
		"TCP":                       {query{network: "tcp"}, 65535, endpoints, false},
		"TCP, EDNS":                 {query{network: "tcp", ednsSize: 512}, 65535, endpoints, false},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			tc.query.name, tc.query.rrtype = "many.default.svc.cluster.local", miekg.TypeA
			reply := exchange(t, address, tc.query)
			if reply.Truncated != tc.truncated {
				t.Errorf("truncated is %v, want %v", reply.Truncated, tc.truncated)
			}
			reply.Compress = true
			if got := reply.Len(); got > tc.maxLength {
				t.Errorf("%d bytes, want at most %d", got, tc.maxLength)
			}
			if got := len(reply.Answer); got < tc.minRecords {
				t.Errorf("%d records, want at minFirst %d", got, tc.minRecords)
			}
			if got, want := reply.IsEdns0() != nil, tc.query.ednsSize != 0; got != want {
				t.Errorf("EDNS in the reply is %v, want %v", got, want)
			}
		})
	}
}

// TestTruncationOverTCP checks that an answer longer than any DNS message is truncated over
// TCP too.
func TestTruncationOverTCP(t *testing.T) {
	t.Parallel()
	server := dns.New(dns.Options{})
	server.Apply(deltaWithEndpoints(5000))
	address := startServer(t, server, "127.0.0.1:0")
	reply := exchange(t, address, query{name: "many", rrtype: miekg.TypeA, network: "tcp"})
	// A record takes 16 bytes of 65,535.
	if got := len(reply.Answer); !reply.Truncated || got < 4000 {
		t.Errorf("got %d records, truncated %v; want at minFirst 4000, truncated", got, reply.Truncated)
	}
}

// TestRandomOrder checks that each endpoint is the first one about equally often.
func TestRandomOrder(t *testing.T) {
	t.Parallel()
	const (
		endpoints = 3
		rounds    = 300
		// A uniform distribution gives 100 ± 8; the probability of less than half is 10^-9.
		minFirst = rounds / endpoints / 2
	)
	server := dns.New(dns.Options{})
	server.Apply(deltaWithEndpoints(endpoints))
	address := startServer(t, server, "127.0.0.1:0")
	for name, rrtype := range map[string]uint16{"many": miekg.TypeA, "_http._tcp.many": miekg.TypeSRV} {
		first := map[string]int{}
		for range rounds {
			reply := exchange(t, address, query{name: name, rrtype: rrtype})
			if len(reply.Answer) != endpoints {
				t.Fatalf("%s: got %v, want %d records", name, reply.Answer, endpoints)
			}
			first[reply.Answer[0].String()]++
		}
		if len(first) != endpoints {
			t.Errorf("%s: first records %v, want each of %d", name, first, endpoints)
		}
		for record, n := range first {
			if n < minFirst {
				t.Errorf("%s: first in %d of %d answers: %s", name, n, rounds, record)
			}
		}
	}
}

// TestApply checks the answers to A and PTR queries after each of several Deltas.
func TestApply(t *testing.T) {
	t.Parallel()
	key := func(namespace, name string) types.NamespacedName {
		return types.NamespacedName{Namespace: namespace, Name: name}
	}
	server := dns.New(dns.Options{})
	address := startServer(t, server, "127.0.0.1:0")
	for _, step := range []struct {
		what  string
		delta kube.Delta
		addrs []string // addresses of db, nil for NXDOMAIN
		// pointers has the names of 10.1.0.1, nil for REFUSED.
		pointers []string
	}{
		{what: "nothing"},
		{
			what:  "slice before its Service",
			delta: kube.Delta{EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("a", "db", newEndpoint("x", "10.1.0.1"))}},
		},
		{
			what:     "Service",
			delta:    kube.Delta{Services: []*corev1.Service{newService("default", "db", asHeadless)}},
			addrs:    []string{"10.1.0.1"},
			pointers: []string{"x.db.default.svc.cluster.local."},
		},
		{
			what:     "second slice, one endpoint in both",
			delta:    kube.Delta{EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("b", "db", newEndpoint("x", "10.1.0.1"), newEndpoint("", "10.1.0.2"))}},
			addrs:    []string{"10.1.0.1", "10.1.0.2"},
			pointers: []string{"x.db.default.svc.cluster.local."},
		},
		{
			what: "another Service over the same endpoint",
			delta: kube.Delta{
				Services:       []*corev1.Service{newService("default", "other", asHeadless)},
				EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("o", "other", newEndpoint("", "10.1.0.1"))},
			},
			addrs:    []string{"10.1.0.1", "10.1.0.2"},
			pointers: []string{"10-1-0-1.other.default.svc.cluster.local.", "x.db.default.svc.cluster.local."},
		},
		{
			what:     "slice changes",
			delta:    kube.Delta{EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("b", "db", newEndpoint("", "10.1.0.3"))}},
			addrs:    []string{"10.1.0.1", "10.1.0.3"},
			pointers: []string{"10-1-0-1.other.default.svc.cluster.local.", "x.db.default.svc.cluster.local."},
		},
		{
			what:     "slice moves to the other Service",
			delta:    kube.Delta{EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("b", "other", newEndpoint("", "10.1.0.3"))}},
			addrs:    []string{"10.1.0.1"},
			pointers: []string{"10-1-0-1.other.default.svc.cluster.local.", "x.db.default.svc.cluster.local."},
		},
		{
			what:     "the Service's last slice is deleted",
			delta:    kube.Delta{DeletedEndpointSlices: []types.NamespacedName{key("default", "a")}},
			pointers: []string{"10-1-0-1.other.default.svc.cluster.local."},
		},
		{
			what:     "Service gets a cluster IP",
			delta:    kube.Delta{Services: []*corev1.Service{newService("default", "db", withClusterIPs("10.1.0.1"))}},
			addrs:    []string{"10.1.0.1"},
			pointers: []string{"10-1-0-1.other.default.svc.cluster.local.", "db.default.svc.cluster.local."},
		},
		{
			what:  "the other Service is deleted, this one changes its address",
			delta: kube.Delta{Services: []*corev1.Service{newService("default", "db", withClusterIPs("10.1.0.4"))}, DeletedServices: []types.NamespacedName{key("default", "other")}},
			addrs: []string{"10.1.0.4"},
		},
		{
			what:  "unknown objects are deleted",
			delta: kube.Delta{DeletedServices: []types.NamespacedName{key("default", "no")}, DeletedEndpointSlices: []types.NamespacedName{key("default", "no")}},
			addrs: []string{"10.1.0.4"},
		},
		{what: "Service is deleted", delta: kube.Delta{DeletedServices: []types.NamespacedName{key("default", "db")}}},
	} {
		server.Apply(step.delta)
		reply := exchange(t, address, query{name: "db.default.svc.cluster.local", rrtype: miekg.TypeA})
		if diff := cmp.Diff(step.addrs, lastFields(reply.Answer)); diff != "" || (step.addrs == nil) != (reply.Rcode == miekg.RcodeNameError) {
			t.Errorf("%s: addresses, with %s (-want +got):\n%s", step.what, miekg.RcodeToString[reply.Rcode], diff)
		}
		reply = exchange(t, address, query{name: "1.0.1.10.in-addr.arpa", rrtype: miekg.TypePTR})
		if diff := cmp.Diff(step.pointers, lastFields(reply.Answer)); diff != "" || (step.pointers == nil) != (reply.Rcode == miekg.RcodeRefused) {
			t.Errorf("%s: pointers, with %s (-want +got):\n%s", step.what, miekg.RcodeToString[reply.Rcode], diff)
		}
	}
}

// lastFields returns the last field of each record, sorted; nil for no records.
func lastFields(rrs []miekg.RR) []string {
	var last []string
	for _, line := range recordText(rrs) {
		fields := strings.Fields(line)
		last = append(last, fields[len(fields)-1])
	}
	slices.Sort(last)
	return last
}

// TestNamespaceRemoval checks that a namespace exists while it has a Service, and the
// default namespace always.
func TestNamespaceRemoval(t *testing.T) {
	t.Parallel()
	server := dns.New(dns.Options{})
	server.Apply(exampleDelta())
	address := startServer(t, server, "127.0.0.1:0")
	var all []types.NamespacedName
	for _, s := range exampleDelta().Services {
		all = append(all, types.NamespacedName{Namespace: s.Namespace, Name: s.Name})
	}
	server.Apply(kube.Delta{DeletedServices: all})
	for name, want := range map[string]int{
		"shop.svc.cluster.local":    miekg.RcodeNameError,
		"default.svc.cluster.local": miekg.RcodeSuccess,
	} {
		if got := exchange(t, address, query{name: name, rrtype: miekg.TypeA}).Rcode; got != want {
			t.Errorf("%s: got %s, want %s", name, miekg.RcodeToString[got], miekg.RcodeToString[want])
		}
	}
}

// TestApplyIsAtomic checks that concurrent queries see both addresses of a Service change
// together.
func TestApplyIsAtomic(t *testing.T) {
	t.Parallel()
	const changes = 500
	server := dns.New(dns.Options{})
	states := []*corev1.Service{
		newService("default", "db", withClusterIPs("10.0.0.1", "10.0.0.2")),
		newService("default", "db", withClusterIPs("10.0.0.3", "10.0.0.4")),
	}
	server.Apply(kube.Delta{Services: states[:1]})
	address := startServer(t, server, "127.0.0.1:0")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range changes {
			server.Apply(kube.Delta{Services: states[i%2 : i%2+1]})
		}
	}()
	for changing := true; changing; {
		select {
		case <-done:
			changing = false
		default:
		}
		got := strings.Join(lastFields(exchange(t, address, query{name: "db", rrtype: miekg.TypeA}).Answer), " ")
		if got != "10.0.0.1 10.0.0.2" && got != "10.0.0.3 10.0.0.4" {
			t.Fatalf("got %q, a mixture of two states", got)
		}
	}
	<-done
}

// TestServeReturns checks that Serve returns when ctx is done although a client keeps its
// connection, and that the address is free again.
func TestServeReturns(t *testing.T) {
	t.Parallel()
	server := dns.New(dns.Options{})
	sockets, err := dns.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, sockets) }()

	client := miekg.Client{Net: "tcp"}
	conn, err := client.DialContext(t.Context(), sockets.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, _, err := client.ExchangeWithConnContext(t.Context(), query{name: "backend", rrtype: miekg.TypeA}.message(), conn); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Serve does not return")
	}
	again, err := dns.Listen(t.Context(), sockets.Addr())
	if err != nil {
		t.Fatalf("listen again: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

// TestServeAfterCancel checks that Serve returns at once if ctx is done before.
func TestServeAfterCancel(t *testing.T) {
	t.Parallel()
	sockets, err := dns.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := dns.New(dns.Options{}).Serve(ctx, sockets); err != nil {
		t.Error(err)
	}
}

func TestServeReportsSocketError(t *testing.T) {
	t.Parallel()
	sockets, err := dns.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := sockets.TCP.Close(); err != nil {
		t.Fatal(err)
	}
	err = dns.New(dns.Options{}).Serve(t.Context(), sockets)
	if err == nil || !strings.Contains(err.Error(), "tcp "+sockets.Addr()) {
		t.Errorf("got %v, want an error that names the socket", err)
	}
}

func TestListenErrors(t *testing.T) {
	t.Parallel()
	var config net.ListenConfig
	taken, err := config.ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for what, tc := range map[string]struct{ address, want string }{
		"no port":                 {"127.0.0.1", `listen address "127.0.0.1"`},
		"address of another host": {"192.0.2.1:0", "192.0.2.1"},
		"UDP port used":           {taken.LocalAddr().String(), "udp " + taken.LocalAddr().String()},
	} {
		err := dns.New(dns.Options{}).ListenAndServe(t.Context(), tc.address)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error with %q", what, err, tc.want)
		}
	}
	// Listen closes the TCP socket if it can't open the UDP socket.
	if tcp, err := config.Listen(t.Context(), "tcp", taken.LocalAddr().String()); err != nil {
		t.Errorf("TCP port still in use: %v", err)
	} else {
		tcp.Close()
	}
}
