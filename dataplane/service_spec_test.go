package dataplane_test

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
)

func prefixes(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// fullSpec returns a ServiceSpec with every field set.
func fullSpec() dataplane.ServiceSpec {
	return dataplane.ServiceSpec{
		Endpoints:                  []dataplane.Endpoint{endpoint("10.0.0.1:80"), {Addr: endpoint("10.0.0.2:80").Addr, Local: true}},
		ExternalTrafficPolicyLocal: true,
		LocalEndpoints:             []dataplane.Endpoint{{Addr: endpoint("10.0.0.2:80").Addr, Local: true}},
		Masquerade:                 dataplane.MasqueradeFromNode,
		NoEndpointsVerdict:         dataplane.Drop,
		Affinity:                   3 * time.Hour,
		SourceRanges:               prefixes("192.0.2.0/24", "198.51.100.0/24"),
		Scheduler:                  "lc",
	}
}

func TestServiceSpecEqual(t *testing.T) {
	t.Parallel()
	if !fullSpec().Equal(fullSpec()) {
		t.Error("a ServiceSpec does not equal itself")
	}
	for name, edit := range map[string]func(*dataplane.ServiceSpec){
		"Endpoints":                  func(s *dataplane.ServiceSpec) { s.Endpoints = s.Endpoints[:1] },
		"ExternalTrafficPolicyLocal": func(s *dataplane.ServiceSpec) { s.ExternalTrafficPolicyLocal = false },
		"LocalEndpoints":             func(s *dataplane.ServiceSpec) { s.LocalEndpoints = nil },
		"Masquerade":                 func(s *dataplane.ServiceSpec) { s.Masquerade = dataplane.MasqueradeAlways },
		"NoEndpointsVerdict":         func(s *dataplane.ServiceSpec) { s.NoEndpointsVerdict = dataplane.Reject },
		"Affinity":                   func(s *dataplane.ServiceSpec) { s.Affinity = time.Second },
		"SourceRanges":               func(s *dataplane.ServiceSpec) { s.SourceRanges = s.SourceRanges[1:] },
		"Scheduler":                  func(s *dataplane.ServiceSpec) { s.Scheduler = "" },
	} {
		other := fullSpec()
		edit(&other)
		if fullSpec().Equal(other) || other.Equal(fullSpec()) {
			t.Errorf("%s differs, but Equal returns true", name)
		}
		if fullSpec().String() == other.String() {
			t.Errorf("%s differs, but String returns the same text: %s", name, other)
		}
	}
}

func TestServiceSpecString(t *testing.T) {
	t.Parallel()
	const want = "[10.0.0.1:80 10.0.0.2:80(local)] external=[10.0.0.2:80(local)] masquerade=from-node no-endpoints=drop" +
		" affinity=3h0m0s source-ranges=[192.0.2.0/24 198.51.100.0/24] scheduler=lc"
	if got := fullSpec().String(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := (dataplane.ServiceSpec{}).String(); got != "[]" {
		t.Errorf("the zero ServiceSpec is %q, want []", got)
	}
	for got, want := range map[string]string{
		dataplane.MasqueradeOffCluster.String(): "off-cluster",
		dataplane.MasqueradeAlways.String():     "always",
		dataplane.Masquerade(7).String():        "Masquerade(7)",
		dataplane.Reject.String():               "reject",
		dataplane.Verdict(7).String():           "Verdict(7)",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestNodeEqual(t *testing.T) {
	t.Parallel()
	base := func() dataplane.Node {
		return dataplane.Node{
			PodCIDRs: prefixes("10.0.0.0/8"), PodInterface: "cbr0", PodInterfacePrefix: "veth", LocalPodCIDRs: prefixes("10.0.1.0/24"),
			MasqueradeAll: true, PrimaryAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.7")},
			NodePortAddrs:      []netip.Addr{netip.MustParseAddr("192.0.2.1")},
			NodePortNetworks:   []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")},
			LocalhostNodePorts: true, ProtectLoopback: true, PingServiceIPs: true, ServiceCIDRs: prefixes("10.96.0.0/12"),
			AheadOfOthers: true,
		}
	}
	if !base().Equal(base()) {
		t.Error("a Node does not equal itself")
	}
	for name, edit := range map[string]func(*dataplane.Node){
		"PodCIDRs":           func(n *dataplane.Node) { n.PodCIDRs = nil },
		"PodInterface":       func(n *dataplane.Node) { n.PodInterface = "" },
		"PodInterfacePrefix": func(n *dataplane.Node) { n.PodInterfacePrefix = "" },
		"LocalPodCIDRs":      func(n *dataplane.Node) { n.LocalPodCIDRs = nil },
		"MasqueradeAll":      func(n *dataplane.Node) { n.MasqueradeAll = false },
		"PrimaryAddrs":       func(n *dataplane.Node) { n.PrimaryAddrs = nil },
		"NodePortAddrs":      func(n *dataplane.Node) { n.NodePortAddrs = nil },
		"NodePortNetworks":   func(n *dataplane.Node) { n.NodePortNetworks = nil },
		"LocalhostNodePorts": func(n *dataplane.Node) { n.LocalhostNodePorts = false },
		"ProtectLoopback":    func(n *dataplane.Node) { n.ProtectLoopback = false },
		"PingServiceIPs":     func(n *dataplane.Node) { n.PingServiceIPs = false },
		"ServiceCIDRs":       func(n *dataplane.Node) { n.ServiceCIDRs = nil },
		"AheadOfOthers":      func(n *dataplane.Node) { n.AheadOfOthers = false },
	} {
		other := base()
		edit(&other)
		if base().Equal(other) || other.Equal(base()) {
			t.Errorf("%s differs, but Equal returns true", name)
		}
	}
}

func TestNewServiceValidatesSpec(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		spec dataplane.ServiceSpec
		want string // part of the error; empty for no error
	}{
		"everything":                       {fullSpec(), ""},
		"longest affinity":                 {dataplane.ServiceSpec{Affinity: dataplane.MaxAffinity}, ""},
		"overlapping ranges":               {dataplane.ServiceSpec{SourceRanges: prefixes("10.0.0.0/8", "10.1.0.0/16")}, ""},
		"policy without local endpoints":   {dataplane.ServiceSpec{ExternalTrafficPolicyLocal: true}, ""},
		"local endpoints without a policy": {dataplane.ServiceSpec{LocalEndpoints: []dataplane.Endpoint{endpoint("10.0.0.1:80")}}, "local endpoints without"},
		"local endpoint of another family": {dataplane.ServiceSpec{ExternalTrafficPolicyLocal: true, LocalEndpoints: []dataplane.Endpoint{endpoint("[fd00::1]:80")}}, "not of"},
		"masquerade":                       {dataplane.ServiceSpec{Masquerade: 3}, "unknown masquerade"},
		"verdict":                          {dataplane.ServiceSpec{NoEndpointsVerdict: 2}, "unknown verdict"},
		"negative affinity":                {dataplane.ServiceSpec{Affinity: -time.Second}, "affinity -1s"},
		"affinity of 1.5 s":                {dataplane.ServiceSpec{Affinity: 1500 * time.Millisecond}, "want whole seconds"},
		"affinity too long":                {dataplane.ServiceSpec{Affinity: dataplane.MaxAffinity + time.Second}, "affinity 24h0m1s"},
		"host bits":                        {dataplane.ServiceSpec{SourceRanges: prefixes("10.0.0.1/8")}, "source range 10.0.0.1/8"},
		"range of another family":          {dataplane.ServiceSpec{SourceRanges: prefixes("fd00::/8")}, "family IPv4"},
		"zero prefix":                      {dataplane.ServiceSpec{SourceRanges: make([]netip.Prefix, 1)}, "source range"},
		"longest scheduler":                {dataplane.ServiceSpec{Scheduler: "az_09_azazazaz9"}, ""},
		"scheduler name too long":          {dataplane.ServiceSpec{Scheduler: "az_09_azazazaz90"}, `scheduler "az_09_azazazaz90", want up to 15 lower-case letters`},
		"scheduler in upper case":          {dataplane.ServiceSpec{Scheduler: "LC"}, `scheduler "LC"`},
		"two schedulers":                   {dataplane.ServiceSpec{Scheduler: "lc,rr"}, `scheduler "lc,rr"`},
		"name of a scheduler's module":     {dataplane.ServiceSpec{Scheduler: "ip-vs-lc"}, `scheduler "ip-vs-lc"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := dataplane.NewService(key4, []dataplane.Frontend{frontend("10.96.0.1:80")}, tt.spec)
			switch {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" && (!errors.Is(err, dataplane.ErrInvalid) || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("error %v: want ErrInvalid and %q", err, tt.want)
			}
		})
	}
}

func TestNewServiceSortsSpec(t *testing.T) {
	t.Parallel()
	s, err := dataplane.NewService(key4, []dataplane.Frontend{frontend("10.96.0.1:80")}, dataplane.ServiceSpec{
		ExternalTrafficPolicyLocal: true,
		LocalEndpoints:             []dataplane.Endpoint{endpoint("10.0.0.2:80"), endpoint("10.0.0.1:80"), endpoint("10.0.0.2:80")},
		SourceRanges:               prefixes("192.0.2.0/24", "10.0.0.0/8", "192.0.2.0/24"),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := dataplane.ServiceSpec{
		ExternalTrafficPolicyLocal: true,
		LocalEndpoints:             []dataplane.Endpoint{endpoint("10.0.0.1:80"), endpoint("10.0.0.2:80")},
		SourceRanges:               prefixes("10.0.0.0/8", "192.0.2.0/24"),
	}
	if !s.ServiceSpec.Equal(want) {
		t.Errorf("got  %s\nwant %s", s.ServiceSpec, want)
	}
}

// TestNewServicePropagatesLocal checks that an address that is local in one list is local in the
// other.
func TestNewServicePropagatesLocal(t *testing.T) {
	t.Parallel()
	local := func(e dataplane.Endpoint) dataplane.Endpoint { e.Local = true; return e }
	a, b, c := endpoint("10.0.0.1:80"), endpoint("10.0.0.2:80"), endpoint("10.0.0.3:80")
	b2 := endpoint("10.0.0.2:81")
	for name, tt := range map[string]struct{ all, locals, wantAll, wantLocals []dataplane.Endpoint }{
		"from LocalEndpoints to Endpoints":         {[]dataplane.Endpoint{a, b, b2, c}, []dataplane.Endpoint{local(b)}, []dataplane.Endpoint{a, local(b), local(b2), c}, []dataplane.Endpoint{local(b)}},
		"from Endpoints to LocalEndpoints":         {[]dataplane.Endpoint{a, local(b2)}, []dataplane.Endpoint{b}, []dataplane.Endpoint{a, local(b2)}, []dataplane.Endpoint{local(b)}},
		"from an address that is not in Endpoints": {[]dataplane.Endpoint{a, c}, []dataplane.Endpoint{local(b)}, []dataplane.Endpoint{a, c}, []dataplane.Endpoint{local(b)}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, err := dataplane.NewService(key4, []dataplane.Frontend{frontend("10.96.0.1:80")}, dataplane.ServiceSpec{
				Endpoints: tt.all, ExternalTrafficPolicyLocal: true, LocalEndpoints: tt.locals,
			})
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(s.Endpoints, tt.wantAll) || !slices.Equal(s.LocalEndpoints, tt.wantLocals) {
				t.Errorf("got %s", s.ServiceSpec)
			}
		})
	}
}

// TestNewServiceDoesNotWriteSortedLists checks that NewService only reads lists that are already
// in order, so that Services can share them. The race detector reports a write.
func TestNewServiceDoesNotWriteSortedLists(t *testing.T) {
	t.Parallel()
	shared := fullSpec()
	done := make(chan struct{})
	for range 2 {
		go func() {
			defer func() { done <- struct{}{} }()
			if _, err := dataplane.NewService(key4, []dataplane.Frontend{frontend("10.96.0.1:80")}, shared); err != nil {
				t.Error(err)
			}
		}()
	}
	<-done
	<-done
	if !slices.Equal(shared.Endpoints, fullSpec().Endpoints) {
		t.Error("NewService changed the list")
	}
}
