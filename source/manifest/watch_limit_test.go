package manifest

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/inotify/inotifytest"
)

// TestRunWithoutInotify checks that the folder is read periodically while the kernel's limits of
// inotify are reached, and watched when they no longer are.
func TestRunWithoutInotify(t *testing.T) {
	if !inotifytest.InUserNamespace(t) {
		return
	}
	inotifytest.SetMaxInstances(t, 0)
	inotifytest.SetMaxWatches(t, 0)
	w := startSource(t, writeFolder(t, "web.yaml", serviceYAML("web", "clusterIP: 10.96.0.1")))
	if diff := cmp.Diff([]string{web1}, w.firstDelta()); diff != "" {
		t.Fatalf("first Delta (-want +got):\n%s", diff)
	}
	w.expectLog("fs.inotify.max_user_instances")

	inotifytest.SetMaxInstances(t, 1)
	writeFile(t, w.dir, "web.yaml", serviceYAML("web", "clusterIP: 10.96.0.2"))
	w.expectDeltas("no watch", web2)
	w.expectLog("fs.inotify.max_user_watches")

	inotifytest.SetMaxWatches(t, 1)
	w.expectLog("watched again")
	writeFile(t, w.dir, "db.yaml", serviceYAML("db", "clusterIP: 10.96.0.9"))
	w.expectDeltas("watched", db1)
}
