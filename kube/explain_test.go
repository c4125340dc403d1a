package kube

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
)

// checkExplanations checks that the explanation of every Service selects exactly the programmed
// frontends and endpoints.
func checkExplanations(t *testing.T, tracker *Tracker, programmed map[dataplane.Key]*dataplane.Service) {
	t.Helper()
	explained := map[dataplane.Key]bool{}
	for _, name := range tracker.ServiceNames() {
		for _, p := range tracker.Explain(name).Ports {
			explained[p.Key] = true
			var owned []dataplane.Frontend
			for _, c := range p.Frontends {
				if c.Owned {
					owned = append(owned, c.Frontend)
				}
			}
			svc := programmed[p.Key]
			if svc == nil {
				if len(owned) > 0 {
					t.Errorf("%s: Explain says that the Service owns %v, but it is not programmed", p.Key, owned)
				}
				continue
			}
			if !slices.Equal(owned, svc.Frontends) {
				t.Errorf("%s: Explain says that the Service owns %v, but %v are programmed", p.Key, owned, svc.Frontends)
			}
			cluster := func(e EndpointExplanation) Exclusion { return e.Cluster }
			local := func(e EndpointExplanation) Exclusion { return e.Local }
			switch {
			case p.Key.Kind == dataplane.ClusterIP && p.TrafficPolicyLocal:
				checkSelected(t, p, local, svc.Endpoints)
			case p.TrafficPolicyLocal:
				checkSelected(t, p, cluster, svc.Endpoints)
				checkSelected(t, p, local, svc.LocalEndpoints)
			default:
				checkSelected(t, p, cluster, svc.Endpoints)
			}
		}
	}
	for key := range programmed {
		if !explained[key] {
			t.Errorf("%s is programmed, but Explain does not contain it", key)
		}
	}
}

func checkSelected(t *testing.T, p PortExplanation, exclusion func(EndpointExplanation) Exclusion, want []dataplane.Endpoint) {
	t.Helper()
	var got, programmed []netip.AddrPort
	for _, e := range p.Endpoints {
		if exclusion(e) == Selected {
			got = append(got, e.Addr)
		}
	}
	for _, e := range want {
		programmed = append(programmed, e.Addr)
	}
	if !slices.Equal(got, programmed) {
		t.Errorf("%s: Explain selects the endpoints %v, but %v are programmed", p.Key, got, programmed)
	}
}

// TestExplainEndpoints checks the reason for which each endpoint receives no connections on the
// node "here" in zone a.
func TestExplainEndpoints(t *testing.T) {
	t.Parallel()
	const draining = " !ready +serving +terminating"
	local := externalPolicy(corev1.ServiceExternalTrafficPolicyLocal)
	for _, test := range []struct {
		name    string
		service []func(*corev1.Service)
		slices  []*discoveryv1.EndpointSlice
		// cluster and local contain the exclusion of each endpoint by address.
		cluster, local map[string]Exclusion
	}{
		{
			name:   "conditions",
			slices: slice("10.0.0.1 @there", "10.0.0.2 @there !ready", "10.0.0.3 @there"+draining, "10.0.0.4 @there !ready !serving +terminating"),
			cluster: map[string]Exclusion{
				"10.0.0.1:8080": Selected, "10.0.0.2:8080": NotReady, "10.0.0.3:8080": Terminating, "10.0.0.4:8080": NotServing,
			},
		},
		{
			name:   "no endpoint is ready",
			slices: slice("10.0.0.2 @there !ready", "10.0.0.3 @there"+draining, "10.0.0.4 @there !ready !serving +terminating"),
			cluster: map[string]Exclusion{
				"10.0.0.2:8080": NotReady, "10.0.0.3:8080": Selected, "10.0.0.4:8080": NotServing,
			},
		},
		{
			name: "traffic policy Local", service: []func(*corev1.Service){local},
			slices:  slice("10.0.0.1 @here", "10.0.0.2 @there", "10.0.0.3", "10.0.0.4 @here !ready"),
			cluster: map[string]Exclusion{"10.0.0.1:8080": Selected, "10.0.0.2:8080": Selected, "10.0.0.3:8080": Selected, "10.0.0.4:8080": NotReady},
			local:   map[string]Exclusion{"10.0.0.1:8080": Selected, "10.0.0.2:8080": OnOtherNode, "10.0.0.3:8080": OnUnknownNode, "10.0.0.4:8080": NotReady},
		},
		{
			name: "only terminating endpoints on this node", service: []func(*corev1.Service){local},
			slices:  slice("10.0.0.1 @here"+draining, "10.0.0.2 @there"),
			cluster: map[string]Exclusion{"10.0.0.1:8080": Terminating, "10.0.0.2:8080": Selected},
			local:   map[string]Exclusion{"10.0.0.1:8080": Selected, "10.0.0.2:8080": OnOtherNode},
		},
		{
			name:    "hints for zones",
			slices:  slice("10.0.0.1 @there zone=a", "10.0.0.2 @there zone=b"),
			cluster: map[string]Exclusion{"10.0.0.1:8080": Selected, "10.0.0.2:8080": HintForOtherZone},
		},
		{
			name: "other family and other port",
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @there")),
				newSlice("web-2", "web", eps("10.0.0.2 @there"), slicePorts(slicePort("metrics", corev1.ProtocolTCP, 9090))),
				newSlice("web-3", "web", eps("fd00::1 @there"), func(s *discoveryv1.EndpointSlice) { s.AddressType = discoveryv1.AddressTypeIPv6 }),
			},
			cluster: map[string]Exclusion{"10.0.0.1:8080": Selected, "10.0.0.2:0": NoMatchingPort, "[fd00::1]:0": OtherFamily},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			svc := newService("web", "10.96.0.1", append(test.service, externalIPs("192.0.2.2"))...)
			tracker := NewTracker(Options{NodeName: "here"})
			changes := tracker.Apply(Delta{Node: newNode("198.51.100.1", inZone("a")), Services: one(svc), EndpointSlices: test.slices}).Changes
			checkExplanations(t, tracker, changes)
			got := tracker.Explain(named("web"))
			if got.NotServed != Served || len(got.Ports) != 2 {
				t.Fatalf("NotServed %q, %d ports; want a served cluster IP and external IP", got.NotServed, len(got.Ports))
			}
			external := got.Ports[1]
			cluster, local := map[string]Exclusion{}, map[string]Exclusion{}
			for _, e := range external.Endpoints {
				cluster[e.Addr.String()], local[e.Addr.String()] = e.Cluster, e.Local
			}
			if diff := cmp.Diff(test.cluster, cluster); diff != "" {
				t.Errorf("policy Cluster (-want +got):\n%s", diff)
			}
			if test.local == nil {
				return
			}
			if diff := cmp.Diff(test.local, local); diff != "" {
				t.Errorf("policy Local (-want +got):\n%s", diff)
			}
		})
	}
}

func TestExplainNotServed(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{NodeName: "here"})
	tracker.Apply(Delta{Services: []*corev1.Service{
		newService("headless", "None"),
		newService("named", "", ofType(corev1.ServiceTypeExternalName)),
		newService("pending", ""),
		newService("other", "10.96.0.2", func(svc *corev1.Service) {
			svc.Labels = map[string]string{LabelServiceProxyName: "mesh"}
		}),
		newService("web", "10.96.0.1"),
	}})
	for name, want := range map[string]NotServed{
		"headless": IsHeadless, "named": IsExternalName, "pending": NoClusterIP, "other": OfAnotherProxy, "web": Served, "missing": NoSuchService,
	} {
		if got := tracker.Explain(named(name)).NotServed; got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// TestExplainConflict checks that the explanation names the owner of a frontend, and the Service
// of a cluster IP.
func TestExplainConflict(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{NodeName: "here"})
	changes := tracker.Apply(Delta{Services: []*corev1.Service{
		newService("old", "10.96.0.1", externalIPs("192.0.2.2"), age(time.Hour)),
		newService("new", "10.96.0.2", externalIPs("192.0.2.2"), age(time.Minute)),
	}}).Changes
	checkExplanations(t, tracker, changes)
	got := tracker.Explain(named("new"))
	if c := got.Ports[1].Frontends[0]; c.Owned || c.Owner != named("old") || c.OwnerKind != dataplane.ExternalIP {
		t.Errorf("claim %+v, want Service old as the owner", c)
	}
	if len(got.Problems) != 1 {
		t.Errorf("problems %v, want the conflict", got.Problems)
	}
	if names := tracker.ServicesAt(netip.MustParseAddr("10.96.0.2")); len(names) != 1 || names[0] != named("new") {
		t.Errorf("Services at 10.96.0.2: %v, want new", names)
	}
}
