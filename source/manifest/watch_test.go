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

// watched is a Source that runs over a folder.
type watched struct {
	t      *testing.T
	dir    string
	deltas chan kube.Delta
	done   chan error
	logged *logBuffer
}

// patience is how long a test waits for what must come.
const patience = 10 * time.Second

// watchFolder starts a Source; it ends with the test.
func watchFolder(t *testing.T, dir string) *watched {
	t.Helper()
	w := &watched{t: t, dir: dir, deltas: make(chan kube.Delta, 100), done: make(chan error, 1), logged: &logBuffer{}}
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
		case <-time.After(patience):
			t.Error("Run does not return")
		}
	})
	return w
}

// expect waits for Deltas until together they have the lines.
func (w *watched) expect(what string, want ...string) {
	w.t.Helper()
	var got []string
	timeout := time.After(patience)
	for len(got) < len(want) {
		select {
		case d := <-w.deltas:
			got = append(got, summary(d)...)
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

// first takes the first Delta, which may be empty.
func (w *watched) first() []string {
	w.t.Helper()
	select {
	case d := <-w.deltas:
		return summary(d)
	case <-time.After(patience):
		w.t.Fatal("no first Delta")
		return nil
	}
}

func (w *watched) expectLog(text string) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); !strings.Contains(w.logged.String(), text); time.Sleep(time.Millisecond) {
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

func TestRunDeliversDifferences(t *testing.T) {
	t.Parallel()
	w := watchFolder(t, folder(t, "web.yaml", service("web", "clusterIP: 10.96.0.1")))
	if diff := cmp.Diff([]string{web1}, w.first()); diff != "" {
		t.Fatalf("first Delta (-want +got):\n%s", diff)
	}
	write(t, w.dir, "pods.yaml", pod("w1", "web", "10.0.0.1", "")+pod("other", "other", "10.0.0.9", ""))
	w.expect("a new file", "default/web IPv4 :8080/TCP 10.0.0.1(here,ready,serving)")

	write(t, w.dir, "pods.yaml", pod("w1", "web", "10.0.0.1", "")+pod("w2", "web", "10.0.0.2", ""))
	w.expect("a changed file", "default/web IPv4 :8080/TCP 10.0.0.1(here,ready,serving) 10.0.0.2(here,ready,serving)")

	write(t, w.dir, ".web.yaml.swp", "x")
	write(t, w.dir, ".hidden.yaml", service("hidden", "clusterIP: 10.96.0.8"))
	write(t, w.dir, "notes.txt", service("notes", "clusterIP: 10.96.0.8"))
	write(t, w.dir, "new", service("web", "clusterIP: 10.96.0.2"))
	if err := os.Rename(filepath.Join(w.dir, "new"), filepath.Join(w.dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	w.expect("a file renamed over another, and files that are not read", web2)

	if err := os.Rename(filepath.Join(w.dir, "pods.yaml"), filepath.Join(w.dir, "pods.yaml.off")); err != nil {
		t.Fatal(err)
	}
	w.expect("a file renamed away", "default/"+madeName(t, "web")+" slice gone")

	write(t, w.dir, "web.yaml", strings.Replace(service("web", "clusterIP: 10.96.0.2"),
		"name: web", "name: web, annotations: {fairlead.io/ipvs-scheduler: lc}", 1))
	w.expect("an annotation", web2+" scheduler=lc")

	if err := os.Remove(filepath.Join(w.dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	w.expect("a removed file", "default/web gone")
}

// madeName returns the name of the IPv4 slice with the port 8080/TCP.
func madeName(t *testing.T, service string) string {
	t.Helper()
	d, err := Load(Options{Dir: folder(t, "a.yaml", strings.ReplaceAll(
		"apiVersion: v1\nkind: Service\nmetadata: {name: X}\nspec: {clusterIP: 10.96.0.1, selector: {app: X}, ports: [{port: 80, targetPort: 8080}]}\n---\n",
		"X", service)+pod("p", service, "10.0.0.1", ""))})
	if err != nil || len(d.EndpointSlices) != 1 {
		t.Fatalf("%d slices, error %v", len(d.EndpointSlices), err)
	}
	return d.EndpointSlices[0].Name
}

// TestRunFollowsConfigMaps does what the kubelet does with a mounted ConfigMap.
func TestRunFollowsConfigMaps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	version := func(name string, files ...string) {
		sub := filepath.Join(dir, name)
		if err := os.Mkdir(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(files); i += 2 {
			write(t, sub, files[i], files[i+1])
		}
		if err := os.Symlink(name, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", "a.yaml", service("web", "clusterIP: 10.96.0.1"))
	if err := os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	w := watchFolder(t, dir)
	if diff := cmp.Diff([]string{web1}, w.first()); diff != "" {
		t.Fatalf("first Delta (-want +got):\n%s", diff)
	}
	version("..2", "a.yaml", service("web", "clusterIP: 10.96.0.2"))
	w.expect("the link ..data replaced", web2)
}

func TestRunKeepsWhatWasGood(t *testing.T) {
	t.Parallel()
	w := watchFolder(t, folder(t, "a.yaml", service("web", "clusterIP: 10.96.0.1")+service("db", "clusterIP: 10.96.0.9")))
	w.first()

	write(t, w.dir, "a.yaml", service("web", "clusterIP: 10.96.0")+service("new", "clusterIP: 10.96.0.3"))
	w.expect("one document is wrong, one gone, one new",
		"default/db gone", "default/new ClusterIP 10.96.0.3 :80->8080/TCP")
	w.expectLog(`a.yaml:8: spec.clusterIP: \"10.96.0\" is not an IP address`)

	write(t, w.dir, "a.yaml", "not: [yaml\n---\n"+service("db", "clusterIP: 10.96.0.9"))
	w.expect("a document that is not YAML could be any of the file's", db1)
	w.expectLog(`a.yaml:1: not YAML: `)

	write(t, w.dir, "a.yaml", service("web", "clusterIP: 10.96.0.2"))
	w.expect("all is well again", "default/db gone", "default/new gone", web2)

	logged := w.logged.String()
	if n := strings.Count(logged, "is not an IP address"); n != 1 {
		t.Errorf("the error was logged %d times, want once:\n%s", n, logged)
	}
}

// TestRunWaitsForWriters truncates a file and fills it later, as a slow writer
// does: the Service must not go in between.
func TestRunWaitsForWriters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := announceFolder(t, folder(t, "a.yaml", service("web", "clusterIP: 10.96.0.1")))
		a.write("")
		a.expectAfter("emptied", 10*settle)
		a.write(service("web", "clusterIP: 10.96.0.2"))
		a.expectAfter("filled", settle, web2)
		a.write("# nothing")
		a.expectAfter("left without objects", settle+emptyAfter, "default/web gone")
	})
}

// TestRunRetriesOnce makes a file readable without an event that names it: the
// file is a link to another folder.
func TestRunRetriesOnce(t *testing.T) {
	t.Parallel()
	elsewhere := folder(t, "a.yaml", "not: [yaml")
	w := watchFolder(t, t.TempDir())
	w.first()
	if err := os.Symlink(filepath.Join(elsewhere, "a.yaml"), filepath.Join(w.dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	w.expectLog("a.yaml:1: not YAML")
	write(t, elsewhere, "a.yaml", service("web", "clusterIP: 10.96.0.1"))
	w.expect("read again by itself", web1)
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
	case <-time.After(patience):
		t.Error("Run goes on without its folder")
	}
}

func TestWarnings(t *testing.T) {
	t.Parallel()
	w := watchFolder(t, folder(t, "a.yaml", "apiVersion: apps/v1\nkind: Deployment\n---\napiVersion: v1\nkind: ConfigMap\n---\n"+
		"apiVersion: serving.knative.dev/v1\nkind: Service\n"))
	w.first()
	w.expectLog(`file=a.yaml ignored="Deployment in line 2, ConfigMap in line 5, Service in line 8"`)
	write(t, w.dir, "a.yaml", "# changed\napiVersion: v1\nkind: ConfigMap\n")
	w.expectLog(`ignored="ConfigMap in line 3"`)
	if n := strings.Count(w.logged.String(), "\n"); n != 2 {
		t.Errorf("%d lines logged, want 2:\n%s", n, w.logged)
	}
}

// BenchmarkWatch measures from the rename of a file into place until what it
// changes is delivered. Most of it is the time that events gather.
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
		write(b, other, "a.yaml", service("web", "clusterIP: 10.96.0."+itoa(int32(1+i%2))))
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
