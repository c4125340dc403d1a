package dns

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/kube"
)

// composeLabels is the inverse of parseName, except for kinds without their own parts.
func composeLabels(n parsedName) []string {
	switch n.kind {
	case kindApex:
		return nil
	case kindVersion:
		return []string{labelVersion}
	case kindService:
		return []string{n.service, n.namespace, labelService}
	case kindHost:
		return []string{n.host, n.service, n.namespace, labelService}
	case kindProtocol:
		return []string{n.protocol, n.service, n.namespace, labelService}
	case kindPort:
		return []string{n.port, n.protocol, n.service, n.namespace, labelService}
	case kindPod:
		return []string{dashedAddr(n.addr), n.namespace, labelPod}
	case kindNone, kindEmptyNonTerminal, kindNamespace:
	}
	return nil
}

func TestParseName(t *testing.T) {
	t.Parallel()
	for domain, want := range map[string]parsedName{
		".":                            {kind: kindApex},
		"dns-version.":                 {kind: kindVersion},
		"a.dns-version.":               {},
		"svc.":                         {kind: kindEmptyNonTerminal},
		"pod.":                         {kind: kindEmptyNonTerminal},
		"shop.svc.":                    {kind: kindNamespace, namespace: "shop"},
		"Web.Shop.SVC.":                {kind: kindService, namespace: "shop", service: "web"},
		"db-0.web.shop.svc.":           {kind: kindHost, namespace: "shop", service: "web", host: "db-0"},
		"_tcp.web.shop.svc.":           {kind: kindProtocol, namespace: "shop", service: "web", protocol: "_tcp"},
		"_http._tcp.web.shop.svc.":     {kind: kindPort, namespace: "shop", service: "web", port: "_http", protocol: "_tcp"},
		"http.tcp.web.shop.svc.":       {},
		"_http.tcp.web.shop.svc.":      {},
		"a._http._tcp.web.shop.svc.":   {},
		"10-1-0-5.shop.pod.":           {kind: kindPod, namespace: "shop", addr: netip.MustParseAddr("10.1.0.5")},
		"fd00--5.shop.pod.":            {kind: kindPod, namespace: "shop", addr: netip.MustParseAddr("fd00::5")},
		"010-1-0-5.shop.pod.":          {},
		"fd00-0-0-0-0-0-0-5.shop.pod.": {},
		"fe80--1%eth0.shop.pod.":       {},
		`10\.1\.0\.5.shop.pod.`:        {},
		"a.10-1-0-5.shop.pod.":         {},
		"web.shop.other.":              {},
	} {
		if diff := cmp.Diff(want, parseName(splitLabels(domain)), cmp.AllowUnexported(parsedName{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", domain, diff)
		}
	}
}

func TestParseReverse(t *testing.T) {
	t.Parallel()
	v6 := strings.Repeat("0.", 30) + "d.F.ip6.arpa."
	for domain, want := range map[string]string{
		"4.3.2.1.in-addr.arpa.":   "1.2.3.4",
		v6:                        "fd00::",
		"3.2.1.in-addr.arpa.":     "",
		"5.4.3.2.1.in-addr.arpa.": "",
		"256.3.2.1.in-addr.arpa.": "",
		"4.3.2.1.ip6.arpa.":       "",
		"4.3.2.1.in-addr.local.":  "",
		"+" + v6:                  "",
		"00." + v6[2:]:            "",
		"g." + v6[2:]:             "",
		"arpa.":                   "",
		".":                       "",
	} {
		addr, ok := parseReverse(splitLabels(domain))
		if ok != (want != "") || ok && addr.String() != want {
			t.Errorf("%s: got %v, %v, want %q", domain, addr, ok, want)
		}
	}
}

// FuzzName checks for arbitrary names that parsing is reversible and that the answer is
// about the requested name.
func FuzzName(f *testing.F) {
	for _, seed := range []string{
		"web.shop.svc.cluster.local.", "_http._tcp.web.shop.svc.cluster.local.", "10-1-0-5.shop.pod.cluster.local.",
		"5.0.1.10.in-addr.arpa.", strings.Repeat("0.", 30) + "d.f.ip6.arpa.", "WEB.shop", `\w\e\b.shop.svc`, `a\.b`, "..", "",
		"cluster.local.", "dns-version.cluster.local", "h.web.shop.svc.", "h.web.shop.svc.cluster.local.",
	} {
		f.Add(seed, dns.TypeA)
		f.Add(seed, dns.TypeSRV)
	}
	server := New(Options{DefaultNamespace: "shop"})
	host := "h"
	server.Apply(kube.Delta{
		Services: []*corev1.Service{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"},
			Spec:       corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone},
		}},
		EndpointSlices: []*discoveryv1.EndpointSlice{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
			Endpoints:  []discoveryv1.Endpoint{{Addresses: []string{"10.1.0.5"}, Hostname: &host}},
		}},
	})
	f.Fuzz(func(t *testing.T, domain string, rrtype uint16) {
		// Pack and unpack the name, as a query on the network does.
		packed, err := new(dns.Msg).SetQuestion(dns.Fqdn(domain), rrtype).Pack()
		if err != nil {
			return
		}
		query := new(dns.Msg)
		if err := query.Unpack(packed); err != nil {
			t.Fatalf("unpack: %v", err)
		}
		domain = query.Question[0].Name

		labels := splitLabels(domain)
		if parsed := parseName(labels); composeLabels(parsed) != nil && !slices.Equal(composeLabels(parsed), labels) {
			t.Errorf("%q is parsed as %+v", domain, parsed)
		}
		if addr, ok := parseReverse(labels); ok {
			if back, err := dns.ReverseAddr(addr.String()); err != nil || back != strings.Join(labels, ".")+"." {
				t.Errorf("%q is parsed as address %v: %q, %v", domain, addr, back, err)
			}
		}

		reply := server.newReply(query, false)
		if _, err := reply.Pack(); err != nil {
			t.Errorf("%q: %v", domain, err)
		}
		switch reply.Rcode {
		case dns.RcodeSuccess:
			for _, rr := range reply.Answer {
				if rr.Header().Name != domain {
					t.Errorf("%q: the answer is about %q", domain, rr.Header().Name)
				}
			}
		case dns.RcodeNameError, dns.RcodeRefused:
			if len(reply.Answer) != 0 {
				t.Errorf("%q: %s with answers %v", domain, dns.RcodeToString[reply.Rcode], reply.Answer)
			}
		default:
			t.Errorf("%q: %s", domain, dns.RcodeToString[reply.Rcode])
		}
	})
}
