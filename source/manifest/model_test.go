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
