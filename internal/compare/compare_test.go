package compare_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/compare"
	"fairlead.io/fairlead/kube"
)

// service returns a Service default/NAME with one frontend and these endpoints.
func service(t *testing.T, name, frontend string, spec dataplane.ServiceSpec, endpoints ...string) *dataplane.Service {
	t.Helper()
	for _, e := range endpoints {
		spec.Endpoints = append(spec.Endpoints, dataplane.Endpoint{Addr: netip.MustParseAddrPort(e)})
	}
	key := dataplane.Key{Namespace: "default", Name: name, Family: dataplane.IPv4}
	s, err := dataplane.NewService(key, []dataplane.Frontend{{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort(frontend)}}, spec)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// compareWith compares a kernel that holds some Services with desired ones.
func compareWith(t *testing.T, have, want []*dataplane.Service) *compare.Report {
	t.Helper()
	b := backend.Backend{Name: "fake", Open: func(o backend.Options) (dataplane.Dataplane, error) {
		d := fake.New(fake.Options{})
		if err := d.Replace(t.Context(), dataplane.Node{}, slices.Values(have), nil); err != nil {
			return nil, err
		}
		o.DryRun.Differ("set pod-cidrs in table ip fairlead", dataplane.Differs, []string{"10.0.0.0/8", "10.1.0.0/16"}, []string{"10.1.0.0/16"})
		o.DryRun.Record(dataplane.Add, "element", "services in table ip fairlead", 3)
		o.DryRun.Record(dataplane.Delete, "element", "services in table ip fairlead", 1)
		o.DryRun.Record(dataplane.Modify, "chain", "nat-prerouting in table ip fairlead", 1)
		return d, nil
	}}
	r, err := compare.Kernel(t.Context(), compare.Options{
		Backend: b, Services: want, Logger: slog.New(slog.DiscardHandler), Explain: func(_, name string) kube.Explanation {
			if name == "old" {
				return kube.Explanation{NotServed: kube.NoSuchService}
			}
			return kube.Explanation{Ports: []kube.PortExplanation{{
				Key: dataplane.Key{Namespace: "default", Name: name, Family: dataplane.IPv4},
				Endpoints: []kube.EndpointExplanation{
					{Addr: netip.MustParseAddrPort("10.1.0.1:80"), EndpointSlice: "web-1", Cluster: kube.NotReady},
					{Addr: netip.MustParseAddrPort("10.1.0.2:80"), EndpointSlice: "web-1"},
				},
			}}}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

const wantText = `Service default/new: missing
+   10.96.0.3:80/TCP
+     endpoints: 10.1.0.2:80  # EndpointSlice web-1
+     masquerade: off-cluster
+     noEndpointsVerdict: reject
Service default/old: unexpected: the Service does not exist
-   10.96.0.2:80/TCP
-     masquerade: off-cluster
-     noEndpointsVerdict: reject
Service default/web: different
    10.96.0.1:80/TCP
-     endpoints: 10.1.0.1:80  # EndpointSlice web-1: conditions.ready is false
-     endpoints: 10.1.0.9:80  # in no EndpointSlice
+     endpoints: 10.1.0.2:80  # EndpointSlice web-1
+     sourceRanges: 192.0.2.0/24
-     masquerade: off-cluster
+     masquerade: always
set pod-cidrs in table ip fairlead: different
-   10.0.0.0/8
sysctl net.netfilter.nf_conntrack_max: different
-   1
+   2
`

const wantSummary = `mode fake, 2 Service ports with 2 frontends: 1 to add, 1 to change, 1 to remove
chains: 1 to change
elements: 3 to add, 1 to delete
sysctls: 1 to change
`

func TestReport(t *testing.T) {
	t.Parallel()
	spec := dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeAlways, SourceRanges: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}
	have := []*dataplane.Service{
		service(t, "old", "10.96.0.2:80", dataplane.ServiceSpec{}),
		service(t, "same", "10.96.0.4:80", dataplane.ServiceSpec{}, "10.1.0.2:80"),
		service(t, "web", "10.96.0.1:80", dataplane.ServiceSpec{}, "10.1.0.1:80", "10.1.0.9:80"),
	}
	want := []*dataplane.Service{
		service(t, "new", "10.96.0.3:80", dataplane.ServiceSpec{}, "10.1.0.2:80"),
		service(t, "web", "10.96.0.1:80", spec, "10.1.0.2:80"),
	}
	r := compareWith(t, have, append(want, service(t, "same", "10.96.0.4:80", dataplane.ServiceSpec{}, "10.1.0.2:80")))
	if r.DesiredPorts != 3 || r.DesiredFrontends != 3 || r.ProgrammedFrontends != 3 || r.IsEmpty() {
		t.Errorf("report %+v, want three Service ports in both states", r)
	}
	r.AddSetting("net.netfilter.nf_conntrack_max", "1", "2")
	var text, summary bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wantText, text.String()); diff != "" {
		t.Errorf("text (-want +got):\n%s", diff)
	}
	r.DesiredPorts, r.DesiredFrontends = 2, 2
	if err := r.WriteSummary(&summary); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wantSummary, summary.String()); diff != "" {
		t.Errorf("summary (-want +got):\n%s", diff)
	}
	encoded, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var decoded compare.Report
	if err := json.Unmarshal(encoded, &decoded); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(*r, decoded); diff != "" {
		t.Errorf("JSON (-written +read):\n%s", diff)
	}
}

// TestUnexplainedWrites checks that writes without a difference in the handling of connections are
// listed.
func TestUnexplainedWrites(t *testing.T) {
	t.Parallel()
	r := compareWith(t, nil, nil)
	r.Objects = nil
	var text bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	const want = "  1 chain: nat-prerouting in table ip fairlead\n+ 3 elements: services in table ip fairlead\n- 1 element: services in table ip fairlead\n"
	if diff := cmp.Diff(want, text.String()); diff != "" || r.IsEmpty() {
		t.Errorf("text (-want +got):\n%s", diff)
	}
}
