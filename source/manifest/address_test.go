package manifest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/kube"
)

// clusterIPsByName returns the addresses of a Delta's Services, by name.
func clusterIPsByName(d kube.Delta) map[string]string {
	out := map[string]string{}
	for _, svc := range d.Services {
		out[svc.Name] = strings.Join(svc.Spec.ClusterIPs, " ")
	}
	return out
}

// TestAddressesAreStable pins the allocated addresses: a version that allocates others
// would change the address of every Service at its first start.
func TestAddressesAreStable(t *testing.T) {
	t.Parallel()
	dual := func(name, policy string) string { return serviceYAML(name, "ipFamilyPolicy: "+policy) }
	tests := []struct {
		name  string
		cidrs []netip.Prefix
		file  string
		want  map[string]string
	}{
		{"one family", oneCIDR, serviceYAML("backend", "") + serviceYAML("redis", ""), map[string]string{
			"backend": "10.96.130.254", "redis": "10.96.150.172",
		}},
		{"both families", bothCIDR, serviceYAML("backend", "") + dual("redis", "PreferDualStack") + dual("web", "RequireDualStack"), map[string]string{
			"backend": "10.96.130.254", "redis": "10.96.150.172 fd00:10:96::96ac", "web": "10.96.62.203 fd00:10:96::3ecb",
		}},
		{"the first network is the default family", []netip.Prefix{cidr6, cidr4}, serviceYAML("backend", "") + dual("redis", "PreferDualStack"), map[string]string{
			"backend": "fd00:10:96::82fe", "redis": "fd00:10:96::96ac 10.96.150.172",
		}},
		{"PreferDualStack accepts one family", oneCIDR, dual("redis", "PreferDualStack"), map[string]string{"redis": "10.96.150.172"}},
		{"ipFamilies selects and orders families", bothCIDR, serviceYAML("redis", "ipFamilies: [IPv6]") +
			serviceYAML("web", "ipFamilyPolicy: PreferDualStack\nipFamilies: [IPv6, IPv4]"), map[string]string{
			"redis": "fd00:10:96::96ac", "web": "fd00:10:96::3ecb 10.96.62.203",
		}},
		{"one address requested, the other allocated", bothCIDR, serviceYAML("redis", "ipFamilyPolicy: RequireDualStack\nclusterIP: fd00::7"), map[string]string{
			"redis": "fd00::7 10.96.150.172",
		}},
		{"an address requested by another Service is not allocated", oneCIDR, serviceYAML("backend", "") + serviceYAML("zzz", "clusterIP: 10.96.130.254"), map[string]string{
			"backend": "10.96.130.255", "zzz": "10.96.130.254",
		}},
		{"a large IPv6 network", []netip.Prefix{netip.MustParsePrefix("fd00:1:2:3::/48")}, serviceYAML("redis", ""), map[string]string{
			"redis": "fd00:1:2:0:ca6:1c73:e111:fd82",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d, err := Load(Options{Dir: writeFolder(t, "a.yaml", tt.file), ServiceCIDRs: tt.cidrs})
			if err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(tt.want, clusterIPsByName(d)); diff != "" {
				t.Errorf("addresses (-want +got):\n%s", diff)
			}
		})
	}
}

// TestAddressAllocationExhaustsNetwork allocates all addresses of a small network.
func TestAddressAllocationExhaustsNetwork(t *testing.T) {
	t.Parallel()
	for _, prefix := range []string{"192.0.2.0/28", "fd00::/124", "192.0.2.0/30", "0.0.0.0/28"} {
		cidr := netip.MustParsePrefix(prefix)
		addrs, err := newAddressAllocator([]netip.Prefix{cidr})
		if err != nil {
			t.Fatal(err)
		}
		family := familyOf(cidr.Addr())
		var got []netip.Addr
		for i := 0; ; i++ {
			addr, ok := addrs.allocateNext(types.NamespacedName{Namespace: "default", Name: fmt.Sprint(i)}, family)
			if !ok {
				break
			}
			got = append(got, addr)
		}
		var want []netip.Addr
		for addr := cidr.Addr().Next(); cidr.Contains(addr.Next()); addr = addr.Next() {
			want = append(want, addr)
		}
		slices.SortFunc(got, netip.Addr.Compare)
		if !slices.Equal(got, want) {
			t.Errorf("%s: allocated %v, want %v", cidr, got, want)
		}
		addrs.release(want[0], types.NamespacedName{Name: "other"})
		if addr, ok := addrs.allocateNext(types.NamespacedName{Name: "last"}, family); ok {
			t.Errorf("%s: allocated %v after a release by another Service", cidr, addr)
		}
		addrs.release(want[0], addrs.owners[want[0]])
		if addr, ok := addrs.allocateNext(types.NamespacedName{Name: "last"}, family); !ok || addr != want[0] {
			t.Errorf("%s: allocated %v, %v after a release, want %v", cidr, addr, ok, want[0])
		}
	}
}

func TestInvalidServiceCIDRs(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ cidrs, want string }{
		{"10.96.0.0/16 10.97.0.0/16", "service CIDR 10.97.0.0/16: second network of family IPv4, after 10.96.0.0/16: specify at most one per family"},
		{"10.96.0.0/31", "service CIDR 10.96.0.0/31: too small: use a larger network"},
		{"fd00::1/128", "service CIDR fd00::1/128: too small: use a larger network"},
		{"::ffff:10.96.0.0/112", "service CIDR ::ffff:10.96.0.0/112: not a network: use one such as 10.96.0.0/16 or fd00:10:96::/112"},
	} {
		var cidrs []netip.Prefix
		for text := range strings.FieldsSeq(tt.cidrs) {
			cidrs = append(cidrs, netip.MustParsePrefix(text))
		}
		if _, err := New(Options{Dir: t.TempDir(), ServiceCIDRs: cidrs}); err == nil || err.Error() != tt.want {
			t.Errorf("%s: error %v, want %s", tt.cidrs, err, tt.want)
		}
	}
}

// TestAddressUpdates checks which Service has which address as files change.
func TestAddressUpdates(t *testing.T) {
	t.Parallel()
	addrs, err := newAddressAllocator([]netip.Prefix{netip.MustParsePrefix("10.96.0.0/30")}) // .1 and .2
	if err != nil {
		t.Fatal(err)
	}
	m := newModel("here", addrs)
	have := map[string]string{}
	for _, step := range []struct {
		name, file string
		want       map[string]string
		errs       string
	}{
		{name: "two", file: serviceYAML("a", "") + serviceYAML("b", ""), want: map[string]string{"a": "10.96.0.1", "b": "10.96.0.2"}},
		{
			name: "no address for a third", file: serviceYAML("a", "") + serviceYAML("aa", "") + serviceYAML("b", ""),
			want: map[string]string{"a": "10.96.0.1", "b": "10.96.0.2"},
			errs: "x.yaml:14: spec.clusterIP: no free address: all 2 of 10.96.0.0/30 are in use: set --service-cidr to a larger network",
		},
		{name: "the third gets a released address", file: serviceYAML("aa", "") + serviceYAML("b", ""), want: map[string]string{"aa": "10.96.0.1", "b": "10.96.0.2"}},
		{
			name: "requesting another Service's address is an error, and the Service is unchanged", file: serviceYAML("aa", "clusterIP: 10.96.0.2") + serviceYAML("b", ""),
			want: map[string]string{"aa": "10.96.0.1", "b": "10.96.0.2"},
			errs: "x.yaml:8: spec.clusterIP: 10.96.0.2 is already the address of Service default/b: change one of them",
		},
		{name: "two Services swap addresses", file: serviceYAML("aa", "clusterIP: 10.96.0.2") + serviceYAML("b", "clusterIP: 10.96.0.1"), want: map[string]string{"aa": "10.96.0.2", "b": "10.96.0.1"}},
		{name: "an address is kept when it is no longer requested", file: serviceYAML("aa", "") + serviceYAML("b", ""), want: map[string]string{"aa": "10.96.0.2", "b": "10.96.0.1"}},
		{name: "a headless Service releases its address", file: serviceYAML("aa", "clusterIP: None") + serviceYAML("c", "") + serviceYAML("b", ""), want: map[string]string{"aa": "None", "b": "10.96.0.1", "c": "10.96.0.2"}},
		{name: "an address outside the network", file: serviceYAML("aa", "clusterIP: 192.0.2.1") + serviceYAML("b", ""), want: map[string]string{"aa": "192.0.2.1", "b": "10.96.0.1"}},
	} {
		d := m.update(map[string]*parsedFile{"x.yaml": parseFile("x.yaml", []byte(step.file))})
		for _, name := range d.DeletedServices {
			delete(have, name.Name)
		}
		maps.Copy(have, clusterIPsByName(d))
		if diff := cmp.Diff(step.want, have); diff != "" {
			t.Errorf("%s: addresses (-want +got):\n%s", step.name, diff)
		}
		if got := m.errors().Error(); got != step.errs {
			t.Errorf("%s: errors\n%s\nwant\n%s", step.name, got, step.errs)
		}
		if len(m.addresses.owners) != strings.Count(fmt.Sprint(have), ".")/3 || m.addresses.pools[corev1.IPv4Protocol].used > 2 {
			t.Errorf("%s: owners %v", step.name, m.addresses.owners)
		}
	}
}

// TestRandomUpdates applies random updates and compares the sum of the Deltas with a new
// model of the final files.
func TestRandomUpdates(t *testing.T) {
	t.Parallel()
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 3))
		m := newTestModel(t)
		files := map[string]string{}
		have := newMirror()
		for step := range 25 {
			changed := map[string]*parsedFile{}
			for range 1 + r.IntN(2) {
				name := fmt.Sprintf("f%d.yaml", r.IntN(4))
				if r.IntN(5) == 0 {
					delete(files, name)
					changed[name] = nil
					continue
				}
				files[name] = randomFile(r)
				changed[name] = parseFile(name, []byte(files[name]))
			}
			have.apply(t, m.update(changed))

			all := map[string]*parsedFile{}
			for name, text := range files {
				all[name] = parseFile(name, []byte(text))
			}
			fresh := newTestModel(t)
			want := newMirror()
			want.apply(t, fresh.update(all))
			if diff := cmp.Diff(want, have); diff != "" {
				t.Fatalf("seed %d, step %d (-fresh +incremental):\n%s", seed, step, diff)
			}
			if diff := cmp.Diff(fresh.errors(), m.errors()); diff != "" {
				t.Fatalf("seed %d, step %d: errors (-fresh +incremental):\n%s", seed, step, diff)
			}
			for _, sizes := range [][2]int{
				{len(fresh.podsByLabel), len(m.podsByLabel)},
				{len(fresh.servicesByLabel), len(m.servicesByLabel)},
				{len(fresh.candidates), len(m.candidates)},
				{len(fresh.allocatedAddrs), len(m.allocatedAddrs)},
				{len(fresh.generatedSlices), len(m.generatedSlices)},
				{len(fresh.addresses.owners), len(m.addresses.owners)},
			} {
				if sizes[0] != sizes[1] {
					t.Fatalf("seed %d, step %d: the incremental model has stale entries: %v", seed, step, sizes)
				}
			}
		}
	}
}

func newTestModel(t *testing.T) *model {
	t.Helper()
	addrs, err := newAddressAllocator(bothCIDR)
	if err != nil {
		t.Fatal(err)
	}
	return newModel("here", addrs)
}

// randomFile returns valid objects with few different names, so that they often refer to
// each other and are often duplicates. Their addresses do not depend on earlier files.
func randomFile(r *rand.Rand) string {
	var b strings.Builder
	for range 1 + r.IntN(4) {
		switch r.IntN(3) {
		case 0:
			n := r.IntN(3)
			b.WriteString(strings.NewReplacer(
				"targetPort: 8080", "targetPort: "+[]string{"8080", "http"}[r.IntN(2)],
				"{app: web", "{app: "+[]string{"a", "b"}[r.IntN(2)]+[]string{"", ", tier: x"}[r.IntN(2)],
			).Replace(strings.Replace(serviceYAML("web", []string{fmt.Sprintf("clusterIP: 10.96.0.%d", n), "clusterIP: None", "ipFamilies: [IPv6]"}[r.IntN(3)]),
				"name: web", fmt.Sprintf("name: web%d", n), 1)))
		case 1:
			p := podYAML(fmt.Sprintf("p%d", r.IntN(5)), []string{"a", "b"}[r.IntN(2)]+[]string{"", ", tier: x"}[r.IntN(2)],
				[]string{"10.0.0.1", "10.0.0.2", "fd01::1"}[r.IntN(3)], []string{"", "  phase: Pending", "  phase: Failed"}[r.IntN(3)])
			b.WriteString(strings.Replace(p, "8080", []string{"8080", "9090"}[r.IntN(2)], 1))
		case 2:
			fmt.Fprintf(&b, "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s%d, labels: {kubernetes.io/service-name: web%d}}\n"+
				"addressType: IPv4\nendpoints: [{addresses: [10.0.0.%d]}]\nports: [{port: 80}]\n---\n", r.IntN(2), r.IntN(3), 1+r.IntN(3))
		}
	}
	return b.String()
}

// mirror is the state of a receiver of Deltas.
type mirror struct{ Services, Slices map[string]any }

func newMirror() *mirror { return &mirror{map[string]any{}, map[string]any{}} }

func (m *mirror) apply(t *testing.T, d kube.Delta) {
	t.Helper()
	for _, name := range d.DeletedServices {
		if m.Services[name.String()] == nil {
			t.Errorf("%s is deleted but was not delivered", name)
		}
		delete(m.Services, name.String())
	}
	for _, name := range d.DeletedEndpointSlices {
		if m.Slices[name.String()] == nil {
			t.Errorf("%s is deleted but was not delivered", name)
		}
		delete(m.Slices, name.String())
	}
	for _, svc := range d.Services {
		name := types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}.String()
		if cmp.Equal(m.Services[name], any(svc)) {
			t.Errorf("%s is delivered again without a change", name)
		}
		m.Services[name] = svc
	}
	for _, slice := range d.EndpointSlices {
		name := types.NamespacedName{Namespace: slice.Namespace, Name: slice.Name}.String()
		if cmp.Equal(m.Slices[name], any(slice)) {
			t.Errorf("%s is delivered again without a change", name)
		}
		m.Slices[name] = slice
	}
}
