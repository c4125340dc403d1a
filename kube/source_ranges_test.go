package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestSourceRanges checks which clients may connect to load balancer IPs.
func TestSourceRanges(t *testing.T) {
	t.Parallel()
	web := func(ranges ...string) []*corev1.Service {
		return one(newService("web", "10.96.0.1 fd00::1", ingress("192.0.2.1", "2001:db8::1"), sourceRangesOf(ranges...),
			nodePorts(30080), externalIPs("192.0.2.2")))
	}
	// from returns the expected Services with the given ranges of both families.
	from := func(four, six string) want {
		text := func(ranges string) string {
			if ranges == "" {
				return ""
			}
			return ", from [" + ranges + "]"
		}
		return want{
			"default/web:http IPv4":              "10.96.0.1:80/TCP ->",
			"default/web:http IPv6":              "[fd00::1]:80/TCP ->",
			"default/web:http IPv4 NodePort":     "0.0.0.0:30080/TCP ->, masquerade always",
			"default/web:http IPv6 NodePort":     "[::]:30080/TCP ->, masquerade always",
			"default/web:http IPv4 ExternalIP":   "192.0.2.2:80/TCP ->, masquerade always",
			"default/web:http IPv4 LoadBalancer": "192.0.2.1:80/TCP ->, masquerade always" + text(four),
			"default/web:http IPv6 LoadBalancer": "[2001:db8::1]:80/TCP ->, masquerade always" + text(six),
		}
	}
	problem := func(i, text string) string {
		return "default/web: spec.loadBalancerSourceRanges[" + i + "]: " + text +
			": use a network such as 192.0.2.0/24 or 2001:db8::/32; until then only clients in the other ranges are allowed, and no client of a family without another range"
	}
	testConversion(t, []conversionTest{
		{name: "no ranges: all clients", services: web(), want: from("", "")},
		{
			name: "ranges are split by family, sorted, deduplicated, trimmed and masked", services: web(" 203.0.113.7/24", "10.0.0.0/8 ", "2001:db8:1::/48", "10.0.0.0/8"),
			want: from("10.0.0.0/8 203.0.113.0/24", "2001:db8:1::/48"),
		},
		{name: "a family without ranges allows all clients", services: web("2001:db8:1::/48"), want: from("", "2001:db8:1::/48")},
		{name: "a range of all addresses allows all clients of its family", services: web("10.0.0.0/8", "0.0.0.0/0", "2001:db8:1::/48"), want: from("", "2001:db8:1::/48")},
		{name: "leading zeros are decimal", services: web("010.0.0.0/8"), want: from("10.0.0.0/8", "")},
		{
			name: "leading zeros in prefix lengths", services: web("203.0.113.000/025", "2001:db8:1::/048", "010.1.0.0/0016"),
			want: from("10.1.0.0/16 203.0.113.0/25", "2001:db8:1::/48"),
		},
		{
			name: "a sign or a space is not a digit", services: web("203.0.113.0/+25", "10.0.0.0/8"),
			want: from("10.0.0.0/8", ""), problems: []string{problem("0", `"203.0.113.0/+25" is not a network`)},
		},
		{
			name: "valid ranges apply besides an invalid one", services: web("10.0.0.0/8", "192.0.2.0/33"),
			want: from("10.0.0.0/8", ""), problems: []string{problem("1", `"192.0.2.0/33" is not a network`)},
		},
		{
			name: "with only invalid ranges, no client of the family is allowed", services: web("192.0.2.1"),
			want: from("0.0.0.0/32", ""), problems: []string{problem("0", `"192.0.2.1" is not a network`)},
		},
		{
			name: "only invalid ranges for IPv6", services: web("2001:db8::/129", "10.0.0.0/8"),
			want: from("10.0.0.0/8", "::/128"), problems: []string{problem("0", `"2001:db8::/129" is not a network`)},
		},
		{
			name: "an invalid range that may belong to either family closes both", services: web("office", ""),
			want:     from("0.0.0.0/32", "::/128"),
			problems: []string{problem("0", `"office" is not a network`), problem("1", `"" is not a network`)},
		},
		{name: "an IPv4-mapped network is an IPv4 network", services: web("::ffff:10.1.2.3/104"), want: from("10.0.0.0/8", "")},
		{name: "the network of all mapped addresses is all of IPv4", services: web("::ffff:0:0/96", "192.0.2.0/24"), want: from("", "")},
		{name: "a larger network is an IPv6 network", services: web("::ffff:10.0.0.0/80"), want: from("", "::/80")},
		{
			name: "the deprecated annotation is ignored",
			services: func() []*corev1.Service {
				list := web()
				list[0].Annotations = map[string]string{corev1.AnnotationLoadBalancerSourceRangesKey: "10.0.0.0/8"}
				return list
			}(),
			want: from("", ""),
		},
	})
}
