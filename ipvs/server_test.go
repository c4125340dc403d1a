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

// service returns a Service of the given kind. frontends is a list such as "10.96.0.1:80/TCP".
func service(t *testing.T, kind dataplane.Kind, name, frontends string, spec dataplane.ServiceSpec) *dataplane.Service {
	t.Helper()
	key := dataplane.Key{Namespace: "default", Name: name, Kind: kind}
	var fs []dataplane.Frontend
	for text := range strings.FieldsSeq(frontends) {
		addr, protocol, _ := strings.Cut(text, "/")
		f := dataplane.Frontend{
			Protocol: map[string]dataplane.Protocol{"TCP": dataplane.TCP, "UDP": dataplane.UDP, "SCTP": dataplane.SCTP}[protocol],
			Addr:     netip.MustParseAddrPort(addr),
		}
		key.Family = dataplane.FamilyOf(f.Addr.Addr())
		fs = append(fs, f)
	}
	s, err := dataplane.NewService(key, fs, spec)
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

// rendered returns the virtual servers of Services as sorted lines.
func rendered(d *Dataplane, services ...*dataplane.Service) []string {
	var lines []string
	for _, s := range services {
		d.render(s, func(sv serverKey, vs virtualServer) {
			line := fmt.Sprintf("%s %s", sv, vs.scheduler)
			if vs.flags&flagPersistent != 0 {
				line += fmt.Sprintf(" persistent %d", vs.timeout)
			}
			if vs.flags&flagSched1 != 0 {
				line += " fallback"
			}
			if vs.flags&flagSched2 != 0 {
				line += " mh-port"
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
			"cluster IP", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP", one),
			[]string{"10.96.0.1:80/TCP rr 10.0.0.1:8080"},
		},
		{
			"several cluster IPs", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP 10.96.0.2:80/TCP", one),
			[]string{"10.96.0.1:80/TCP rr 10.0.0.1:8080", "10.96.0.2:80/TCP rr 10.0.0.1:8080"},
		},
		{
			"no endpoints", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP", dataplane.ServiceSpec{}),
			[]string{"10.96.0.1:80/TCP rr"},
		},
		{
			"node port", service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", one),
			[]string{"250.29.0.1:30080/TCP rr 10.0.0.1:8080"},
		},
		{
			"local endpoints", service(t, dataplane.NodePort, "web", "0.0.0.0:30080/UDP", both),
			[]string{"250.29.0.3:30080/UDP rr 10.0.0.1:8080 10.0.0.2:8080", "250.29.0.4:30080/UDP rr 10.0.0.2:8080"},
		},
		{
			"IPv6 node port", service(t, dataplane.NodePort, "web", "[::]:30080/SCTP", dataplane.ServiceSpec{}),
			[]string{"[fdfa:1d00::5]:30080/SCTP rr"},
		},
		{
			"session affinity", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP",
				dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:8080"), Affinity: 3 * time.Hour}),
			[]string{"10.96.0.1:80/TCP rr persistent 10800 10.0.0.1:8080"},
		},
		{
			"scheduler of the Service", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP",
				dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:8080"), Scheduler: "lc"}),
			[]string{"10.96.0.1:80/TCP lc 10.0.0.1:8080"},
		},
		{
			"Maglev hashes the client's port as well, as with kube-proxy", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP",
				dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:8080"), Scheduler: "mh"}),
			[]string{"10.96.0.1:80/TCP mh fallback mh-port 10.0.0.1:8080"},
		},
		{
			"source hashing uses other endpoints while one drains", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP",
				dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:8080"), Scheduler: "sh"}),
			[]string{"10.96.0.1:80/TCP sh fallback 10.0.0.1:8080"},
		},
		{
			"a source hash is of the client's address only", service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP",
				dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:8080"), Scheduler: dataplane.SourceHash}),
			[]string{"10.96.0.1:80/TCP mh fallback 10.0.0.1:8080"},
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

// TestRenderExternalAddresses checks that external addresses share virtual servers at an
// internal address, one for each endpoint list and protocol.
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
		t.Errorf("after a restart the address is %s, before %s", again, cluster)
	}
}

// TestNodePortAddressIsStable checks that a node port keeps its internal address when another
// Service gets it, even in the same Apply, so that it is the same after a restart.
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
				t.Errorf("address of %s is %s, want %s", tt.Key, got, tt.want)
			}
		}
		p.release(old, moved)
	}
}

// TestAllocatorConflict checks that no two endpoint lists have the same address, in any order,
// and that released addresses are available again.
func TestAllocatorConflict(t *testing.T) {
	t.Parallel()
	p := newAddrAllocator()
	s := service(t, dataplane.ExternalIP, "web", "192.0.2.1:80/TCP", dataplane.ServiceSpec{})
	first := preferredAddr(s, clusterEndpoints)
	other := addrOwner{key: dataplane.Key{Name: "other"}, preferred: first}
	p.owners[first] = other
	next := p.allocate(s, clusterEndpoints)
	if next.Addr() != first.Addr() || next == first {
		t.Errorf("address %s, want the next port after %s", next, first)
	}
	delete(p.owners, first)
	if got := p.allocate(s, clusterEndpoints); got != next {
		t.Errorf("the address changed to %s after the other was released", got)
	}
	p.release(s, nil)
	if got := p.allocate(s, clusterEndpoints); got != first {
		t.Errorf("when added again the address is %s, want %s", got, first)
	}
	changed := service(t, dataplane.ExternalIP, "web", "192.0.2.2:80/TCP", dataplane.ServiceSpec{})
	p.release(s, changed)
	if got := p.allocate(changed, clusterEndpoints); got != first {
		t.Errorf("with another frontend the address is %s, want %s", got, first)
	}
	p.release(changed, nil)
	if len(p.owners) != 0 || len(p.displaced) != 0 {
		t.Errorf("addresses not released: %v %v", p.owners, p.displaced)
	}
}

// TestAllocatorSpread checks that the preferred addresses of 10,000 Services rarely conflict.
func TestAllocatorSpread(t *testing.T) {
	t.Parallel()
	for _, frontend := range []string{"192.0.2.1:443/TCP", "[2001:db8::1]:443/TCP"} {
		p := newAddrAllocator()
		for i := range 10_000 {
			s := service(t, dataplane.LoadBalancer, fmt.Sprintf("web-%d", i), frontend, dataplane.ServiceSpec{})
			addr := p.allocate(s, clusterEndpoints)
			if b := addr.Addr().AsSlice(); !isInternal(addr.Addr()) || addr.Port() == 0 || b[len(b)-2] == 0 {
				t.Fatalf("invalid address of %s: %s", s.Key, addr)
			}
		}
		if len(p.owners) != 10_000 || len(p.displaced) > 10 {
			t.Errorf("%d addresses, %d of them not preferred", len(p.owners), len(p.displaced))
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
		{dataplane.ExternalIP, "10.96.1.1:80/TCP", false}, // its virtual server has an internal address
	} {
		if err := d.checkSupported(service(t, tt.kind, "web", tt.frontend, dataplane.ServiceSpec{})); (err != nil) != tt.refused {
			t.Errorf("%s %s: error %v, want one: %t", tt.kind, tt.frontend, err, tt.refused)
		}
	}
}

// TestSchedulerOf checks that Read returns the scheduler that was programmed.
func TestSchedulerOf(t *testing.T) {
	t.Parallel()
	for _, name := range append(Schedulers(), dataplane.SourceHash) {
		set := settingsFor(&dataplane.Service{ServiceSpec: dataplane.ServiceSpec{Scheduler: name, Affinity: time.Hour}}, DefaultScheduler)
		if got := schedulerOf(set); got != name {
			t.Errorf("scheduler %s is read as %s", name, got)
		}
	}
}
