package manifest

import (
	"strings"
	"testing"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
)

// TestIneffectiveObjectWarnings checks the warnings about valid objects that are not part
// of a Service.
func TestIneffectiveObjectWarnings(t *testing.T) {
	t.Parallel()
	const (
		noAddress = "a.yaml:4: status.podIP: missing: a Pod without an address is not an endpoint: " +
			"write its address, or status.phase: Pending until it has one"
		noService = "a.yaml:3: metadata.labels: label kubernetes.io/service-name is missing: " +
			"set it to the name of the Service"
	)
	labelled := "apiVersion: v1\nkind: Pod\nmetadata: {name: w, labels: {app: web}}\nstatus: "
	slice := "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s%}\naddressType: IPv4\n"
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"a Pod without a status", labelled + "{}", []string{noAddress}},
		{"a running Pod", labelled + "{phase: Running}", []string{noAddress}},
		{"a pending Pod", labelled + "{phase: Pending}", nil},
		{"a succeeded Pod", labelled + "{phase: Succeeded}", nil},
		{"a Pod with an address", labelled + "{podIP: 10.0.0.1}", nil},
		{"a Pod with addresses", labelled + "{podIPs: [{ip: 10.0.0.1}]}", nil},
		{"a Pod without labels", "apiVersion: v1\nkind: Pod\nmetadata: {name: w}\n", nil},
		{"a slice without labels", strings.Replace(slice, "%", "", 1), []string{noService}},
		{"a slice with another label", strings.Replace(slice, "%", ", labels: {app: web}", 1), []string{noService}},
		{"a slice with the label", strings.Replace(slice, "%", ", labels: {kubernetes.io/service-name: web}", 1), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := parseFile("a.yaml", []byte(tt.text))
			if len(p.errs) > 0 {
				t.Fatalf("errors: %v", p.errs)
			}
			var got []string
			for _, err := range p.warnings {
				got = append(got, err.Error())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("warnings (-want +got):\n%s", diff)
			}
		})
	}
}

func TestWarningsAreLoggedOnce(t *testing.T) {
	t.Parallel()
	ineffectivePod := "apiVersion: v1\nkind: Pod\nmetadata: {name: w, labels: {app: web}}\n---\n"
	w := startSource(t, writeFolder(t, "a.yaml", ineffectivePod))
	w.firstDelta()
	w.expectLog(`level=WARN msg="object has no effect" file=a.yaml reason="a.yaml:1: status.podIP: missing`)
	writeFile(t, w.dir, "a.yaml", ineffectivePod+serviceYAML("web", "clusterIP: 10.96.0.1"))
	w.expectDeltas("a change of another object in the file", web1)
	if n := strings.Count(w.logged.String(), "has no effect"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, w.logged)
	}
}

// TestFolderRemovalIsRemembered sends another event of the folder after its removal.
func TestFolderRemovalIsRemembered(t *testing.T) {
	t.Parallel()
	s := &Source{opts: Options{Dir: "/manifests"}}
	for _, op := range []fsnotify.Op{fsnotify.Remove, fsnotify.Rename} {
		next := pendingReads{files: map[string]bool{}}
		s.addEvent(&next, fsnotify.Event{Name: "/manifests", Op: op})
		s.addEvent(&next, fsnotify.Event{Name: "/manifests", Op: fsnotify.Chmod})
		if !next.folderRemoved {
			t.Errorf("%v and a later event: folderRemoved is false", op)
		}
	}
}
