package manifest

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestFailedServiceFollowsItsPods says that a Service that stays as it was
// because its change failed goes on with the Pods that it selected then.
func TestFailedServiceFollowsItsPods(t *testing.T) {
	t.Parallel()
	withSelector := func(app, more string) string {
		return strings.Replace(service("a", more), "{app: a}", "{app: "+app+"}", 1)
	}
	m := newTestModel(t)
	p1, p2, p3 := pod("p1", "x", "10.0.0.1", ""), pod("p2", "x", "10.0.0.2", ""), pod("p3", "x", "10.0.0.3", "")
	for _, step := range []struct {
		name, file, text string
		want             []string
	}{
		{"another Service", "b.yaml", service("b", "clusterIP: 10.96.0.9"), []string{"default/b ClusterIP 10.96.0.9 :80->8080/TCP"}},
		{"the Service", "a.yaml", withSelector("x", "clusterIP: 10.96.0.8"), []string{"default/a ClusterIP 10.96.0.8 :80->8080/TCP"}},
		{"its pods", "pods.yaml", p1 + p2, []string{"default/a IPv4 :8080/TCP 10.0.0.1(here,ready,serving) 10.0.0.2(here,ready,serving)"}},
		{"a change that fails", "a.yaml", withSelector("y", "clusterIP: 10.96.0.9"), nil},
		{"a pod less", "pods.yaml", p2, []string{"default/a IPv4 :8080/TCP 10.0.0.2(here,ready,serving)"}},
		{"a pod more", "pods.yaml", p2 + p3, []string{"default/a IPv4 :8080/TCP 10.0.0.2(here,ready,serving) 10.0.0.3(here,ready,serving)"}},
		{"a pod in another namespace", "more.yaml", strings.Replace(p1, "name: p1", "name: p1\n  namespace: shop", 1), nil},
	} {
		d := m.update(map[string]*parsed{step.file: parse(step.file, []byte(step.text))})
		if diff := cmp.Diff(step.want, summary(d)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, diff)
		}
	}
	want := "a.yaml:8: spec.clusterIP: 10.96.0.9 is already the address of Service default/b: give one of them another address"
	if got := m.errors().Error(); got != want {
		t.Errorf("errors\n%s\nwant\n%s", got, want)
	}
}

// TestMovedOutOfAnUnreadableFile says that what was kept of a file that cannot be
// read gives way to what can be read elsewhere.
func TestMovedOutOfAnUnreadableFile(t *testing.T) {
	t.Parallel()
	const (
		k77        = "default/k ClusterIP 10.96.0.77 :80->8080/TCP"
		k78        = "default/k ClusterIP 10.96.0.78 :80->8080/TCP"
		unreadable = "a.yaml:1: not YAML: did not find expected node content: correct this line or one before it"
	)
	in77, in78 := service("k", "clusterIP: 10.96.0.77"), service("k", "clusterIP: 10.96.0.78")
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
		d := m.update(map[string]*parsed{step.file: parse(step.file, []byte(step.text))})
		if diff := cmp.Diff(step.want, summary(d)); diff != "" {
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
