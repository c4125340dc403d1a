package manifest

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/types"
)

// TestFailedServiceFollowsPods checks that a Service whose change failed keeps the
// endpoints of its delivered version up to date.
func TestFailedServiceFollowsPods(t *testing.T) {
	t.Parallel()
	withSelector := func(app, more string) string {
		return strings.Replace(serviceYAML("a", more), "{app: a}", "{app: "+app+"}", 1)
	}
	m := newTestModel(t)
	p1, p2, p3 := podYAML("p1", "x", "10.0.0.1", ""), podYAML("p2", "x", "10.0.0.2", ""), podYAML("p3", "x", "10.0.0.3", "")
	for _, step := range []struct {
		name, file, text string
		want             []string
	}{
		{"another Service", "b.yaml", serviceYAML("b", "clusterIP: 10.96.0.9"), []string{"default/b ClusterIP 10.96.0.9 :80->8080/TCP"}},
		{"the Service", "a.yaml", withSelector("x", "clusterIP: 10.96.0.8"), []string{"default/a ClusterIP 10.96.0.8 :80->8080/TCP"}},
		{"its pods", "pods.yaml", p1 + p2, []string{"default/a IPv4 :8080/TCP 10.0.0.1(here,ready,serving) 10.0.0.2(here,ready,serving)"}},
		{"a change that fails", "a.yaml", withSelector("y", "clusterIP: 10.96.0.9"), nil},
		{"a removed pod", "pods.yaml", p2, []string{"default/a IPv4 :8080/TCP 10.0.0.2(here,ready,serving)"}},
		{"an added pod", "pods.yaml", p2 + p3, []string{"default/a IPv4 :8080/TCP 10.0.0.2(here,ready,serving) 10.0.0.3(here,ready,serving)"}},
		{"a pod in another namespace", "more.yaml", strings.Replace(p1, "name: p1", "name: p1\n  namespace: shop", 1), nil},
	} {
		d := m.update(map[string]*parsedFile{step.file: parseFile(step.file, []byte(step.text))})
		if diff := cmp.Diff(step.want, summarize(d)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, diff)
		}
	}
	want := "a.yaml:8: spec.clusterIP: 10.96.0.9 is already the address of Service default/b: change one of them"
	if got := m.errors().Error(); got != want {
		t.Errorf("errors\n%s\nwant\n%s", got, want)
	}
}

// TestObjectMovedFromUnreadableFile checks that an object kept from an unreadable file
// yields to a readable one in another file.
func TestObjectMovedFromUnreadableFile(t *testing.T) {
	t.Parallel()
	const (
		k77        = "default/k ClusterIP 10.96.0.77 :80->8080/TCP"
		k78        = "default/k ClusterIP 10.96.0.78 :80->8080/TCP"
		unreadable = "a.yaml:1: not YAML: did not find expected node content: correct this line or one before it"
	)
	in77, in78 := serviceYAML("k", "clusterIP: 10.96.0.77"), serviceYAML("k", "clusterIP: 10.96.0.78")
	m := newTestModel(t)
	for _, step := range []struct {
		name, file, text string
		want             []string
		errs             string
	}{
		{"a Service", "a.yaml", in77, []string{k77}, ""},
		{"its file is unreadable", "a.yaml", "a: [", nil, unreadable},
		{"it is in another file", "b.yaml", in78, []string{k78}, unreadable},
		{"the file is still unreadable", "a.yaml", "a: [\n", nil, unreadable},
		{"both files are unreadable, nothing changes", "b.yaml", "a: [", nil, unreadable + "\n" + strings.Replace(unreadable, "a.y", "b.y", 1)},
		{"the other file is readable again", "b.yaml", in78, nil, unreadable},
		{"the file is readable and has it", "a.yaml", in77, []string{k77}, "b.yaml:4: metadata.name: Service default/k is also in a.yaml, line 2, which is used: remove or rename one of them"},
		{
			"it is identified but invalid, so it is in two files", "a.yaml", strings.Replace(in77, "clusterIP: 10", "clusterIP: x", 1), nil,
			"a.yaml:8: spec.clusterIP: \"x.96.0.77\" is not an IP address: use an address such as 10.96.0.10 or fd00::10\n" +
				"b.yaml:4: metadata.name: Service default/k is also in a.yaml, line 2, which is used: remove or rename one of them",
		},
		{"the file is readable and does not have it", "a.yaml", "", []string{k78}, ""},
	} {
		d := m.update(map[string]*parsedFile{step.file: parseFile(step.file, []byte(step.text))})
		if diff := cmp.Diff(step.want, summarize(d)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, diff)
		}
		if diff := cmp.Diff(step.errs, m.errors().Error()); diff != "" {
			t.Errorf("%s: errors (-want +got):\n%s", step.name, diff)
		}
	}
	if len(m.retained) > 0 {
		t.Errorf("all files are readable but these objects are retained: %v", m.retained)
	}
}

// TestAddressRollback checks that a failed Service keeps its addresses, that no other
// Service gets them in the same update, and that all errors are correct.
func TestAddressRollback(t *testing.T) {
	t.Parallel()
	short := strings.NewReplacer("10.0.0.", ".", "fd00::", "::", " ", "+")
	long := func(addr string) string {
		return strings.Replace(strings.Replace(addr, ".", "10.0.0.", 1), "::", "fd00::", 1)
	}
	// spec returns the fields that request an address: .5, ::5, .5+::5, v6 for any IPv6
	// address, or nothing for any address of the default family.
	spec := func(addr string) string {
		first, second, both := strings.Cut(addr, "+")
		switch {
		case addr == "":
			return ""
		case addr == "v6":
			return "ipFamilies: [IPv6]"
		case both:
			return "ipFamilyPolicy: RequireDualStack\nclusterIP: " + long(first) + "\nclusterIPs: ['" + long(first) + "', '" + long(second) + "']"
		default:
			return "clusterIP: " + long(addr)
		}
	}
	type step struct {
		services string // names and requested addresses; "" allocates one
		want     string
		errs     string // the owner of the address for each failed Service
	}
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"a Service requests the address that a failed one keeps", []step{
			{"a=.5 c=.6", "a=.5 c=.6", ""},
			{"a=.6 b=.5 c=.6", "a=.5 c=.6", "a:.6 of c, b:.5 of a"},
			{"a=.7 b=.5 c=.6", "a=.7 b=.5 c=.6", ""},
			{"a=.7 b=.5 c=.6 d=.5", "a=.7 b=.5 c=.6", "d:.5 of b"},
		}},
		{"an earlier Service requests it", []step{
			{"a=.5 c=.6", "a=.5 c=.6", ""},
			{"0=.5 a=.6 c=.6", "a=.5 c=.6", "0:.5 of a, a:.6 of c"},
			{"0=.5 a=.4 c=.6", "0=.5 a=.4 c=.6", ""},
		}},
		{"a chain of requests", []step{
			{"a=.1 b=.2 c=.3 d=.4", "a=.1 b=.2 c=.3 d=.4", ""},
			{"a=.2 b=.3 c=.4 d=.4", "a=.1 b=.2 c=.3 d=.4", "a:.2 of b, b:.3 of c, c:.4 of d"},
			{"a=.2 b=.3 c=.4 d=.1", "a=.2 b=.3 c=.4 d=.1", ""},
		}},
		{"the first of two requests succeeds", []step{
			{"a=.1 b=.2", "a=.1 b=.2", ""},
			{"a=.3 b=.3", "a=.3 b=.2", "b:.3 of a"},
			{"b=.3", "b=.3", ""},
		}},
		{"the second request succeeds after the first one fails", []step{
			{"b=.2 c=::1 e=.4", "b=.2 c=::1 e=.4", ""},
			{"a=.3+::1 b=.3 c=.4 e=.4", "b=.3 c=::1 e=.4", "a:.3 of b, c:.4 of e"},
			{"a=.3+::1 b=.3 c=.5 e=.4", "b=.3 c=.5 e=.4", "a:.3 of b"},
			{"a=.3+::1 c=.5 e=.4", "a=.3+::1 c=.5 e=.4", ""},
		}},
		{"no free address for a Service that releases its own", []step{
			{"a=.1 b=.2 p=::1 q=::2", "a=.1 b=.2 p=::1 q=::2", ""},
			{"a=v6 b=.1 p=::1 q=::2", "a=.1 b=.2 p=::1 q=::2", "a:none, b:.1 of a"},
			{"a=v6 b=.1 p=::1", "a=::2 b=.1 p=::1", ""},
		}},
		{"an allocated address is returned, and another is allocated", []step{
			{"a=.1 p=::1 q=::2", "a=.1 p=::1 q=::2", ""},
			{"a=v6 b= c= p=::1 q=::2", "a=.1 b=.2 p=::1 q=::2", "a:none, c:none"},
			{"a=v6 b= c= p=::1", "a=::2 b=.2 c=.1 p=::1", ""},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			// The networks have the addresses .1, .2, ::1 and ::2.
			addrs, err := newAddressAllocator([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/30"), netip.MustParsePrefix("fd00::/126")})
			if err != nil {
				t.Fatal(err)
			}
			m := newModel("here", addrs)
			have := map[string]string{}
			for i, step := range tt.steps {
				var file string
				for word := range strings.FieldsSeq(step.services) {
					name, addr, _ := strings.Cut(word, "=")
					file += serviceYAML("s"+name, spec(addr))
				}
				d := m.update(map[string]*parsedFile{"x.yaml": parseFile("x.yaml", []byte(file))})
				for _, name := range d.DeletedServices {
					delete(have, name.Name)
				}
				maps.Copy(have, clusterIPsByName(d))
				var got []string
				owners := map[netip.Addr]types.NamespacedName{}
				for _, name := range slices.Sorted(maps.Keys(have)) {
					for text := range strings.FieldsSeq(have[name]) {
						owners[netip.MustParseAddr(text)] = types.NamespacedName{Namespace: "default", Name: name}
					}
					got = append(got, name[1:]+"="+short.Replace(have[name]))
				}
				if diff := cmp.Diff(step.want, strings.Join(got, " ")); diff != "" {
					t.Errorf("step %d: addresses (-want +got):\n%s", i+1, diff)
				}
				if !maps.Equal(owners, addrs.owners) {
					t.Errorf("step %d: delivered %v, allocated %v", i+1, owners, addrs.owners)
				}
				var errs []string
				for _, name := range sortedNames(m.failedServices) {
					text := m.failedServices[name].Message
					if addr, rest, ok := strings.Cut(text, " is already the address of Service default/s"); ok {
						owner, _, _ := strings.Cut(rest, ":")
						errs = append(errs, name.Name[1:]+":"+short.Replace(addr)+" of "+owner)
					} else if strings.HasPrefix(text, "no free address") {
						errs = append(errs, name.Name[1:]+":none")
					} else {
						errs = append(errs, text)
					}
				}
				if diff := cmp.Diff(step.errs, strings.Join(errs, ", ")); diff != "" {
					t.Errorf("step %d: errors (-want +got):\n%s", i+1, diff)
				}
				if len(m.errors()) != len(errs) {
					t.Errorf("step %d: other errors: %v", i+1, m.errors())
				}
			}
		})
	}
}
