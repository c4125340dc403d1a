package dataplane_test

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
)

func frontend(addr string) dataplane.Frontend {
	return dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort(addr)}
}

func endpoint(addr string) dataplane.Endpoint {
	return dataplane.Endpoint{Addr: netip.MustParseAddrPort(addr)}
}

var (
	key4      = dataplane.Key{Namespace: "default", Name: "web", Family: dataplane.IPv4}
	nodePort4 = dataplane.Key{Namespace: "default", Name: "web", Family: dataplane.IPv4, Kind: dataplane.NodePort}
)

// TestFieldsReviewed fails for a new field until its author has reviewed the hand-written Equal
// (and, for a Key, Compare and String) and added the field here.
func TestFieldsReviewed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		value  any
		fields []string
	}{
		{dataplane.Service{}, []string{"Key", "Frontends", "ServiceSpec", "Serving"}},
		{dataplane.ServiceSpec{}, []string{
			"Endpoints", "ExternalTrafficPolicyLocal", "LocalEndpoints", "Masquerade", "NoEndpointsVerdict", "Affinity", "SourceRanges", "Scheduler",
		}},
		{dataplane.Key{}, []string{"Namespace", "Name", "Port", "Family", "Kind"}},
		{dataplane.Frontend{}, []string{"Protocol", "Addr"}},
		{dataplane.Endpoint{}, []string{"Addr", "Local"}},
		{dataplane.Node{}, []string{
			"PodCIDRs", "PodInterface", "PodInterfacePrefix", "LocalPodCIDRs", "MasqueradeAll", "PrimaryAddrs", "NodePortAddrs", "NodePortNetworks",
			"LocalhostNodePorts", "ProtectLoopback", "PingServiceIPs", "ServiceCIDRs", "AheadOfOthers",
		}},
		{dataplane.Binding{}, []string{"Service", "ServiceSpec"}},
	} {
		var got []string
		for f := range reflect.TypeOf(tt.value).Fields() {
			got = append(got, f.Name)
		}
		if diff := cmp.Diff(tt.fields, got); diff != "" {
			t.Errorf("%T has different fields than reviewed (-reviewed +current):\n%s", tt.value, diff)
		}
	}
}

func TestServiceEqual(t *testing.T) {
	t.Parallel()
	base := func() *dataplane.Service {
		return &dataplane.Service{
			Key:         key4,
			Frontends:   []dataplane.Frontend{frontend("10.96.0.1:80")},
			ServiceSpec: dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{endpoint("10.0.0.1:8080"), endpoint("10.0.0.2:8080")}},
		}
	}
	edited := func(edit func(*dataplane.Service)) *dataplane.Service {
		s := base()
		edit(s)
		return s
	}
	for name, tt := range map[string]struct {
		other *dataplane.Service
		want  bool
	}{
		"equal":               {base(), true},
		"nil":                 {nil, false},
		"namespace":           {edited(func(s *dataplane.Service) { s.Key.Namespace = "x" }), false},
		"name":                {edited(func(s *dataplane.Service) { s.Key.Name = "x" }), false},
		"port":                {edited(func(s *dataplane.Service) { s.Key.Port = "x" }), false},
		"family":              {edited(func(s *dataplane.Service) { s.Key.Family = dataplane.IPv6 }), false},
		"frontend protocol":   {edited(func(s *dataplane.Service) { s.Frontends[0].Protocol = dataplane.UDP }), false},
		"frontend address":    {edited(func(s *dataplane.Service) { s.Frontends[0] = frontend("10.96.0.2:80") }), false},
		"additional frontend": {edited(func(s *dataplane.Service) { s.Frontends = append(s.Frontends, frontend("10.96.0.2:80")) }), false},
		"endpoint address":    {edited(func(s *dataplane.Service) { s.Endpoints[1] = endpoint("10.0.0.2:8081") }), false},
		"kind":                {edited(func(s *dataplane.Service) { s.Key.Kind = dataplane.LoadBalancer }), false},
		"affinity":            {edited(func(s *dataplane.Service) { s.Affinity = time.Second }), false},
		"serving":             {edited(func(s *dataplane.Service) { s.Serving = addrPorts("10.0.0.3:8080") }), false},
		"endpoint local":      {edited(func(s *dataplane.Service) { s.Endpoints[1].Local = true }), false},
		"one endpoint fewer":  {edited(func(s *dataplane.Service) { s.Endpoints = s.Endpoints[:1] }), false},
	} {
		if got := base().Equal(tt.other); got != tt.want {
			t.Errorf("%s: Equal is %t, want %t", name, got, tt.want)
		}
		if got := tt.other.Equal(base()); got != tt.want {
			t.Errorf("%s, arguments swapped: Equal is %t, want %t", name, got, tt.want)
		}
	}
	var none *dataplane.Service
	if !none.Equal(nil) {
		t.Error("nil does not equal nil")
	}
}

func TestNewServiceSortsAndDeduplicates(t *testing.T) {
	t.Parallel()
	local := func(e dataplane.Endpoint) dataplane.Endpoint { e.Local = true; return e }
	got, err := dataplane.NewService(key4,
		[]dataplane.Frontend{
			frontend("10.96.0.2:80"), frontend("10.96.0.1:443"), frontend("10.96.0.1:80"), frontend("10.96.0.2:80"),
			{Protocol: dataplane.UDP, Addr: netip.MustParseAddrPort("10.96.0.1:80")},
		},
		dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{
			endpoint("10.0.0.2:80"), local(endpoint("10.0.0.2:80")), endpoint("10.0.0.1:80"), endpoint("10.0.0.1:80"),
			endpoint("10.0.0.2:81"), endpoint("10.0.0.2:79"), endpoint("10.0.0.3:80"),
		}})
	if err != nil {
		t.Fatal(err)
	}
	want := &dataplane.Service{
		Key: key4,
		Frontends: []dataplane.Frontend{
			frontend("10.96.0.1:80"),
			{Protocol: dataplane.UDP, Addr: netip.MustParseAddrPort("10.96.0.1:80")},
			frontend("10.96.0.1:443"), frontend("10.96.0.2:80"),
		},
		// One of two duplicates remains. All ports of a local address are local.
		ServiceSpec: dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{
			endpoint("10.0.0.1:80"),
			local(endpoint("10.0.0.2:79")), local(endpoint("10.0.0.2:80")), local(endpoint("10.0.0.2:81")),
			endpoint("10.0.0.3:80"),
		}},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestNewServiceValidates(t *testing.T) {
	t.Parallel()
	fs := []dataplane.Frontend{frontend("10.96.0.1:80")}
	es := []dataplane.Endpoint{endpoint("10.0.0.1:80")}
	manyEndpoints := make([]dataplane.Endpoint, dataplane.MaxEndpoints+1)
	for i := range manyEndpoints {
		manyEndpoints[i] = endpoint(fmt.Sprintf("10.0.%d.%d:%d", i>>8&255, i&255, 1+i>>16))
	}
	for name, tt := range map[string]struct {
		key       dataplane.Key
		frontends []dataplane.Frontend
		endpoints []dataplane.Endpoint
		want      string // part of the error; empty for no error
	}{
		"valid":                               {key4, fs, es, ""},
		"no endpoints":                        {key4, fs, nil, ""},
		"maximum number of endpoints":         {key4, fs, manyEndpoints[:dataplane.MaxEndpoints], ""},
		"unspecified address for a node port": {nodePort4, []dataplane.Frontend{frontend("0.0.0.0:30000")}, es, ""},
		"unknown kind": {
			dataplane.Key{Namespace: "x", Name: "x", Family: dataplane.IPv4, Kind: 9}, fs, es, "kind is Kind(9)",
		},
		"unspecified address for a cluster IP": {
			key4, []dataplane.Frontend{frontend("0.0.0.0:30000")}, es, "the unspecified address for a NodePort",
		},
		"specific address for a node port": {nodePort4, fs, es, "the unspecified address for a NodePort"},
		"no name":                          {dataplane.Key{Namespace: "x", Family: dataplane.IPv4}, fs, es, "no name"},
		"no namespace":                     {dataplane.Key{Name: "x", Family: dataplane.IPv4}, fs, es, "no namespace"},
		"no family":                        {dataplane.Key{Namespace: "x", Name: "x"}, fs, es, "family is Family(0), want IPv4 or IPv6"},
		"no frontends":                     {key4, nil, es, "no frontends"},
		"too many endpoints":               {key4, fs, manyEndpoints, "65536 endpoints, want at most 65535"},
		"no protocol": {
			key4,
			[]dataplane.Frontend{{Addr: fs[0].Addr}},
			es,
			"frontend 10.96.0.1:80/Protocol(0): unknown protocol",
		},
		"no address": {key4, []dataplane.Frontend{{Protocol: dataplane.TCP}}, es, "no address"},
		"port 0":     {key4, []dataplane.Frontend{frontend("10.96.0.1:0")}, es, "port 0"},
		"mapped": {
			dataplane.Key{Namespace: "x", Name: "x", Family: dataplane.IPv6},
			[]dataplane.Frontend{frontend("[::ffff:10.96.0.1]:80")},
			nil, "IPv4-mapped",
		},
		"zone": {
			dataplane.Key{Namespace: "x", Name: "x", Family: dataplane.IPv6},
			[]dataplane.Frontend{frontend("[fe80::1%eth0]:80")},
			nil, "zone",
		},
		"frontend of the other family": {key4, []dataplane.Frontend{frontend("[fd00::1]:80")}, es, "not of the Service's family IPv4"},
		"endpoint of the other family": {key4, fs, []dataplane.Endpoint{endpoint("[fd00::1]:80")}, "endpoint [fd00::1]:80: not of"},
		"endpoint port 0":              {key4, fs, []dataplane.Endpoint{endpoint("10.0.0.1:0")}, "endpoint 10.0.0.1:0: port 0"},
		"unspecified endpoint":         {key4, fs, []dataplane.Endpoint{endpoint("0.0.0.0:80")}, "want a pod's address"},
		"zero endpoint":                {key4, fs, make([]dataplane.Endpoint, 1), "no address"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, err := dataplane.NewService(tt.key, slices.Clone(tt.frontends), dataplane.ServiceSpec{Endpoints: slices.Clone(tt.endpoints)})
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || s != nil {
				t.Fatalf("got %v and no error, want an error with %q", s, tt.want)
			}
			if !errors.Is(err, dataplane.ErrInvalid) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.key.String()) {
				t.Errorf("error %q: want ErrInvalid, the key and %q", err, tt.want)
			}
		})
	}
}

func TestStrings(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		value fmt.Stringer
		want  string
	}{
		{dataplane.TCP, "TCP"},
		{dataplane.UDP, "UDP"},
		{dataplane.SCTP, "SCTP"},
		{dataplane.Protocol(7), "Protocol(7)"},
		{dataplane.IPv4, "IPv4"},
		{dataplane.IPv6, "IPv6"},
		{dataplane.Family(5), "Family(5)"},
		{key4, "default/web IPv4"},
		{nodePort4, "default/web IPv4 NodePort"},
		{dataplane.ClusterIP, "ClusterIP"},
		{dataplane.ExternalIP, "ExternalIP"},
		{dataplane.LoadBalancer, "LoadBalancer"},
		{dataplane.Kind(4), "Kind(4)"},
		{dataplane.Key{Namespace: "a", Name: "b", Port: "http", Family: dataplane.IPv6}, "a/b:http IPv6"},
		{frontend("10.96.0.10:80"), "10.96.0.10:80/TCP"},
		{frontend("[fd00::10]:80"), "[fd00::10]:80/TCP"},
	} {
		if got := tt.value.String(); got != tt.want {
			t.Errorf("%#v: %q, want %q", tt.value, got, tt.want)
		}
	}
	for addr, want := range map[string]dataplane.Family{
		"10.0.0.1": dataplane.IPv4, "fd00::1": dataplane.IPv6, "::ffff:10.0.0.1": dataplane.IPv6,
	} {
		if got := dataplane.FamilyOf(netip.MustParseAddr(addr)); got != want {
			t.Errorf("FamilyOf(%s) is %s, want %s", addr, got, want)
		}
	}
}

// Each list is in ascending order.
func TestCompare(t *testing.T) {
	t.Parallel()
	checkOrder(t, dataplane.Key.Compare,
		dataplane.Key{},
		dataplane.Key{Family: dataplane.IPv4},
		dataplane.Key{Family: dataplane.IPv4, Kind: dataplane.NodePort},
		dataplane.Key{Family: dataplane.IPv6},
		dataplane.Key{Port: "a"},
		dataplane.Key{Name: "a"},
		dataplane.Key{Name: "b"},
		dataplane.Key{Namespace: "a"},
		dataplane.Key{Namespace: "a", Name: "a", Port: "b", Family: dataplane.IPv4},
		dataplane.Key{Namespace: "b"},
	)
	checkOrder(t, dataplane.Frontend.Compare,
		frontend("0.0.0.0:30000"),
		frontend("10.0.0.1:80"),
		dataplane.Frontend{Protocol: dataplane.UDP, Addr: netip.MustParseAddrPort("10.0.0.1:80")},
		frontend("10.0.0.1:443"),
		frontend("10.0.0.2:80"),
		frontend("[fd00::1]:80"),
	)
}

func checkOrder[T any](t *testing.T, compare func(T, T) int, list ...T) {
	t.Helper()
	for i, a := range list {
		for j, b := range list {
			if got, want := compare(a, b), min(max(i-j, -1), 1); got != want {
				t.Errorf("compare %v with %v: %d, want %d", a, b, got, want)
			}
		}
	}
}

func TestChangeKey(t *testing.T) {
	t.Parallel()
	s := &dataplane.Service{Key: key4}
	for _, c := range []dataplane.Change{{Old: s}, {New: s}, {Old: s, New: s}} {
		if c.Key() != key4 {
			t.Errorf("key of %v is %s, want %s", c, c.Key(), key4)
		}
	}
}

func TestStateDiff(t *testing.T) {
	t.Parallel()
	web := func(addrs ...string) dataplane.Binding {
		b := dataplane.Binding{Service: "default/web"}
		for _, a := range addrs {
			b.Endpoints = append(b.Endpoints, endpoint(a))
		}
		return b
	}
	f1, f2, f3 := frontend("10.96.0.1:80"), frontend("10.96.0.2:80"), frontend("10.96.0.3:80")
	for name, tt := range map[string]struct {
		want, got dataplane.State
		diff      []string // part of each line, in order
	}{
		"both empty": {nil, dataplane.State{}, nil},
		"equal, with a different name": {
			dataplane.State{f1: web("10.0.0.1:1")},
			dataplane.State{f1: {Service: "default/w...", ServiceSpec: web("10.0.0.1:1").ServiceSpec}},
			nil,
		},
		"missing, different and unexpected": {
			dataplane.State{f2: web("10.0.0.1:1"), f1: web("10.0.0.1:1")},
			dataplane.State{f1: web("10.0.0.2:1"), f3: web()},
			[]string{"10.96.0.1:80/TCP of default/web: has [10.0.0.2:1]", "10.96.0.2:80/TCP of default/web: missing", "10.96.0.3:80/TCP: unexpected"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var lines []string
			if d := tt.want.Diff(tt.got); d != "" {
				lines = strings.Split(strings.TrimSuffix(d, "\n"), "\n")
			}
			if !slices.EqualFunc(lines, tt.diff, strings.Contains) {
				t.Errorf("got %q, want %q", lines, tt.diff)
			}
			if got, want := tt.want.Equal(tt.got), len(tt.diff) == 0; got != want {
				t.Errorf("Equal is %t, want %t", got, want)
			}
		})
	}
}

func TestStateOf(t *testing.T) {
	t.Parallel()
	two, err := dataplane.NewService(key4,
		[]dataplane.Frontend{frontend("10.96.0.1:80"), frontend("10.96.0.2:80")}, dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{endpoint("10.0.0.1:80")}})
	if err != nil {
		t.Fatal(err)
	}
	got := dataplane.StateOf(slices.Values([]*dataplane.Service{two}))
	b := dataplane.Binding{Service: "default/web", ServiceSpec: two.ServiceSpec}
	want := dataplane.State{frontend("10.96.0.1:80"): b, frontend("10.96.0.2:80"): b}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestError(t *testing.T) {
	t.Parallel()
	failed := func(n int) *dataplane.Error {
		e := &dataplane.Error{Op: "apply", Failed: map[dataplane.Key]error{}}
		for i := range n {
			k := key4
			k.Name = fmt.Sprintf("s%d", i)
			e.Failed[k] = fmt.Errorf("no memory for %d", i)
		}
		return e
	}
	for _, tt := range []struct {
		err  *dataplane.Error
		want string
	}{
		{failed(1), "apply: 1 failed: default/s0 IPv4: no memory for 0"},
		{failed(3), "apply: 3 failed: default/s0 IPv4: no memory for 0; default/s1 IPv4: no memory for 1; default/s2 IPv4: no memory for 2"},
		{failed(5), "apply: 5 failed: default/s0 IPv4: no memory for 0; default/s1 IPv4: no memory for 1; default/s2 IPv4: no memory for 2; and 2 more"},
	} {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("got  %q\nwant %q", got, tt.want)
		}
	}
	e := failed(2)
	e.Failed[key4] = fmt.Errorf("affinity: %w", dataplane.ErrUnsupported)
	if err := fmt.Errorf("nft: %w", e); !errors.Is(err, dataplane.ErrUnsupported) {
		t.Error("errors.Is does not find the error of a key")
	}
}

func addrPorts(texts ...string) (out []netip.AddrPort) {
	for _, text := range texts {
		out = append(out, netip.MustParseAddrPort(text))
	}
	return out
}

func TestWithServing(t *testing.T) {
	t.Parallel()
	newService := func(protocol dataplane.Protocol) *dataplane.Service {
		s, err := dataplane.NewService(key4,
			[]dataplane.Frontend{{Protocol: protocol, Addr: netip.MustParseAddrPort("10.96.0.1:53")}},
			dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{endpoint("10.0.0.1:53")}})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := newService(dataplane.UDP)
	got, err := s.WithServing(addrPorts("10.0.0.3:53", "10.0.0.2:53", "10.0.0.3:53"))
	if err != nil {
		t.Fatal(err)
	}
	if want := addrPorts("10.0.0.2:53", "10.0.0.3:53"); !slices.Equal(got.Serving, want) {
		t.Errorf("serving %v, want %v", got.Serving, want)
	}
	if s.Serving != nil {
		t.Errorf("WithServing changed its receiver: %v", s.Serving)
	}
	if !got.ServiceSpec.Equal(s.ServiceSpec) || s.Equal(got) {
		t.Errorf("%+v and %+v: want equal ServiceSpecs in different Services", got, s)
	}
	state := func(s *dataplane.Service) dataplane.State {
		return dataplane.StateOf(slices.Values([]*dataplane.Service{s}))
	}
	if diff := state(s).Diff(state(got)); diff != "" {
		t.Errorf("Serving changed the State:\n%s", diff)
	}

	for name, tt := range map[string]struct {
		protocol dataplane.Protocol
		serving  string
		want     string
	}{
		"TCP":                     {dataplane.TCP, "10.0.0.2:53", "want UDP"},
		"of another family":       {dataplane.UDP, "[fd00::1]:53", "endpoint [fd00::1]:53: not of the Service's family"},
		"without a port":          {dataplane.UDP, "10.0.0.2:0", "endpoint 10.0.0.2:0: port 0"},
		"the unspecified address": {dataplane.UDP, "0.0.0.0:53", "want a pod's address"},
	} {
		_, err := newService(tt.protocol).WithServing(addrPorts(tt.serving))
		if !errors.Is(err, dataplane.ErrInvalid) || !strings.Contains(fmt.Sprint(err), tt.want) {
			t.Errorf("%s: error %v, want ErrInvalid with %q", name, err, tt.want)
		}
	}
	if _, err := newService(dataplane.TCP).WithServing(nil); err != nil {
		t.Errorf("TCP without serving endpoints: %v", err)
	}
	if _, err := newService(dataplane.SCTP).WithServing(addrPorts("10.0.0.2:53")); err != nil {
		t.Errorf("SCTP: %v", err)
	}
}
