package kube

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestConflicts checks who owns an address or node port that several Services claim.
func TestConflicts(t *testing.T) {
	t.Parallel()
	services := func(s ...*corev1.Service) Delta { return Delta{Services: s} }
	gone := func(name string) Delta { return Delta{DeletedServices: []types.NamespacedName{named(name)}} }
	const masq = " ->, masquerade always"
	tests := []struct {
		name  string
		steps []step
	}{
		{"external IPs: a Service keeps the others and takes over when the owner gives one up", []step{
			{
				name: "both", delta: services(
					newService("old", "10.96.0.1", age(2*time.Hour), externalIPs("192.0.2.1", "192.0.2.2")),
					newService("new", "10.96.0.2", age(time.Hour), externalIPs("192.0.2.9", "192.0.2.2")),
				),
				want: want{
					"default/old:http IPv4":            "10.96.0.1:80/TCP ->",
					"default/new:http IPv4":            "10.96.0.2:80/TCP ->",
					"default/old:http IPv4 ExternalIP": "192.0.2.1:80/TCP 192.0.2.2:80/TCP" + masq,
					"default/new:http IPv4 ExternalIP": "192.0.2.9:80/TCP" + masq,
				},
				problems: []string{"default/new: spec.externalIPs[1]: 192.0.2.2:80/TCP belongs to Service default/old: use another address or port for one of them"},
			},
			{name: "the owner removes it", delta: services(newService("old", "10.96.0.1", age(2*time.Hour), externalIPs("192.0.2.1"))), want: want{
				"default/old:http IPv4 ExternalIP": "192.0.2.1:80/TCP" + masq,
				"default/new:http IPv4 ExternalIP": "192.0.2.2:80/TCP 192.0.2.9:80/TCP" + masq,
			}},
		}},
		{"load balancer IPs, also against external IPs", []step{
			{
				name: "both", delta: services(
					newService("old", "10.96.0.1", age(2*time.Hour), externalIPs("192.0.2.1")),
					newService("new", "10.96.0.2", age(time.Hour), ingress("192.0.2.5", "192.0.2.1")),
				),
				want: want{
					"default/old:http IPv4":              "10.96.0.1:80/TCP ->",
					"default/new:http IPv4":              "10.96.0.2:80/TCP ->",
					"default/old:http IPv4 ExternalIP":   "192.0.2.1:80/TCP" + masq,
					"default/new:http IPv4 LoadBalancer": "192.0.2.5:80/TCP" + masq,
				},
				problems: []string{"default/new: status.loadBalancer.ingress[1].ip: 192.0.2.1:80/TCP belongs to Service default/old: use another address or port for one of them"},
			},
			{name: "the owner is deleted", delta: gone("old"), want: want{
				"default/old:http IPv4":              "gone",
				"default/old:http IPv4 ExternalIP":   "gone",
				"default/new:http IPv4 LoadBalancer": "192.0.2.1:80/TCP 192.0.2.5:80/TCP" + masq,
			}},
		}},
		{"one address with different ports or protocols is no conflict", []step{{
			name: "both", delta: services(
				newService("a", "10.96.0.1", externalIPs("192.0.2.1")),
				newService("b", "10.96.0.2", externalIPs("192.0.2.1"), ports(port("http", corev1.ProtocolTCP, 81))),
				newService("c", "10.96.0.3", ingress("192.0.2.1"), ports(port("http", corev1.ProtocolUDP, 80))),
			),
			want: want{
				"default/a:http IPv4":              "10.96.0.1:80/TCP ->",
				"default/a:http IPv4 ExternalIP":   "192.0.2.1:80/TCP" + masq,
				"default/b:http IPv4":              "10.96.0.2:81/TCP ->",
				"default/b:http IPv4 ExternalIP":   "192.0.2.1:81/TCP" + masq,
				"default/c:http IPv4":              "10.96.0.3:80/UDP ->",
				"default/c:http IPv4 LoadBalancer": "192.0.2.1:80/UDP" + masq,
			},
		}}},
		{"node ports, with one problem for both families", []step{
			{
				name: "both", delta: services(
					newService("old", "10.96.0.1 fd00::1", age(2*time.Hour), nodePorts(30080)),
					newService("new", "10.96.0.2 fd00::2", age(time.Hour), nodePorts(30080)),
				),
				want: want{
					"default/old:http IPv4":          "10.96.0.1:80/TCP ->",
					"default/old:http IPv6":          "[fd00::1]:80/TCP ->",
					"default/new:http IPv4":          "10.96.0.2:80/TCP ->",
					"default/new:http IPv6":          "[fd00::2]:80/TCP ->",
					"default/old:http IPv4 NodePort": "0.0.0.0:30080/TCP" + masq,
					"default/old:http IPv6 NodePort": "[::]:30080/TCP" + masq,
				},
				problems: []string{"default/new: spec.ports[0].nodePort: node port 30080/TCP belongs to Service default/old: use another node port for one of them"},
			},
			{name: "the owner changes its node port", delta: services(newService("old", "10.96.0.1 fd00::1", age(2*time.Hour), nodePorts(30081))), want: want{
				"default/old:http IPv4 NodePort": "0.0.0.0:30081/TCP" + masq,
				"default/old:http IPv6 NodePort": "[::]:30081/TCP" + masq,
				"default/new:http IPv4 NodePort": "0.0.0.0:30080/TCP" + masq,
				"default/new:http IPv6 NodePort": "[::]:30080/TCP" + masq,
			}},
		}},
		{"within one Service the first port is the owner", []step{{
			name: "duplicate ports and node ports", delta: services(newService("web", "10.96.0.1", ports(
				port("a", corev1.ProtocolTCP, 80), port("b", corev1.ProtocolTCP, 80),
			), nodePorts(30080, 30080), externalIPs("192.0.2.1"))),
			want: want{
				"default/web:a IPv4":            "10.96.0.1:80/TCP ->",
				"default/web:a IPv4 NodePort":   "0.0.0.0:30080/TCP" + masq,
				"default/web:a IPv4 ExternalIP": "192.0.2.1:80/TCP" + masq,
			},
			problems: []string{
				`default/web: spec.externalIPs[0]: 192.0.2.1:80/TCP is already used by port "a" of this Service: use another port`,
				`default/web: spec.ports[1].nodePort: node port 30080/TCP is already used by port "a" of this Service: use another node port`,
				`default/web: spec.ports[1].port: 10.96.0.1:80/TCP is already used by port "a" of this Service: use another port`,
			},
		}}},
		// Otherwise a user with write access to a Service could intercept the connections of
		// another user's Service (CVE-2020-8554).
		{"a cluster IP takes precedence over an older external IP or load balancer IP", []step{
			{
				name: "a Service claims addresses that are not allocated yet", delta: services(newService("attacker", "10.96.0.1", age(9*time.Hour), externalIPs("10.96.0.9", "192.0.2.1"), ingress("10.96.0.8"))),
				want: want{
					"default/attacker:http IPv4":              "10.96.0.1:80/TCP ->",
					"default/attacker:http IPv4 ExternalIP":   "10.96.0.9:80/TCP 192.0.2.1:80/TCP" + masq,
					"default/attacker:http IPv4 LoadBalancer": "10.96.0.8:80/TCP" + masq,
				},
			},
			{
				name: "the addresses are allocated", delta: services(newService("bank", "10.96.0.9", age(0)), newService("shop", "10.96.0.8", age(0))),
				want: want{
					"default/bank:http IPv4":                  "10.96.0.9:80/TCP ->",
					"default/shop:http IPv4":                  "10.96.0.8:80/TCP ->",
					"default/attacker:http IPv4 ExternalIP":   "192.0.2.1:80/TCP" + masq,
					"default/attacker:http IPv4 LoadBalancer": "gone",
				},
				problems: []string{
					"default/attacker: spec.externalIPs[0]: 10.96.0.9:80/TCP is the cluster IP of Service default/bank, which takes precedence: use another address or port",
					"default/attacker: status.loadBalancer.ingress[0].ip: 10.96.0.8:80/TCP is the cluster IP of Service default/shop, which takes precedence: use another address or port",
				},
			},
			{name: "an owner is deleted", delta: gone("shop"), want: want{
				"default/shop:http IPv4":                  "gone",
				"default/attacker:http IPv4 LoadBalancer": "10.96.0.8:80/TCP" + masq,
			}},
		}},
		{"a Service's own cluster IP as external IP stays a cluster IP", []step{{
			name: "both", delta: services(newService("web", "10.96.0.1", externalIPs("10.96.0.1"))),
			want:     want{"default/web:http IPv4": "10.96.0.1:80/TCP ->"},
			problems: []string{"default/web: spec.externalIPs[0]: 10.96.0.1:80/TCP is the Service's own cluster IP: remove it"},
		}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			checkHistory(t, Options{NodeName: "here"}, tt.steps)
		})
	}
}

// TestProblemUID checks that a problem belongs to an object and not to a name.
func TestProblemUID(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{})
	bad := ports(port("http", "tpc", 80))
	uids := func(r Result) (uids []types.UID) {
		for _, p := range r.Problems {
			uids = append(uids, p.UID)
		}
		return uids
	}
	for _, step := range []struct {
		name string
		svc  *corev1.Service
		want []types.UID
	}{
		{"a Service", newService("web", "10.96.0.1", bad, withUID("1")), []types.UID{"1"}},
		{"the same Service", newService("web", "10.96.0.1", bad, withUID("1")), nil},
		{"another Service with the same name and the same problem", newService("web", "10.96.0.1", bad, withUID("2")), []types.UID{"2"}},
		{"a Service with a conflict", newService("xyz", "10.96.0.1", ports(port("a", corev1.ProtocolTCP, 80), port("b", corev1.ProtocolTCP, 80)), withUID("3")), []types.UID{"3"}},
	} {
		if got := uids(tracker.Apply(Delta{Services: one(step.svc)})); !slices.Equal(got, step.want) {
			t.Errorf("%s: problems of %v, want %v", step.name, got, step.want)
		}
	}
}

// TestTooManyEndpoints checks that a port with more endpoints than the dataplane supports is
// reported.
func TestTooManyEndpoints(t *testing.T) {
	t.Parallel()
	d := Delta{Services: one(newService("web", "10.96.0.1"))}
	for range 66 {
		d.EndpointSlices = append(d.EndpointSlices, manyEndpoints("web", len(d.EndpointSlices), 1000))
	}
	checkHistory(t, Options{}, []step{{
		name: "66,000", delta: d, want: want{},
		problems: []string{"default/web: spec.ports[0]: not served: invalid Service default/web:http IPv4: 66000 endpoints, want at most 65535"},
	}})
}

// conflictingServices returns two Services that claim the same n external IPs with 20 ports each.
func conflictingServices(n int) Delta {
	var ips []string
	for i := range n {
		ips = append(ips, addrOf(192, i))
	}
	var list []corev1.ServicePort
	for i := range 20 {
		list = append(list, port(fmt.Sprint("p", i), corev1.ProtocolTCP, int32(80+i)))
	}
	return Delta{Services: []*corev1.Service{
		newService("old", "10.96.0.1", age(time.Hour), ports(list...), externalIPs(ips...)),
		newService("new", "10.96.0.2", age(0), ports(list...), externalIPs(ips...)),
	}}
}

// TestConflictCostIsLinear checks that the memory allocated per conflicting frontend does not
// grow with their number, and that few problems are reported for thousands of conflicts. It is
// not parallel because it measures the allocations of the whole process.
func TestConflictCostIsLinear(t *testing.T) { //nolint:paralleltest // see above
	each := func(n int) uint64 {
		d := conflictingServices(n)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got := NewTracker(Options{}).Apply(d)
		runtime.ReadMemStats(&after)
		if len(got.Changes) != 60 || len(got.Problems) != maxProblems+1 {
			t.Fatalf("%d external IPs: %d changes and %d problems, want 60 and %d", n, len(got.Changes), len(got.Problems), maxProblems+1)
		}
		if n := len(got.Problems); got.Problems[0].Field != "spec" || got.Problems[n-1].Field == "spec" {
			t.Errorf("problems %v, want the summary first", problemTexts(got.Problems))
		}
		return (after.TotalAlloc - before.TotalAlloc) / uint64(20*n)
	}
	if few, many := each(50), each(1000); many > 3*few {
		t.Errorf("%d bytes per frontend with 1,000 conflicts and %d with 20,000", few, many)
	}
}

// BenchmarkConflicts measures two Services that claim the same 20,000 frontends.
func BenchmarkConflicts(b *testing.B) {
	d := conflictingServices(1000)
	for b.Loop() {
		NewTracker(Options{}).Apply(d)
	}
}
