package manifest

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/kube"
)

// simulatedFolder is a Source in a synctest bubble. The test sends the events of its folder
// instead of inotify, and uses the bubble's clock.
type simulatedFolder struct {
	t      *testing.T
	dir    string
	events chan fsnotify.Event
	deltas chan kube.Delta
	logged *logBuffer
}

// startSimulated starts a Source and waits until it has delivered the folder's files. It
// ends with the bubble.
func startSimulated(t *testing.T, dir string) *simulatedFolder {
	t.Helper()
	a := &simulatedFolder{t: t, dir: dir, events: make(chan fsnotify.Event), deltas: make(chan kube.Delta, 100), logged: &logBuffer{}}
	source, err := New(Options{Dir: dir, ServiceCIDRs: bothCIDR, NodeName: "here", Logger: a.logged.logger()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		source.watcher = &fsnotify.Watcher{Events: a.events, Errors: make(chan error)}
		done <- source.run(ctx, func(d kube.Delta) { a.deltas <- d })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("follow: %v", err)
		}
	})
	synctest.Wait()
	<-a.deltas
	return a
}

// writeAndNotify replaces the content of the file a.yaml and sends the event.
func (a *simulatedFolder) writeAndNotify(content string) {
	a.t.Helper()
	const name = "a.yaml"
	writeFile(a.t, a.dir, name, content)
	a.events <- fsnotify.Event{Name: filepath.Join(a.dir, name), Op: fsnotify.Write}
}

// expectAfter checks that nothing is delivered before the given time, and that the lines
// are delivered then. Without lines it expects no Delta.
func (a *simulatedFolder) expectAfter(what string, wait time.Duration, want ...string) {
	a.t.Helper()
	time.Sleep(wait - time.Nanosecond)
	synctest.Wait()
	if len(a.deltas) > 0 {
		a.t.Fatalf("%s: earlier than %s: %v", what, wait, summarize(<-a.deltas))
	}
	time.Sleep(time.Nanosecond)
	synctest.Wait()
	var got []string
	for len(a.deltas) > 0 {
		got = append(got, summarize(<-a.deltas)...)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		a.t.Fatalf("%s, after %s (-want +got):\n%s", what, wait, diff)
	}
}

// TestRunWaitsForSlowWriters empties a file and fills it as late as kubectl does in
// "kubectl get -o yaml > a.yaml": the Service must not be deleted in between.
func TestRunWaitsForSlowWriters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := startSimulated(t, writeFolder(t, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1"), "b.yaml", serviceYAML("db", "clusterIP: 10.96.0.9")))
		a.writeAndNotify("")
		a.expectAfter("emptied", emptyFileDelay-coalesceDelay)
		// An event of another file does not end the delay, and is not delayed.
		other := filepath.Join(a.dir, "b.yaml")
		if err := os.Remove(other); err != nil {
			t.Fatal(err)
		}
		a.events <- fsnotify.Event{Name: other, Op: fsnotify.Remove}
		a.expectAfter("another file", coalesceDelay, "default/db deleted")
		// An event of the file restarts the delay.
		a.writeAndNotify("# soon\n")
		a.expectAfter("an event of the file", emptyFileDelay-coalesceDelay)
		a.writeAndNotify(serviceYAML("web", "clusterIP: 10.96.0.2"))
		a.expectAfter("filled", coalesceDelay, web2)
		a.expectAfter("no further change", time.Hour)
		if logged := a.logged.String(); logged != "" {
			t.Errorf("logged: %s", logged)
		}
	})
}

// TestRunAcceptsEmptyFile leaves a file empty for longer than emptyFileDelay.
func TestRunAcceptsEmptyFile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := startSimulated(t, writeFolder(t, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1")))
		a.writeAndNotify("")
		a.expectAfter("an empty file", coalesceDelay+emptyFileDelay, "default/web deleted")
		if want := "file has no objects any more"; !strings.Contains(a.logged.String(), want) {
			t.Errorf("not logged: %s\nlogged:\n%s", want, a.logged)
		}
	})
}

func TestRunLogsEmptyFile(t *testing.T) {
	t.Parallel()
	w := startSource(t, writeFolder(t, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1")))
	w.firstDelta()
	writeFile(t, w.dir, "a.yaml", "")
	w.expectDeltas("an empty file", "default/web deleted")
	w.expectLog(`level=INFO msg="file has no objects any more; its previous objects are deleted" file=a.yaml objects=1 bytes=0`)
}

// TestDanglingLinks checks links to missing files.
func TestDanglingLinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, to := range map[string]string{"loop.yaml": "loop.yaml", "nowhere.yaml": "missing", "other.yaml": "elsewhere/x", "elsewhere": "x"} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	w := startSource(t, dir)
	w.firstDelta()
	w.expectLog("loop.yaml:1: cannot be read: too many levels of symbolic links: correct the link")
	w.expectLog(`level=WARN msg="dangling link, nothing is read" file=nowhere.yaml to=missing`)
	writeFile(t, dir, "a.yaml", serviceYAML("web", "clusterIP: 10.96.0.1"))
	w.expectDeltas("another file", web1)
	// Change the link to an existing file, and then to a missing one.
	link := func(to string) {
		t.Helper()
		if err := os.Symlink(to, filepath.Join(dir, "new")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "nowhere.yaml")); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, dir, "db.txt", serviceYAML("db", "clusterIP: 10.96.0.9"))
	link("db.txt")
	w.expectDeltas("a link to a file", db1)
	link("gone.txt")
	w.expectDeltas("a link to a missing file", "default/db deleted")
	w.expectLog("file=nowhere.yaml to=gone.txt")
	if n := strings.Count(w.logged.String(), "to=missing"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, w.logged)
	}
}

func TestReadErrorHints(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]string{
		syscall.EACCES:         ": check its permissions",
		syscall.EPERM:          ": check its permissions",
		syscall.ELOOP:          ": correct the link",
		syscall.ENOTDIR:        ": correct the link",
		syscall.EIO:            "",
		errors.New("whatever"): "",
	} {
		if got := readErrorHint(&fs.PathError{Op: "open", Path: "a.yaml", Err: err}); got != want {
			t.Errorf("%v: hint %q, want %q", err, got, want)
		}
	}
}
