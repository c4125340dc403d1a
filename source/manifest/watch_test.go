package manifest

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/kube"
)

// runningSource is a Source that runs on a folder.
type runningSource struct {
	t      *testing.T
	dir    string
	deltas chan kube.Delta
	done   chan error
	logged *logBuffer
}

// testTimeout limits how long a test waits for an expected result.
const testTimeout = 30 * time.Second

// startSource starts a Source, which ends with the test.
func startSource(t *testing.T, dir string) *runningSource {
	t.Helper()
	w := &runningSource{t: t, dir: dir, deltas: make(chan kube.Delta, 100), done: make(chan error, 1), logged: &logBuffer{}}
	source, err := New(Options{Dir: dir, ServiceCIDRs: bothCIDR, NodeName: "here", Logger: w.logged.logger()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		w.done <- source.Run(ctx, func(d kube.Delta) { w.deltas <- d })
		close(w.done)
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-w.done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(testTimeout):
			t.Error("Run does not return")
		}
	})
	return w
}

// expectDeltas waits for Deltas until together they have the lines.
func (w *runningSource) expectDeltas(what string, want ...string) {
	w.t.Helper()
	var got []string
	timeout := time.After(testTimeout)
	for len(got) < len(want) {
		select {
		case d := <-w.deltas:
			got = append(got, summarize(d)...)
		case <-timeout:
			w.t.Fatalf("%s: no Delta with %v; got %v", what, want, got)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		w.t.Fatalf("%s (-want +got):\n%s", what, diff)
	}
}

// firstDelta returns the first Delta, which may be empty.
func (w *runningSource) firstDelta() []string {
	w.t.Helper()
	select {
	case d := <-w.deltas:
		return summarize(d)
	case <-time.After(testTimeout):
		w.t.Fatal("no first Delta")
		return nil
	}
}

func (w *runningSource) expectLog(text string) {
	w.t.Helper()
	for deadline := time.Now().Add(testTimeout); !strings.Contains(w.logged.String(), text); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("not logged: %s\nlogged:\n%s", text, w.logged)
		}
	}
}

const (
	web1 = "default/web ClusterIP 10.96.0.1 :80->8080/TCP"
	web2 = "default/web ClusterIP 10.96.0.2 :80->8080/TCP"
	db1  = "default/db ClusterIP 10.96.0.9 :80->8080/TCP"
)

func TestRunDeliversChanges(t *testing.T) {
	t.Parallel()
	w := startSource(t, writeFolder(t, "web.yaml", serviceYAML("web", "clusterIP: 10.96.0.1")))
	if diff := cmp.Diff([]string{web1}, w.firstDelta()); diff != "" {
		t.Fatalf("first Delta (-want +got):\n%s", diff)
	}
	writeFile(t, w.dir, "pods.yaml", podYAML("w1", "web", "10.0.0.1", "")+podYAML("other", "other", "10.0.0.9", ""))
	w.expectDeltas("a new file", "default/web IPv4 :8080/TCP 10.0.0.1(here,ready,serving)")

	writeFile(t, w.dir, "pods.yaml", podYAML("w1", "web", "10.0.0.1", "")+podYAML("w2", "web", "10.0.0.2", ""))
	w.expectDeltas("a changed file", "default/web IPv4 :8080/TCP 10.0.0.1(here,ready,serving) 10.0.0.2(here,ready,serving)")

	writeFile(t, w.dir, ".web.yaml.swp", "x")
	writeFile(t, w.dir, ".hidden.yaml", serviceYAML("hidden", "clusterIP: 10.96.0.8"))
	writeFile(t, w.dir, "notes.txt", serviceYAML("notes", "clusterIP: 10.96.0.8"))
	writeFile(t, w.dir, "new", serviceYAML("web", "clusterIP: 10.96.0.2"))
	if err := os.Rename(filepath.Join(w.dir, "new"), filepath.Join(w.dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	w.expectDeltas("a file renamed over another, and ignored files", web2)

	if err := os.Rename(filepath.Join(w.dir, "pods.yaml"), filepath.Join(w.dir, "pods.yaml.off")); err != nil {
		t.Fatal(err)
	}
	w.expectDeltas("a file renamed to another suffix", "default/"+generatedSliceName(t, "web")+" slice deleted")

	writeFile(t, w.dir, "web.yaml", strings.Replace(serviceYAML("web", "clusterIP: 10.96.0.2"),
		"name: web", "name: web, annotations: {fairlead.io/ipvs-scheduler: lc}", 1))
	w.expectDeltas("an annotation", web2+" scheduler=lc")

	if err := os.Remove(filepath.Join(w.dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	w.expectDeltas("a removed file", "default/web deleted")
}

// generatedSliceName returns the name of the Service's EndpointSlice for IPv4 and port
// 8080/TCP.
func generatedSliceName(t *testing.T, service string) string {
	t.Helper()
	d, err := Load(Options{Dir: writeFolder(t, "a.yaml", strings.ReplaceAll(
		"apiVersion: v1\nkind: Service\nmetadata: {name: X}\nspec: {clusterIP: 10.96.0.1, selector: {app: X}, ports: [{port: 80, targetPort: 8080}]}\n---\n",
		"X", service)+podYAML("p", service, "10.0.0.1", ""))})
	if err != nil || len(d.EndpointSlices) != 1 {
		t.Fatalf("%d slices, error %v", len(d.EndpointSlices), err)
	}
	return d.EndpointSlices[0].Name
}

// TestRunFollowsConfigMaps updates the folder as the kubelet updates a mounted ConfigMap.
func TestRunFollowsConfigMaps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	version := func(name string, files ...string) {
		sub := filepath.Join(dir, name)
		if err := os.Mkdir(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(files); i += 2 {
			writeFile(t, sub, files[i], files[i+1])
		}
		if err := os.Symlink(name, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1"))
	if err := os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	w := startSource(t, dir)
	if diff := cmp.Diff([]string{web1}, w.firstDelta()); diff != "" {
		t.Fatalf("first Delta (-want +got):\n%s", diff)
	}
	version("..2", "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.2"))
	w.expectDeltas("the link ..data replaced", web2)
}

func TestRunKeepsLastGoodObjects(t *testing.T) {
	t.Parallel()
	w := startSource(t, writeFolder(t, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1")+serviceYAML("db", "clusterIP: 10.96.0.9")))
	w.firstDelta()

	writeFile(t, w.dir, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0")+serviceYAML("new", "clusterIP: 10.96.0.3"))
	w.expectDeltas("one document is invalid, one removed, one new",
		"default/db deleted", "default/new ClusterIP 10.96.0.3 :80->8080/TCP")
	w.expectLog(`a.yaml:8: spec.clusterIP: \"10.96.0\" is not an IP address`)

	writeFile(t, w.dir, "a.yaml", "not: [yaml\n---\n"+serviceYAML("db", "clusterIP: 10.96.0.9"))
	w.expectDeltas("a document that is not YAML keeps all objects of the file", db1)
	w.expectLog(`a.yaml:1: not YAML: `)

	writeFile(t, w.dir, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.2"))
	w.expectDeltas("all documents are valid again", "default/db deleted", "default/new deleted", web2)

	logged := w.logged.String()
	if n := strings.Count(logged, "is not an IP address"); n != 1 {
		t.Errorf("the error was logged %d times, want once:\n%s", n, logged)
	}
}

// TestRunWaitsForWriters truncates a file and fills it later, as a slow writer does: the
// Service must not be deleted in between.
func TestRunWaitsForWriters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := startSimulated(t, writeFolder(t, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1")))
		a.writeAndNotify("")
		a.expectAfter("emptied", 10*coalesceDelay)
		a.writeAndNotify(serviceYAML("web", "clusterIP: 10.96.0.2"))
		a.expectAfter("filled", coalesceDelay, web2)
		a.writeAndNotify("# nothing")
		a.expectAfter("a file without objects", coalesceDelay+emptyFileDelay, "default/web deleted")
	})
}

// TestRunRetriesOnce makes a file readable without an event: the file is a link to another
// folder.
func TestRunRetriesOnce(t *testing.T) {
	t.Parallel()
	elsewhere := writeFolder(t, "a.yaml", "not: [yaml")
	w := startSource(t, t.TempDir())
	w.firstDelta()
	if err := os.Symlink(filepath.Join(elsewhere, "a.yaml"), filepath.Join(w.dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	w.expectLog("a.yaml:1: not YAML")
	writeFile(t, elsewhere, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1"))
	w.expectDeltas("read again without an event", web1)
}

func TestUnreadableFolder(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "manifests")
	if _, err := New(Options{Dir: dir}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), dir) {
		t.Errorf("New: error %v, want one that names %s", err, dir)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	source, err := New(Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	done, delivered := make(chan error, 1), make(chan struct{})
	go func() { done <- source.Run(t.Context(), func(kube.Delta) { close(delivered) }) }()
	<-delivered
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("Run: error %v, want one that names %s", err, dir)
		}
	case <-time.After(testTimeout):
		t.Error("Run does not return after its folder is removed")
	}
}

func TestSkippedKindWarnings(t *testing.T) {
	t.Parallel()
	w := startSource(t, writeFolder(t, "a.yaml", "apiVersion: apps/v1\nkind: Deployment\n---\napiVersion: v1\nkind: ConfigMap\n---\n"+
		"apiVersion: serving.knative.dev/v1\nkind: Service\n"))
	w.firstDelta()
	w.expectLog(`file=a.yaml ignored="Deployment in line 2, ConfigMap in line 5, Service in line 8"`)
	writeFile(t, w.dir, "a.yaml", "# changed\napiVersion: v1\nkind: ConfigMap\n")
	w.expectLog(`ignored="ConfigMap in line 3"`)
	if n := strings.Count(w.logged.String(), "\n"); n != 2 {
		t.Errorf("%d lines logged, want 2:\n%s", n, w.logged)
	}
}

// BenchmarkWatch measures the time from the rename of a file into place to the delivery of
// the change. Most of it is coalesceDelay.
func BenchmarkWatch(b *testing.B) {
	dir, other := b.TempDir(), b.TempDir()
	source, err := New(Options{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	deltas, done := make(chan kube.Delta), make(chan error)
	go func() { done <- source.Run(ctx, func(d kube.Delta) { deltas <- d }) }()
	<-deltas
	i := 0
	for b.Loop() {
		i++
		writeFile(b, other, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0."+itoa(int32(1+i%2))))
		if err := os.Rename(filepath.Join(other, "a.yaml"), filepath.Join(dir, "a.yaml")); err != nil {
			b.Fatal(err)
		}
		<-deltas
	}
	cancel()
	if err := <-done; err != nil {
		b.Error(err)
	}
}
