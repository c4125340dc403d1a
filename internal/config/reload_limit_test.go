package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/inotify/inotifytest"
)

// TestReloaderWithoutInotify checks that the file is followed while the kernel's limits of
// inotify are reached, and watched when they no longer are.
func TestReloaderWithoutInotify(t *testing.T) {
	if !inotifytest.InUserNamespace(t) {
		return
	}
	path := filepath.Join(t.TempDir(), "config.conf")
	write := func(detect string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(configHeader+"detectLocalMode: "+detect+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	inotifytest.SetMaxInstances(t, 0)
	inotifytest.SetMaxWatches(t, 0)
	write("ClusterCIDR")
	r := startReloader(t, path, time.Hour)
	r.awaitLog("fs.inotify.max_user_instances")
	write("NodeCIDR")
	r.awaitApplied("no instance", "NodeCIDR")

	inotifytest.SetMaxInstances(t, 1)
	r.awaitLog("fs.inotify.max_user_watches")
	write("ClusterCIDR")
	r.awaitApplied("no watch", "ClusterCIDR")

	inotifytest.SetMaxWatches(t, 1)
	r.awaitLog("watched again")
	write("NodeCIDR")
	r.awaitApplied("watched", "NodeCIDR")
	if n := strings.Count(r.logged.String(), "cannot be watched"); n != 2 {
		t.Errorf("%d warnings, want one for each limit:\n%s", n, r.logged.String())
	}
}
