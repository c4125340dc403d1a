package ipvs

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// service returns a Service for the frontends "10.96.0.1:80/TCP …" of a kind.
func service(t *testing.T, kind dataplane.Kind, name, frontends string, treatment dataplane.ServiceSpec) *dataplane.Service {
	t.Helper()
	key := dataplane.Key{Namespace: "default", Name: name, Kind: kind}
	var all []dataplane.Frontend
	for text := range strings.FieldsSeq(frontends) {
		addr, protocol, _ := strings.Cut(text, "/")
		f := dataplane.Frontend{
			Protocol: map[string]dataplane.Protocol{"TCP": dataplane.TCP, "UDP": dataplane.UDP, "SCTP": dataplane.SCTP}[protocol],
			Addr:     netip.MustParseAddrPort(addr),
		}
		key.Family = dataplane.FamilyOf(f.Addr.Addr())
		all = append(all, f)
	}
	s, err := dataplane.NewService(key, all, treatment)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func endpointsAt(addrs ...string) []dataplane.Endpoint {
	var all []dataplane.Endpoint
	for _, a := range addrs {
		all = append(all, dataplane.Endpoint{Addr: netip.MustParseAddrPort(a)})
	}
	return all
}

func newRenderer() *Dataplane { return &Dataplane{scheduler: "rr", allocator: newAddrAllocator()} }

// rendered returns the virtual servers of Services as lines, in order.
func rendered(d *Dataplane, services ...*dataplane.Service) []string {
	var lines []string
	for _, s := range services {
		d.render(s, func(sv serverKey, vs virtualServer) {
			line := fmt.Sprintf("%s %s", sv, vs.scheduler)
			if vs.flags&flagPersistent != 0 {
				line += fmt.Sprintf(" persistent %d", vs.timeout)
			}
			for _, e := range vs.endpoints {
				line += " " + e.Addr.String()
			}
			lines = append(lines, line)
		})
	}
	slices.Sort(lines)
	return lines
}

func TestRender(t *testing.T) {
	t.Parallel()
	one := dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:8080")}
	both := dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:8080", "10.0.0.2:8080"), ExternalTrafficPolicyLocal: true, LocalEndpoints: endpointsAt("10.0.0.2:8080")}
	for _, tt := range []struct {
		name string
		*dataplane.Service
		want []string
	}{
		{
			"a cluster IP is its own", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP", one),
			[]string{"10.96.0.1:80/TCP rr 10.0.0.1:8080"},
		},
		{
			"each of several cluster IPs is", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP 10.96.0.2:80/TCP", one),
			[]string{"10.96.0.1:80/TCP rr 10.0.0.1:8080", "10.96.0.2:80/TCP rr 10.0.0.1:8080"},
		},
		{
			"without endpoints as well", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP", dataplane.ServiceSpec{}),
			[]string{"10.96.0.1:80/TCP rr"},
		},
		{
			"a node port has one whatever the addresses", service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", one),
			[]string{"250.29.0.1:30080/TCP rr 10.0.0.1:8080"},
		},
		{
			"local endpoints have their own", service(t, dataplane.NodePort, "web", "0.0.0.0:30080/UDP", both),
			[]string{"250.29.0.3:30080/UDP rr 10.0.0.1:8080 10.0.0.2:8080", "250.29.0.4:30080/UDP rr 10.0.0.2:8080"},
		},
		{
			"an IPv6 node port", service(t, dataplane.NodePort, "web", "[::]:30080/SCTP", dataplane.ServiceSpec{}),
			[]string{"[fdfa:1d00::5]:30080/SCTP rr"},
		},
		{
			"affinity is persistence", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP",
				dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:8080"), Affinity: 3 * time.Hour}),
			[]string{"10.96.0.1:80/TCP rr persistent 10800 10.0.0.1:8080"},
		},
		{
			"a scheduler of its own", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP",
				dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:8080"), Scheduler: "lc"}),
			[]string{"10.96.0.1:80/TCP lc 10.0.0.1:8080"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := rendered(newRenderer(), tt.Service); !slices.Equal(got, tt.want) {
				t.Errorf("virtual servers\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

// The frontends of external addresses share virtual servers, one for each list and
// protocol, at an internal address.
func TestRenderExternalAddresses(t *testing.T) {
	t.Parallel()
	d := newRenderer()
	s := service(t, dataplane.LoadBalancer, "web", "192.0.2.1:80/TCP 192.0.2.2:80/TCP 192.0.2.2:80/UDP",
		dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80"), ExternalTrafficPolicyLocal: true})
	found := map[serverKey]int{}
	d.render(s, func(sv serverKey, vs virtualServer) { found[sv] = len(vs.endpoints) })
	cluster, local := d.VirtualServers(s)
	want := map[serverKey]int{
		{dataplane.TCP, cluster}: 1, {dataplane.UDP, cluster}: 1, {dataplane.TCP, local}: 0, {dataplane.UDP, local}: 0,
	}
	if !maps.Equal(found, want) || cluster == local {
		t.Errorf("virtual servers %v, want %v", found, want)
	}
	for addr := range found {
		if !isInternal(addr.addr.Addr()) {
			t.Errorf("%s is not internal", addr)
		}
	}
	if again, _ := newRenderer().VirtualServers(s); again != cluster {
		t.Errorf("after a restart it is at %s, before at %s", again, cluster)
	}
}

// A node port keeps its address when another Service gets it, even in the same call,
// so that a restart finds it there.
func TestNodePortAddressIsStable(t *testing.T) {
	t.Parallel()
	p := newAddrAllocator()
	old := service(t, dataplane.NodePort, "old", "0.0.0.0:30080/TCP", dataplane.ServiceSpec{})
	renamed := service(t, dataplane.NodePort, "renamed", "0.0.0.0:30080/TCP", dataplane.ServiceSpec{})
	moved := service(t, dataplane.NodePort, "old", "0.0.0.0:30081/TCP", dataplane.ServiceSpec{})
	for range 2 {
		for _, tt := range []struct {
			*dataplane.Service
			want string
		}{{old, "250.29.0.1:30080"}, {renamed, "250.29.0.1:30080"}, {moved, "250.29.0.1:30081"}} {
			if got := p.allocate(tt.Service, clusterEndpoints); got.String() != tt.want {
				t.Errorf("%s is at %s, want %s", tt.Key, got, tt.want)
			}
		}
		p.release(old, moved)
	}
}

// No two lists have the same address, whoever comes first, and those who go leave
// theirs to others.
func TestAllocatorConflict(t *testing.T) {
	t.Parallel()
	p := newAddrAllocator()
	s := service(t, dataplane.ExternalIP, "web", "192.0.2.1:80/TCP", dataplane.ServiceSpec{})
	first := preferredAddr(s, clusterEndpoints)
	other := addrOwner{key: dataplane.Key{Name: "other"}, preferred: first}
	p.owners[first] = other
	next := p.allocate(s, clusterEndpoints)
	if next.Addr() != first.Addr() || next == first {
		t.Errorf("it is at %s, want the next to %s", next, first)
	}
	delete(p.owners, first)
	if got := p.allocate(s, clusterEndpoints); got != next {
		t.Errorf("it has moved to %s when the other went", got)
	}
	p.release(s, nil)
	if got := p.allocate(s, clusterEndpoints); got != first {
		t.Errorf("when it comes back it is at %s, want %s", got, first)
	}
	changed := service(t, dataplane.ExternalIP, "web", "192.0.2.2:80/TCP", dataplane.ServiceSpec{})
	p.release(s, changed)
	if got := p.allocate(changed, clusterEndpoints); got != first {
		t.Errorf("at another frontend it is at %s, want %s", got, first)
	}
	p.release(changed, nil)
	if len(p.owners) != 0 || len(p.displaced) != 0 {
		t.Errorf("addresses are left: %v %v", p.owners, p.displaced)
	}
}

// Ten thousand Services of a kind rarely meet.
func TestAllocatorSpread(t *testing.T) {
	t.Parallel()
	for _, frontend := range []string{"192.0.2.1:443/TCP", "[2001:db8::1]:443/TCP"} {
		p := newAddrAllocator()
		for i := range 10_000 {
			s := service(t, dataplane.LoadBalancer, fmt.Sprintf("web-%d", i), frontend, dataplane.ServiceSpec{})
			addr := p.allocate(s, clusterEndpoints)
			if b := addr.Addr().AsSlice(); !isInternal(addr.Addr()) || addr.Port() == 0 || b[len(b)-2] == 0 {
				t.Fatalf("%s is at %s", s.Key, addr)
			}
		}
		if len(p.owners) != 10_000 || len(p.displaced) > 10 {
			t.Errorf("%d addresses, of which %d were taken at first", len(p.owners), len(p.displaced))
		}
	}
}

func TestExcludedClusterIPs(t *testing.T) {
	t.Parallel()
	d := newRenderer()
	d.excludeCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.1.0/24")}
	for _, tt := range []struct {
		kind     dataplane.Kind
		frontend string
		refused  bool
	}{
		{dataplane.ClusterIP, "10.96.0.1:80/TCP", false},
		{dataplane.ClusterIP, "10.96.1.1:80/TCP", true},
		{dataplane.ExternalIP, "10.96.1.1:80/TCP", false}, // its virtual server is elsewhere
	} {
		if err := d.checkSupported(service(t, tt.kind, "web", tt.frontend, dataplane.ServiceSpec{})); (err != nil) != tt.refused {
			t.Errorf("%s %s: error %v, want one: %t", tt.kind, tt.frontend, err, tt.refused)
		}
	}
}
