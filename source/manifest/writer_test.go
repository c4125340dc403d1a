package manifest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestRunWaitsForSlowWriters empties a file and fills it as late as kubectl get
// does in kubectl get -o yaml > a.yaml: the Service must not go in between.
func TestRunWaitsForSlowWriters(t *testing.T) {
	t.Parallel()
	w := watchFolder(t, folder(t, "a.yaml", service("web", "clusterIP: 10.96.0.1"), "b.yaml", service("db", "clusterIP: 10.96.0.9")))
	w.first()
	write(t, w.dir, "a.yaml", "")
	time.Sleep(emptyAfter * 6 / 10)
	// Another file does not make it shorter, and need not wait.
	if err := os.Remove(filepath.Join(w.dir, "b.yaml")); err != nil {
		t.Fatal(err)
	}
	w.expect("another file", "default/db gone")
	// An event of the file makes it longer.
	write(t, w.dir, "a.yaml", "# soon\n")
	time.Sleep(emptyAfter * 6 / 10)
	write(t, w.dir, "a.yaml", service("web", "clusterIP: 10.96.0.2"))
	w.expect("filled", web2)
	if logged := w.logged.String(); logged != "" {
		t.Errorf("logged: %s", logged)
	}
}

func TestRunLogsThatAFileIsEmpty(t *testing.T) {
	t.Parallel()
	w := watchFolder(t, folder(t, "a.yaml", service("web", "clusterIP: 10.96.0.1")))
	w.first()
	write(t, w.dir, "a.yaml", "")
	w.expect("left empty", "default/web gone")
	w.expectLog(`level=INFO msg="file has no objects any more, so those that it had are gone" file=a.yaml objects=1 bytes=0`)
}

// TestLinks has links that lead to no file.
func TestLinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, to := range map[string]string{"loop.yaml": "loop.yaml", "nowhere.yaml": "missing", "other.yaml": "elsewhere/x", "elsewhere": "x"} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	w := watchFolder(t, dir)
	w.first()
	w.expectLog("loop.yaml:1: cannot be read: too many levels of symbolic links: correct the link")
	w.expectLog(`level=WARN msg="link leads to no file, so nothing is read" file=nowhere.yaml to=missing`)
	write(t, dir, "a.yaml", service("web", "clusterIP: 10.96.0.1"))
	w.expect("another file", web1)
	// Linked anew, to a file and to nothing again.
	link := func(to string) {
		t.Helper()
		if err := os.Symlink(to, filepath.Join(dir, "new")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "nowhere.yaml")); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, "db.txt", service("db", "clusterIP: 10.96.0.9"))
	link("db.txt")
	w.expect("a link to a file", db1)
	link("gone.txt")
	w.expect("a link to nothing", "default/db gone")
	w.expectLog("file=nowhere.yaml to=gone.txt")
	if n := strings.Count(w.logged.String(), "to=missing"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, w.logged)
	}
}

func TestHintsForFilesThatCannotBeRead(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]string{
		syscall.EACCES:         ": check its permissions",
		syscall.EPERM:          ": check its permissions",
		syscall.ELOOP:          ": correct the link",
		syscall.ENOTDIR:        ": correct the link",
		syscall.EIO:            "",
		errors.New("whatever"): "",
	} {
		if got := hint(&fs.PathError{Op: "open", Path: "a.yaml", Err: err}); got != want {
			t.Errorf("%v: hint %q, want %q", err, got, want)
		}
	}
}
