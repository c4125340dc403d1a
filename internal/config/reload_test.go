package config

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// waitTimeout bounds operations that take milliseconds on an idle machine.
const waitTimeout = 15 * time.Second

// reloaderTest records the calls of a running Reloader.
type reloaderTest struct {
	t       *testing.T
	applied chan string // modes of local detection
	failed  chan error
	logged  *logBuffer
}

// logBuffer is a log that a test can read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func startReloader(t *testing.T, path string, poll time.Duration) reloaderTest {
	t.Helper()
	flags := Flags{"config": path, "hostname-override": "node"}
	_, content, err := Load(flags)
	if err != nil {
		t.Fatal(err)
	}
	f := reloaderTest{t, make(chan string, 10), make(chan error, 10), &logBuffer{}}
	r := NewReloader(ReloaderOptions{
		Flags: flags, Content: content, Logger: slog.New(slog.NewTextHandler(f.logged, nil)), poll: poll,
		Apply: func(_ context.Context, c Config) { f.applied <- string(c.Tracker.DetectLocal.Mode) },
		OnResult: func(err error) {
			if err != nil {
				f.failed <- err
			}
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run() = %v", err)
		}
	})
	return f
}

func (f reloaderTest) awaitApplied(step, want string) {
	f.t.Helper()
	select {
	case got := <-f.applied:
		if got != want {
			f.t.Errorf("%s: applied %s, want %s", step, got, want)
		}
	case err := <-f.failed:
		f.t.Errorf("%s: %v", step, err)
	case <-time.After(waitTimeout):
		f.t.Fatalf("%s: no configuration applied", step)
	}
}

func (f reloaderTest) awaitLog(text string) {
	f.t.Helper()
	for deadline := time.Now().Add(waitTimeout); !strings.Contains(f.logged.String(), text); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			f.t.Fatalf("not logged: %s\nlogged:\n%s", text, f.logged)
		}
	}
}

func (f reloaderTest) awaitFailure(step string) {
	f.t.Helper()
	select {
	case got := <-f.applied:
		f.t.Errorf("%s: applied %s, want a failure", step, got)
	case err := <-f.failed:
		f.t.Logf("%s: %v", step, err)
	case <-time.After(waitTimeout):
		f.t.Fatalf("%s: no failure reported", step)
	}
}

func (f reloaderTest) expectNothing(step string) {
	f.t.Helper()
	select {
	case got := <-f.applied:
		f.t.Errorf("%s: applied %s, want no call", step, got)
	case err := <-f.failed:
		f.t.Errorf("%s: failure %v, want no call", step, err)
	case <-time.After(5 * quietPeriod):
	}
}

// TestReloader checks that the Reloader notices all ways to replace a configuration file, and
// ignores replacements that do not change its content.
func TestReloader(t *testing.T) {
	t.Parallel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	folder := t.TempDir()
	// The kubelet mounts a ConfigMap like this: the file links to ..data, which links to one
	// folder per version.
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

	r := startReloader(t, path, time.Hour)
	applied, failed, await, awaitFailure := r.applied, r.failed, r.awaitApplied, r.awaitFailure

	// A new version with the same content is not a change.
	swap(version("..2", text("ClusterCIDR")))
	must(os.WriteFile(filepath.Join(folder, "other"), nil, 0o600))
	select {
	case got := <-applied:
		t.Errorf("nothing changed: applied %s", got)
	case err := <-failed:
		t.Errorf("nothing changed: %v", err)
	case <-time.After(3 * quietPeriod):
	}
	swap(version("..3", text("NodeCIDR")))
	await("ConfigMap", "NodeCIDR")

	must(os.Remove(path))
	awaitFailure("file removed")
	must(os.WriteFile(path, []byte(text("ClusterCIDR")), 0o600))
	await("file created", "ClusterCIDR")

	must(os.WriteFile(path, []byte(text("NodeCIDR")), 0o600))
	await("written in place", "NodeCIDR")

	must(os.WriteFile(path, []byte(text("Guess")), 0o600))
	awaitFailure("invalid")
	must(os.WriteFile(path, []byte(text("NodeCIDR")), 0o600))
	await("previous content restored", "NodeCIDR")

	must(os.WriteFile(path+"~", []byte(text("ClusterCIDR")), 0o600))
	must(os.Rename(path+"~", path))
	await("renamed", "ClusterCIDR")
}

// TestReloaderIgnoresOtherFiles checks that changes to other files in the folder neither delay
// reloading nor repeat a reported failure.
func TestReloaderIgnoresOtherFiles(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	path := filepath.Join(folder, "config.conf")
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600); err != nil {
			t.Error(err)
		}
	}
	write("config.conf", configHeader)
	r := startReloader(t, path, time.Hour)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(quietPeriod / 10):
				write("other", "")
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	write("config.conf", configHeader+"detectLocalMode: NodeCIDR\n")
	r.awaitApplied("changed", "NodeCIDR")
	write("config.conf", configHeader+"detectLocalMode: Guess\n")
	r.awaitFailure("invalid")
	r.expectNothing("still invalid")
	write("config.conf", configHeader+"detectLocalMode: Guess\n# really\n")
	r.awaitFailure("edited and still invalid")
	write("config.conf", configHeader+"detectLocalMode: NodeCIDR\n")
	r.awaitApplied("previous content restored", "NodeCIDR")
}

// TestReloaderBusyFile checks that a file whose metadata changes all the time is still reloaded.
func TestReloaderBusyFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "config.conf")
	if err := os.WriteFile(path, []byte(configHeader), 0o600); err != nil {
		t.Fatal(err)
	}
	r := startReloader(t, path, time.Hour)
	if err := os.WriteFile(path+"~", []byte(configHeader+"detectLocalMode: NodeCIDR\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+"~", path); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case now := <-time.After(quietPeriod / 10):
				if err := os.Chtimes(path, now, now); err != nil {
					t.Error(err)
				}
			}
		}
	}()
	r.awaitApplied("replaced", "NodeCIDR")
	close(stop)
	<-stopped
}

// TestReloaderSymlinks checks that the Reloader follows symlinks, and that it notices a removed
// and recreated folder.
func TestReloaderSymlinks(t *testing.T) {
	t.Parallel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name  string
		poll  time.Duration
		links int
	}{
		{"no link", time.Hour, 0}, {"one link", time.Hour, 1}, {"three links, noticed by polling", quietPeriod, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			folder := filepath.Join(t.TempDir(), "real")
			write := func(mode string) {
				must(os.MkdirAll(folder, 0o700))
				must(os.WriteFile(filepath.Join(folder, "config.conf"), []byte(configHeader+"detectLocalMode: "+mode+"\n"), 0o600))
			}
			write("ClusterCIDR")
			path := filepath.Join(folder, "config.conf")
			for range test.links {
				link := filepath.Join(t.TempDir(), "link.conf")
				must(os.Symlink(path, link))
				path = link
			}
			r := startReloader(t, path, test.poll)
			write("NodeCIDR")
			r.awaitApplied("edited in place", "NodeCIDR")
			must(os.RemoveAll(folder))
			r.awaitFailure("folder removed")
			write("ClusterCIDR")
			r.awaitApplied("folder recreated", "ClusterCIDR")
			write("NodeCIDR")
			r.awaitApplied("edited in place again", "NodeCIDR")
		})
	}
}
