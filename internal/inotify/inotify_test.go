package inotify

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/fsnotify/fsnotify"

	"fairlead.io/fairlead/internal/inotify/inotifytest"
)

func TestExplain(t *testing.T) {
	if !inotifytest.InUserNamespace(t) {
		return
	}
	expect := func(err error, want string) {
		t.Helper()
		err = Explain(err)
		if _, ok := errors.AsType[*LimitError](err); !ok || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want a LimitError that contains %s", err, want)
		}
	}
	inotifytest.SetMaxInstances(t, 0)
	_, err := fsnotify.NewWatcher()
	expect(err, "fs.inotify.max_user_instances (")

	inotifytest.SetMaxInstances(t, 1)
	inotifytest.SetMaxWatches(t, 0)
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watcher.Close() }()
	expect(watcher.Add(t.TempDir()), "fs.inotify.max_user_watches (")

	inotifytest.SetMaxWatches(t, 1)
	if err := Explain(watcher.Add("/missing")); !errors.Is(err, os.ErrNotExist) || err.Error() != "no such file or directory" {
		t.Errorf("missing folder: error %v, want it unchanged", err)
	}
}
