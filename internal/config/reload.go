package config

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Load returns the configuration that flags and, if --config is one of them, the
// file give; content is the file's.
func Load(flags Flags) (c Config, content []byte, err error) {
	path, ok := flags["config"]
	if !ok {
		c, err = parse(fromFlags(flags))
		return c, nil, err
	}
	file, err := readConfigFile(path)
	if err != nil {
		// What the flags say wrong is still worth knowing at once.
		_, flagsErr := parse(fromFlags(flags))
		return c, nil, errors.Join(err, flagsErr)
	}
	c, err = parse(mergeConfigFile(flags, file))
	return c, file.content, err
}

const (
	// quietPeriod is how long a file must have been left alone to be read: one
	// that is written in place is empty for a moment. maxQuietWait is how long
	// that is waited for.
	quietPeriod  = 100 * time.Millisecond
	maxQuietWait = 10 * quietPeriod
	// pollPeriod is how often the file is read although nothing was noticed: it
	// may be reached by links through folders that are not watched. retryPeriod
	// is that while there is no file that can be used, or no folder to watch.
	pollPeriod  = 30 * time.Second
	retryPeriod = time.Second
)

// Reloader follows the configuration file.
type Reloader struct {
	options ReloaderOptions
	// content is the file's, when it was last applied.
	content []byte

	// The rest is Run's.
	rejected *rejectedFile // what was reported last, and nil if all is well since
	// targetDir is the folder of the file that the path leads to, if it is another
	// than the path's.
	targetDir string
}

// ReloaderOptions are what a [Reloader] depends on.
type ReloaderOptions struct {
	// Flags has the path of the file, and Content what [Load] has returned of it.
	Flags   Flags
	Content []byte
	Logger  *slog.Logger
	// Apply is called with each configuration that is valid, and Done with the result
	// of each new content.
	Apply    func(context.Context, Config)
	OnResult func(error)

	poll time.Duration // how often the file is read in any case; 0: pollPeriod
}

// NewReloader returns a Reloader of the file that --config names.
func NewReloader(o ReloaderOptions) *Reloader {
	o.poll = cmp.Or(o.poll, pollPeriod)
	return &Reloader{options: o, content: o.Content}
}

// rejectedFile is a file that is left aside.
type rejectedFile struct {
	content []byte
	err     string
}

// Run blocks until ctx is done, or until the folder can't be watched at first.
func (r *Reloader) Run(ctx context.Context) error {
	path := filepath.Clean(r.options.Flags["config"])
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("--config: watch %s: %w", path, err)
	}
	defer watcher.Close() //nolint:errcheck // nothing was written
	if err := r.addWatches(watcher, path); err != nil {
		return fmt.Errorf("--config: watch the folder of %s: %w", path, err)
	}
	// It may have changed before it was watched.
	settled := time.NewTimer(quietPeriod)
	defer settled.Stop()
	pending, limit := true, time.Now().Add(maxQuietWait)
	settle := func(own bool) {
		switch now := time.Now(); {
		case !pending:
			pending, limit = true, now.Add(maxQuietWait)
			settled.Reset(quietPeriod)
		case own: // others say nothing about whether this one is still being written
			settled.Reset(min(quietPeriod, limit.Sub(now)))
		}
	}
	poll := time.NewTimer(r.options.poll)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-poll.C:
			settle(false)
		case <-settled.C:
			pending = false
			err := r.addWatches(watcher, path) // before it is read: nothing is missed
			r.reload(ctx)
			again := r.options.poll
			if err != nil || r.rejected != nil {
				again = min(again, retryPeriod)
			}
			poll.Reset(again)
		case event, ok := <-watcher.Events:
			if !ok {
				return nil
			}
			own := filepath.Base(path) == filepath.Base(event.Name)
			settle(own || filepath.Dir(event.Name) == r.targetDir)
		case err, ok := <-watcher.Errors:
			if !ok {
				return nil
			}
			r.options.Logger.WarnContext(ctx, "changes of the configuration file may have been missed; reading it", "error", err)
			settle(false)
		}
	}
}

// addWatches watches the folder of the file, as a file is often replaced by renaming
// another: by editors, and by the kubelet, which swaps the folder that a
// ConfigMap's files link to. Where the path is a link, it also watches the folder
// that it leads to. Doing so again has no effect, unless a folder is another.
func (r *Reloader) addWatches(watcher *fsnotify.Watcher, path string) error {
	dir, target := filepath.Dir(path), ""
	if file, err := filepath.EvalSymlinks(path); err == nil && filepath.Dir(file) != dir {
		target = filepath.Dir(file)
	}
	if r.targetDir != "" && r.targetDir != target {
		_ = watcher.Remove(r.targetDir) // it may be gone
	}
	r.targetDir = target
	if target != "" {
		_ = watcher.Add(target) // or else the file is read every now and then
	}
	return watcher.Add(dir)
}

// reload reads the file, and applies it if it is another than before. One that
// is wrong, or not there, leaves everything as it is, and is reported once.
func (r *Reloader) reload(ctx context.Context) {
	next, content, err := Load(r.options.Flags)
	if err != nil {
		now := rejectedFile{err: err.Error()}
		now.content, _ = os.ReadFile(r.options.Flags["config"]) // nothing if it is not there
		if r.rejected != nil && r.rejected.err == now.err && slices.Equal(r.rejected.content, now.content) {
			return
		}
		r.rejected = &now
		r.options.Logger.ErrorContext(ctx, "the configuration file is left aside, and the one before stays in use: mend it", "error", err)
		r.options.OnResult(err)
		return
	}
	if slices.Equal(content, r.content) && r.rejected == nil {
		return
	}
	r.content, r.rejected = content, nil
	r.options.Apply(ctx, next)
	r.options.OnResult(nil)
}
