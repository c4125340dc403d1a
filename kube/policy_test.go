package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestTrafficPolicies checks for each kind of frontend which endpoints receive connections, which
// clients are masqueraded, and the verdict without endpoints.
func TestTrafficPolicies(t *testing.T) {
	t.Parallel()
	const (
		cluster  = "default/web:http IPv4"
		node     = "default/web:http IPv4 NodePort"
		external = "default/web:http IPv4 ExternalIP"
		balancer = "default/web:http IPv4 LoadBalancer"
		local    = corev1.ServiceExternalTrafficPolicyLocal
		internal = corev1.ServiceInternalTrafficPolicyLocal
	)
	every := func(changes ...func(*corev1.Service)) []*corev1.Service {
		return one(newService("web", "10.96.0.1", append([]func(*corev1.Service){
			ingress("192.0.2.1"), nodePorts(30080), externalIPs("192.0.2.2"),
		}, changes...)...))
	}
	testConversion(t, []conversionTest{
		{
			name:     "Cluster: all endpoints; the cluster IP masquerades off-cluster clients, the others all clients",
			services: every(),
			slices:   slice("10.0.0.1 @here", "10.0.0.2 @there"),
			want: want{
				cluster:  "10.96.0.1:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080",
				node:     "0.0.0.0:30080/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, masquerade always",
				external: "192.0.2.2:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, masquerade always",
				balancer: "192.0.2.1:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, masquerade always",
			},
		},
		{
			name:     "externalTrafficPolicy Local: outside clients use endpoints on this node and keep their address; the cluster IP is not affected",
			services: every(externalPolicy(local)),
			slices:   slice("10.0.0.1 @here", "10.0.0.2 @there"),
			want: want{
				cluster:  "10.96.0.1:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080",
				node:     "0.0.0.0:30080/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, others -> 10.0.0.1:8080(local), masquerade from-node",
				external: "192.0.2.2:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, others -> 10.0.0.1:8080(local), masquerade from-node",
				balancer: "192.0.2.1:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, others -> 10.0.0.1:8080(local), masquerade from-node",
			},
		},
		{
			name:     "externalTrafficPolicy Local, endpoints on other nodes only: outside clients are dropped, this node and its pods use all endpoints",
			services: every(externalPolicy(local)),
			slices:   slice("10.0.0.2 @there"),
			want: want{
				cluster:  "10.96.0.1:80/TCP -> 10.0.0.2:8080",
				node:     "0.0.0.0:30080/TCP -> 10.0.0.2:8080, others -> none, masquerade from-node, drop",
				external: "192.0.2.2:80/TCP -> 10.0.0.2:8080, others -> none, masquerade from-node, drop",
				balancer: "192.0.2.1:80/TCP -> 10.0.0.2:8080, others -> none, masquerade from-node, drop",
			},
		},
		{
			name:     "externalTrafficPolicy Local, no endpoints: all clients are rejected",
			services: every(externalPolicy(local)),
			slices:   slice("10.0.0.1 @here !ready !serving"),
			want: want{
				cluster:  "10.96.0.1:80/TCP ->",
				node:     "0.0.0.0:30080/TCP ->, others -> none, masquerade from-node",
				external: "192.0.2.2:80/TCP ->, others -> none, masquerade from-node",
				balancer: "192.0.2.1:80/TCP ->, others -> none, masquerade from-node",
			},
		},
		{
			name:     "internalTrafficPolicy Local: the cluster IP uses endpoints on this node; the other kinds are not affected",
			services: every(internalPolicy(internal)),
			slices:   slice("10.0.0.1 @here", "10.0.0.2 @there"),
			want: want{
				cluster:  "10.96.0.1:80/TCP -> 10.0.0.1:8080(local)",
				node:     "0.0.0.0:30080/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, masquerade always",
				external: "192.0.2.2:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, masquerade always",
				balancer: "192.0.2.1:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, masquerade always",
			},
		},
		{
			name:     "internalTrafficPolicy Local, endpoints on other nodes only: clients of the cluster IP are dropped",
			services: one(newService("web", "10.96.0.1", internalPolicy(internal))),
			slices:   slice("10.0.0.2 @there"),
			want:     want{cluster: "10.96.0.1:80/TCP ->, drop"},
		},
		{
			name:     "internalTrafficPolicy Local, serving terminating endpoints on other nodes only: dropped too",
			services: one(newService("web", "10.96.0.1", internalPolicy(internal))),
			slices:   slice("10.0.0.2 @there !ready +serving +terminating"),
			want:     want{cluster: "10.96.0.1:80/TCP ->, drop"},
		},
		{
			name:     "internalTrafficPolicy Local, no endpoints: rejected",
			services: one(newService("web", "10.96.0.1", internalPolicy(internal))),
			want:     want{cluster: "10.96.0.1:80/TCP ->"},
		},
		{
			name:     "both policies Local",
			services: one(newService("web", "10.96.0.1", nodePorts(30080), internalPolicy(internal), externalPolicy(local))),
			slices:   slice("10.0.0.1 @here", "10.0.0.2 @there"),
			want: want{
				cluster: "10.96.0.1:80/TCP -> 10.0.0.1:8080(local)",
				node:    "0.0.0.0:30080/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080, others -> 10.0.0.1:8080(local), masquerade from-node",
			},
		},
		{
			name:     "an endpoint without nodeName is not local for a policy, but may be for hairpin",
			services: one(newService("web", "10.96.0.1", internalPolicy(internal), externalIPs("192.0.2.2"), externalPolicy(local))),
			slices:   slice("10.0.0.1"),
			want: want{
				cluster:  "10.96.0.1:80/TCP ->, drop",
				external: "192.0.2.2:80/TCP -> 10.0.0.1:8080(local), others -> none, masquerade from-node, drop",
			},
		},
		{
			name:     "externalTrafficPolicy has no effect without an external type or address",
			services: one(newService("web", "10.96.0.1", externalPolicy(local))),
			slices:   slice("10.0.0.2 @there"),
			want:     want{cluster: "10.96.0.1:80/TCP -> 10.0.0.2:8080"},
		},
		{
			name: "externalTrafficPolicy has no effect on an address that remains after the type LoadBalancer",
			services: one(newService("web", "10.96.0.1", externalPolicy(local), ingress("192.0.2.1"),
				ofType(corev1.ServiceTypeClusterIP))),
			slices: slice("10.0.0.2 @there"),
			want: want{
				cluster:  "10.96.0.1:80/TCP -> 10.0.0.2:8080",
				balancer: "192.0.2.1:80/TCP -> 10.0.0.2:8080, masquerade always",
			},
		},
		{
			name:     "unknown policies are reported and Cluster is used",
			services: one(newService("web", "10.96.0.1", nodePorts(30080), externalPolicy("Foreign"), internalPolicy("Near"))),
			slices:   slice("10.0.0.2 @there"),
			want: want{
				cluster: "10.96.0.1:80/TCP -> 10.0.0.2:8080",
				node:    "0.0.0.0:30080/TCP -> 10.0.0.2:8080, masquerade always",
			},
			problems: []string{
				`default/web: spec.externalTrafficPolicy: "Foreign" is not a traffic policy, so Cluster is used: set it to Cluster or Local`,
				`default/web: spec.internalTrafficPolicy: "Near" is not a traffic policy, so Cluster is used: set it to Cluster or Local`,
			},
		},
	})
}

// TestNoLocalEndpointsWithoutNodeName checks that a node without a name has no local endpoints.
func TestNoLocalEndpointsWithoutNodeName(t *testing.T) {
	t.Parallel()
	got := NewTracker(Options{}).Apply(Delta{
		Services:       one(newService("web", "10.96.0.1", internalPolicy(corev1.ServiceInternalTrafficPolicyLocal))),
		EndpointSlices: slice("10.0.0.1 @", "10.0.0.2 @there", "10.0.0.3"),
	})
	if want, got := "10.96.0.1:80/TCP ->, drop", serviceTexts(got.Changes)["default/web:http IPv4"]; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestSessionAffinity checks the session affinity timeout.
func TestSessionAffinity(t *testing.T) {
	t.Parallel()
	const (
		cluster = "default/web:http IPv4"
		node    = "default/web:http IPv4 NodePort"
	)
	at := func(text string) want { return want{cluster: "10.96.0.1:80/TCP ->" + text} }
	web := func(change func(*corev1.Service)) []*corev1.Service {
		return one(newService("web", "10.96.0.1", change))
	}
	bad := func(text string) []string {
		return []string{"default/web: spec.sessionAffinityConfig.clientIP.timeoutSeconds: " + text + " is not a valid timeout, so 10800 is used: set it to a value from 1 to 86400"}
	}
	testConversion(t, []conversionTest{
		{name: "None", services: web(func(svc *corev1.Service) { svc.Spec.SessionAffinity = corev1.ServiceAffinityNone }), want: at("")},
		{name: "None with a timeout", services: web(func(svc *corev1.Service) {
			timeout(60)(svc)
			svc.Spec.SessionAffinity = corev1.ServiceAffinityNone
		}), want: at("")},
		{name: "ClientIP: three hours by default", services: web(clientIP), want: at(", affinity 3h0m0s")},
		{name: "ClientIP with an empty configuration: three hours", services: web(func(svc *corev1.Service) {
			clientIP(svc)
			svc.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{}}
		}), want: at(", affinity 3h0m0s")},
		{name: "the shortest timeout", services: web(timeout(1)), want: at(", affinity 1s")},
		{name: "the longest timeout", services: web(timeout(86400)), want: at(", affinity 24h0m0s")},
		{name: "a timeout of zero is reported", services: web(timeout(0)), want: at(", affinity 3h0m0s"), problems: bad("0")},
		{name: "a timeout above the maximum is reported", services: web(timeout(86401)), want: at(", affinity 3h0m0s"), problems: bad("86401")},
		{
			name: "an unknown affinity is reported", services: web(func(svc *corev1.Service) { svc.Spec.SessionAffinity = "Cookie" }),
			want:     at(""),
			problems: []string{`default/web: spec.sessionAffinity: "Cookie" is not a session affinity, so None is used: set it to ClientIP or None`},
		},
		{
			name:     "it applies to every kind of frontend",
			services: one(newService("web", "10.96.0.1", nodePorts(30080), timeout(60))),
			want: want{
				cluster: "10.96.0.1:80/TCP ->, affinity 1m0s",
				node:    "0.0.0.0:30080/TCP ->, masquerade always, affinity 1m0s",
			},
		},
	})
}

// TestScheduler checks the IPVS scheduler of a Service.
func TestScheduler(t *testing.T) {
	t.Parallel()
	const (
		cluster = "default/web:http IPv4"
		field   = "default/web: metadata.annotations[fairlead.io/ipvs-scheduler]: "
	)
	web := func(changes ...func(*corev1.Service)) Delta {
		return Delta{Services: one(newService("web", "10.96.0.1", changes...))}
	}
	at := func(text string) want { return want{cluster: "10.96.0.1:80/TCP ->" + text} }
	some := []string{"lc", "mh", "rr"}
	for _, tt := range []struct {
		name       string
		schedulers []string
		steps      []step
	}{
		{"it applies to every kind of frontend, in both families", some, []step{{
			delta: Delta{Services: one(newService("web", "10.96.0.1 fd00::1", ingress("192.0.2.1"), nodePorts(30080), externalIPs("192.0.2.2"), scheduler("lc")))},
			want: want{
				cluster:                              "10.96.0.1:80/TCP ->, scheduler lc",
				"default/web:http IPv6":              "[fd00::1]:80/TCP ->, scheduler lc",
				"default/web:http IPv4 NodePort":     "0.0.0.0:30080/TCP ->, masquerade always, scheduler lc",
				"default/web:http IPv6 NodePort":     "[::]:30080/TCP ->, masquerade always, scheduler lc",
				"default/web:http IPv4 ExternalIP":   "192.0.2.2:80/TCP ->, masquerade always, scheduler lc",
				"default/web:http IPv4 LoadBalancer": "192.0.2.1:80/TCP ->, masquerade always, scheduler lc",
			},
		}}},
		{"with session affinity", some, []step{{delta: web(timeout(60), scheduler("mh")), want: at(", affinity 1m0s, scheduler mh")}}},
		{"an empty name has no effect with schedulers", some, []step{{delta: web(scheduler("")), want: at("")}}},
		{"an empty name has no effect without schedulers", nil, []step{{delta: web(scheduler("")), want: at("")}}},
		{"changes take effect immediately", some, []step{
			{name: "none", delta: web(), want: at("")},
			{name: "one", delta: web(scheduler("lc")), want: at(", scheduler lc")},
			{name: "the same", delta: web(scheduler("lc")), want: want{}},
			{name: "another", delta: web(scheduler("rr")), want: at(", scheduler rr")},
			{name: "none again", delta: web(), want: at("")},
		}},
		{"an unknown scheduler is reported until it is fixed", some, []step{
			{
				name: "wrong", delta: web(scheduler("leastconn")), want: at(""),
				problems: []string{field + `"leastconn" is not a supported scheduler, so --ipvs-scheduler is used: set it to one of lc, mh, rr`},
			},
			{name: "the same", delta: web(scheduler("leastconn")), want: want{}},
			{
				name: "upper case", delta: web(scheduler("LC")), want: want{},
				problems: []string{field + `"LC" is not a supported scheduler, so --ipvs-scheduler is used: set it to one of lc, mh, rr`},
			},
			{name: "right", delta: web(scheduler("lc")), want: at(", scheduler lc")},
		}},
		{"with a single supported scheduler", []string{"rr"}, []step{{
			delta: web(scheduler("lc")), want: at(""),
			problems: []string{field + `"lc" is not a supported scheduler, so --ipvs-scheduler is used: set it to one of rr`},
		}}},
		{"without schedulers, a problem is reported and the Service is served", nil, []step{{
			delta: web(scheduler("lc")), want: at(""),
			problems: []string{field + `"lc" has no effect, because this node does not use the ipvs mode: remove the annotation, or run Fairlead with --mode=ipvs`},
		}}},
		{"a Service that is not served has no problem", nil, []step{{
			delta: Delta{Services: one(newService("web", "None", scheduler("lc")))}, want: want{},
		}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			checkHistory(t, Options{NodeName: "here", Schedulers: tt.schedulers}, tt.steps)
		})
	}
}

// TestBalancing checks the annotation that selects the balancing, and which annotation takes
// precedence.
func TestBalancing(t *testing.T) {
	t.Parallel()
	const (
		cluster = "default/web:http IPv4"
		field   = "default/web: metadata.annotations[fairlead.io/balancing]: "
	)
	web := func(changes ...func(*corev1.Service)) Delta {
		return Delta{Services: one(newService("web", "10.96.0.1", changes...))}
	}
	at := func(text string) want { return want{cluster: "10.96.0.1:80/TCP ->" + text} }
	rules := Options{NodeName: "here", Balancing: Balancing{
		Default: "random", Schedulers: map[string]string{"random": "", "round-robin": "rr", "source-hash": "source_hash"},
	}}
	ipvs := Options{NodeName: "here", Schedulers: []string{"lc", "mh", "rr"}, Balancing: Balancing{
		Default: "--ipvs-scheduler", Schedulers: map[string]string{"round-robin": "", "source-hash": "source_hash", "least-connections": "lc"},
	}}
	for _, tt := range []struct {
		name    string
		options Options
		steps   []step
	}{
		{"it applies to every kind of frontend, in both families", rules, []step{{
			delta: Delta{Services: one(newService("web", "10.96.0.1 fd00::1", ingress("192.0.2.1"), nodePorts(30080), externalIPs("192.0.2.2"), balancing("source-hash")))},
			want: want{
				cluster:                              "10.96.0.1:80/TCP ->, scheduler source_hash",
				"default/web:http IPv6":              "[fd00::1]:80/TCP ->, scheduler source_hash",
				"default/web:http IPv4 NodePort":     "0.0.0.0:30080/TCP ->, masquerade always, scheduler source_hash",
				"default/web:http IPv6 NodePort":     "[::]:30080/TCP ->, masquerade always, scheduler source_hash",
				"default/web:http IPv4 ExternalIP":   "192.0.2.2:80/TCP ->, masquerade always, scheduler source_hash",
				"default/web:http IPv4 LoadBalancer": "192.0.2.1:80/TCP ->, masquerade always, scheduler source_hash",
			},
		}}},
		{"with session affinity", rules, []step{{delta: web(timeout(60), balancing("round-robin")), want: at(", affinity 1m0s, scheduler rr")}}},
		{"changes take effect immediately", rules, []step{
			{name: "none", delta: web(), want: at("")},
			{name: "one", delta: web(balancing("round-robin")), want: at(", scheduler rr")},
			{name: "another", delta: web(balancing("source-hash")), want: at(", scheduler source_hash")},
			{name: "the default by its name", delta: web(balancing("random")), want: at("")},
			{name: "an empty value", delta: web(balancing("")), want: want{}},
		}},
		{"an unknown or impossible value is reported until it is fixed", rules, []step{
			{
				name: "unknown", delta: web(balancing("Random")), want: at(""),
				problems: []string{field + `"Random" is not a kind of balancing, so random is used: set it to one of random, round-robin, source-hash`},
			},
			{name: "the same", delta: web(balancing("Random")), want: want{}},
			{
				name: "impossible", delta: web(balancing("least-connections")), want: want{},
				problems: []string{field + `"least-connections" is not possible in the mode of this node, so random is used: set it to one of random, round-robin, source-hash`},
			},
			{name: "possible", delta: web(balancing("round-robin")), want: at(", scheduler rr")},
		}},
		{"IPVS: the scheduler of the value", ipvs, []step{
			{name: "least connections", delta: web(balancing("least-connections")), want: at(", scheduler lc")},
			{name: "source hash", delta: web(balancing("source-hash")), want: at(", scheduler source_hash")},
			{name: "the node's default", delta: web(balancing("round-robin")), want: at("")},
			{
				name: "impossible", delta: web(balancing("random")), want: want{},
				problems: []string{field + `"random" is not possible in the mode of this node, so --ipvs-scheduler is used: set it to one of least-connections, round-robin, source-hash`},
			},
		}},
		{"IPVS: the scheduler's annotation takes precedence", ipvs, []step{
			{name: "both", delta: web(balancing("least-connections"), scheduler("mh")), want: at(", scheduler mh")},
			{name: "with a value that is not possible", delta: web(balancing("random"), scheduler("mh")), want: want{}},
			{name: "an empty name", delta: web(balancing("least-connections"), scheduler("")), want: at(", scheduler lc")},
			{
				name: "an unknown scheduler", delta: web(balancing("least-connections"), scheduler("leastconn")), want: at(""),
				problems: []string{`default/web: metadata.annotations[fairlead.io/ipvs-scheduler]: "leastconn" is not a supported scheduler, so --ipvs-scheduler is used: set it to one of lc, mh, rr`},
			},
		}},
		{"without schedulers, the balancing applies and the scheduler's annotation is no problem", rules, []step{{
			delta: web(balancing("source-hash"), scheduler("mh")), want: at(", scheduler source_hash"),
		}}},
		{"a backend without balancing", Options{NodeName: "here"}, []step{{
			delta: web(balancing("round-robin")), want: at(""),
			problems: []string{field + `"round-robin" is not possible in the mode of this node, so the default is used: remove the annotation`},
		}}},
		{"a Service that is not served has no problem", rules, []step{{
			delta: Delta{Services: one(newService("web", "None", balancing("fast")))}, want: want{},
		}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			checkHistory(t, tt.options, tt.steps)
		})
	}
}

// TestConfigureKeepsBalancing checks that Configure does not change the balancing, because the
// backend stays the same.
func TestConfigureKeepsBalancing(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{Balancing: Balancing{Schedulers: map[string]string{"round-robin": "rr"}}})
	tracker.Configure(Options{})
	got := tracker.Apply(Delta{Services: one(newService("web", "10.96.0.1", balancing("round-robin")))})
	if want, got := "10.96.0.1:80/TCP ->, scheduler rr", serviceTexts(got.Changes)["default/web:http IPv4"]; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestConfigureKeepsSchedulers checks that Configure does not change the schedulers, because the
// backend stays the same.
func TestConfigureKeepsSchedulers(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{Schedulers: []string{"lc"}})
	tracker.Configure(Options{})
	got := tracker.Apply(Delta{Services: one(newService("web", "10.96.0.1", scheduler("lc")))})
	if want, got := "10.96.0.1:80/TCP ->, scheduler lc", serviceTexts(got.Changes)["default/web:http IPv4"]; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
