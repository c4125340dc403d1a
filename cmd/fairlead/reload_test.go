package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// All the ways in which a configuration file is replaced are noticed, and
// nothing else is.
func TestReloader(t *testing.T) {
	t.Parallel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	folder := t.TempDir()
	// As the kubelet mounts a ConfigMap: the file is a link through ..data to a
	// folder of its own for each version.
	version := func(name, text string) string {
		dir := filepath.Join(folder, name)
		must(os.Mkdir(dir, 0o700))
		must(os.WriteFile(filepath.Join(dir, "config.conf"), []byte(text), 0o600))
		return name
	}
	swap := func(name string) {
		must(os.Symlink(name, filepath.Join(folder, "..data_tmp")))
		must(os.Rename(filepath.Join(folder, "..data_tmp"), filepath.Join(folder, "..data")))
	}
	path := filepath.Join(folder, "config.conf")
	text := func(detect string) string { return configHeader + "detectLocalMode: " + detect + "\n" }
	swap(version("..1", text("ClusterCIDR")))
	must(os.Symlink("..data/config.conf", path))

	flags := given{"config": path, "hostname-override": "node"}
	_, content, err := load(flags)
	must(err)
	applied, failed := make(chan string, 10), make(chan error, 10)
	r := &reloader{
		flags: flags, content: content, log: slog.New(slog.DiscardHandler),
		apply: func(_ context.Context, c config) { applied <- string(c.tracker.DetectLocal.Mode) },
		done: func(err error) {
			if err != nil {
				failed <- err
			}
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run ended with: %v", err)
		}
	}()
	await := func(step, want string) {
		t.Helper()
		select {
		case got := <-applied:
			if got != want {
				t.Errorf("%s: applied %s, want %s", step, got, want)
			}
		case err := <-failed:
			t.Errorf("%s: %v", step, err)
		case <-time.After(patience):
			t.Fatalf("%s: nothing was applied", step)
		}
	}
	awaitFailure := func(step string) {
		t.Helper()
		select {
		case got := <-applied:
			t.Errorf("%s: applied %s, want a failure", step, got)
		case err := <-failed:
			t.Logf("%s: %v", step, err)
		case <-time.After(patience):
			t.Fatalf("%s: nothing happened", step)
		}
	}

	// The same again in another place is no change.
	swap(version("..2", text("ClusterCIDR")))
	must(os.WriteFile(filepath.Join(folder, "other"), nil, 0o600))
	select {
	case got := <-applied:
		t.Errorf("nothing changed: applied %s", got)
	case err := <-failed:
		t.Errorf("nothing changed: %v", err)
	case <-time.After(3 * settleTime):
	}
	swap(version("..3", text("NodeCIDR")))
	await("ConfigMap", "NodeCIDR")

	must(os.Remove(path))
	awaitFailure("file removed")
	must(os.WriteFile(path, []byte(text("ClusterCIDR")), 0o600))
	await("file made", "ClusterCIDR")

	must(os.WriteFile(path, []byte(text("NodeCIDR")), 0o600))
	await("written in place", "NodeCIDR")

	must(os.WriteFile(path, []byte(text("Guess")), 0o600))
	awaitFailure("not valid")
	must(os.WriteFile(path, []byte(text("NodeCIDR")), 0o600))
	await("as it was before", "NodeCIDR")

	must(os.WriteFile(path+"~", []byte(text("ClusterCIDR")), 0o600))
	must(os.Rename(path+"~", path))
	await("renamed", "ClusterCIDR")
}
