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

// TestFailedServiceFollowsPods says that a Service that stays as it was
// because its change failed goes on with the Pods that it selected then.
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
		{"a pod less", "pods.yaml", p2, []string{"default/a IPv4 :8080/TCP 10.0.0.2(here,ready,serving)"}},
		{"a pod more", "pods.yaml", p2 + p3, []string{"default/a IPv4 :8080/TCP 10.0.0.2(here,ready,serving) 10.0.0.3(here,ready,serving)"}},
		{"a pod in another namespace", "more.yaml", strings.Replace(p1, "name: p1", "name: p1\n  namespace: shop", 1), nil},
	} {
		d := m.update(map[string]*parsedFile{step.file: parseFile(step.file, []byte(step.text))})
		if diff := cmp.Diff(step.want, summarize(d)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, diff)
		}
	}
	want := "a.yaml:8: spec.clusterIP: 10.96.0.9 is already the address of Service default/b: give one of them another address"
	if got := m.errors().Error(); got != want {
		t.Errorf("errors\n%s\nwant\n%s", got, want)
	}
}

// TestObjectMovedFromUnreadableFile says that what was kept of a file that cannot be
// read gives way to what can be read elsewhere.
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
		{"its file cannot be read", "a.yaml", "a: [", nil, unreadable},
		{"it is in another file", "b.yaml", in78, []string{k78}, unreadable},
		{"the file is read again, and still cannot be", "a.yaml", "a: [\n", nil, unreadable},
		{"neither can be read, so nothing changes", "b.yaml", "a: [", nil, unreadable + "\n" + strings.Replace(unreadable, "a.y", "b.y", 1)},
		{"it can be read again in the other file", "b.yaml", in78, nil, unreadable},
		{"the file can be read and has it", "a.yaml", in77, []string{k77}, "b.yaml:4: metadata.name: Service default/k is also in a.yaml, line 2, and that one is used: remove or rename one of them"},
		{
			"it can be named but not be read, so it is in two files", "a.yaml", strings.Replace(in77, "clusterIP: 10", "clusterIP: x", 1), nil,
			"a.yaml:8: spec.clusterIP: \"x.96.0.77\" is not an IP address: use an address such as 10.96.0.10 or fd00::10\n" +
				"b.yaml:4: metadata.name: Service default/k is also in a.yaml, line 2, and that one is used: remove or rename one of them",
		},
		{"the file can be read and does not have it", "a.yaml", "", []string{k78}, ""},
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
		t.Errorf("all files can be read, and this is kept: %v", m.retained)
	}
}

// TestAddressRollback says that a Service that fails keeps its addresses,
// that no other gets them in the same change, and that all errors are true.
func TestAddressRollback(t *testing.T) {
	t.Parallel()
	short := strings.NewReplacer("10.0.0.", ".", "fd00::", "::", " ", "+")
	long := func(addr string) string {
		return strings.Replace(strings.Replace(addr, ".", "10.0.0.", 1), "::", "fd00::", 1)
	}
	// spec returns the fields that ask for an address: .5, ::5, .5+::5, v6 for
	// any IPv6 address, nothing for any of the default family.
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
		services string // names and addresses, "" for one to be given
		want     string
		errs     string // of each Service that failed, who has the address
	}
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"a Service wants what one that fails goes back to", []step{
			{"a=.5 c=.6", "a=.5 c=.6", ""},
			{"a=.6 b=.5 c=.6", "a=.5 c=.6", "a:.6 of c, b:.5 of a"},
			{"a=.7 b=.5 c=.6", "a=.7 b=.5 c=.6", ""},
			{"a=.7 b=.5 c=.6 d=.5", "a=.7 b=.5 c=.6", "d:.5 of b"},
		}},
		{"one that comes first wants it", []step{
			{"a=.5 c=.6", "a=.5 c=.6", ""},
			{"0=.5 a=.6 c=.6", "a=.5 c=.6", "0:.5 of a, a:.6 of c"},
			{"0=.5 a=.4 c=.6", "0=.5 a=.4 c=.6", ""},
		}},
		{"a row of them", []step{
			{"a=.1 b=.2 c=.3 d=.4", "a=.1 b=.2 c=.3 d=.4", ""},
			{"a=.2 b=.3 c=.4 d=.4", "a=.1 b=.2 c=.3 d=.4", "a:.2 of b, b:.3 of c, c:.4 of d"},
			{"a=.2 b=.3 c=.4 d=.1", "a=.2 b=.3 c=.4 d=.1", ""},
		}},
		{"the first of two gets it", []step{
			{"a=.1 b=.2", "a=.1 b=.2", ""},
			{"a=.3 b=.3", "a=.3 b=.2", "b:.3 of a"},
			{"b=.3", "b=.3", ""},
		}},
		{"the second of two gets what the first cannot have after all", []step{
			{"b=.2 c=::1 e=.4", "b=.2 c=::1 e=.4", ""},
			{"a=.3+::1 b=.3 c=.4 e=.4", "b=.3 c=::1 e=.4", "a:.3 of b, c:.4 of e"},
			{"a=.3+::1 b=.3 c=.5 e=.4", "b=.3 c=.5 e=.4", "a:.3 of b"},
			{"a=.3+::1 c=.5 e=.4", "a=.3+::1 c=.5 e=.4", ""},
		}},
		{"none is left for one that gives its own up", []step{
			{"a=.1 b=.2 p=::1 q=::2", "a=.1 b=.2 p=::1 q=::2", ""},
			{"a=v6 b=.1 p=::1 q=::2", "a=.1 b=.2 p=::1 q=::2", "a:none, b:.1 of a"},
			{"a=v6 b=.1 p=::1", "a=::2 b=.1 p=::1", ""},
		}},
		{"what was given goes back, and another is given", []step{
			{"a=.1 p=::1 q=::2", "a=.1 p=::1 q=::2", ""},
			{"a=v6 b= c= p=::1 q=::2", "a=.1 b=.2 p=::1 q=::2", "a:none, c:none"},
			{"a=v6 b= c= p=::1", "a=::2 b=.2 c=.1 p=::1", ""},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			// .1 and .2 are handed out, and ::1 and ::2.
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
				holders := map[netip.Addr]types.NamespacedName{}
				for _, name := range slices.Sorted(maps.Keys(have)) {
					for text := range strings.FieldsSeq(have[name]) {
						holders[netip.MustParseAddr(text)] = types.NamespacedName{Namespace: "default", Name: name}
					}
					got = append(got, name[1:]+"="+short.Replace(have[name]))
				}
				if diff := cmp.Diff(step.want, strings.Join(got, " ")); diff != "" {
					t.Errorf("step %d: addresses (-want +got):\n%s", i+1, diff)
				}
				if !maps.Equal(holders, addrs.owners) {
					t.Errorf("step %d: delivered %v, held %v", i+1, holders, addrs.owners)
				}
				var errs []string
				for _, name := range sortedNames(m.failedServices) {
					text := m.failedServices[name].Message
					if addr, rest, ok := strings.Cut(text, " is already the address of Service default/s"); ok {
						holder, _, _ := strings.Cut(rest, ":")
						errs = append(errs, name.Name[1:]+":"+short.Replace(addr)+" of "+holder)
					} else if strings.HasPrefix(text, "no address is left") {
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
