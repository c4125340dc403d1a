package main

import (
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

// load returns the configuration that flags and, if --config is one of them, the
// file give; content is the file's.
func load(flags given) (c config, content []byte, err error) {
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
	c, err = parse(under(flags, file))
	return c, file.content, err
}

const (
	// settleTime is how long a file must have been left alone to be read: one
	// that is written in place is empty for a moment. settleLimit is how long
	// that is waited for.
	settleTime  = 100 * time.Millisecond
	settleLimit = 10 * settleTime
	// pollPeriod is how often the file is read although nothing was noticed: it
	// may be reached by links through folders that are not watched. lostPeriod
	// is that while there is no file that can be used, or no folder to watch.
	pollPeriod = 30 * time.Second
	lostPeriod = time.Second
)

// reloader follows the configuration file.
type reloader struct {
	flags   given
	content []byte
	log     *slog.Logger
	// poll is how often the file is read in any case.
	poll time.Duration
	// apply is given each configuration that is valid, and done what became of
	// each new content.
	apply func(context.Context, config)
	done  func(error)

	// The rest is run's.
	broken *broken // what was reported last, and nil if all is well since
	// target is the folder of the file that the path leads to, if it is another
	// than the path's.
	target string
}

// broken is a file that is left aside.
type broken struct {
	content []byte
	err     string
}

// run blocks until ctx is done, or until the folder can't be watched at first.
func (r *reloader) run(ctx context.Context) error {
	path := filepath.Clean(r.flags["config"])
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("--config: watch %s: %w", path, err)
	}
	defer watcher.Close() //nolint:errcheck // nothing was written
	if err := r.watch(watcher, path); err != nil {
		return fmt.Errorf("--config: watch the folder of %s: %w", path, err)
	}
	// It may have changed before it was watched.
	settled := time.NewTimer(settleTime)
	defer settled.Stop()
	pending, limit := true, time.Now().Add(settleLimit)
	settle := func(own bool) {
		switch now := time.Now(); {
		case !pending:
			pending, limit = true, now.Add(settleLimit)
			settled.Reset(settleTime)
		case own: // others say nothing about whether this one is still being written
			settled.Reset(min(settleTime, limit.Sub(now)))
		}
	}
	poll := time.NewTimer(r.poll)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-poll.C:
			settle(false)
		case <-settled.C:
			pending = false
			err := r.watch(watcher, path) // before it is read: nothing is missed
			r.reload(ctx)
			again := r.poll
			if err != nil || r.broken != nil {
				again = min(again, lostPeriod)
			}
			poll.Reset(again)
		case event, ok := <-watcher.Events:
			if !ok {
				return nil
			}
			own := filepath.Base(path) == filepath.Base(event.Name)
			settle(own || filepath.Dir(event.Name) == r.target)
		case err, ok := <-watcher.Errors:
			if !ok {
				return nil
			}
			r.log.WarnContext(ctx, "changes of the configuration file may have been missed; reading it", "error", err)
			settle(false)
		}
	}
}

// watch watches the folder of the file, as a file is often replaced by renaming
// another: by editors, and by the kubelet, which swaps the folder that a
// ConfigMap's files link to. Where the path is a link, it also watches the folder
// that it leads to. Doing so again has no effect, unless a folder is another.
func (r *reloader) watch(watcher *fsnotify.Watcher, path string) error {
	dir, target := filepath.Dir(path), ""
	if file, err := filepath.EvalSymlinks(path); err == nil && filepath.Dir(file) != dir {
		target = filepath.Dir(file)
	}
	if r.target != "" && r.target != target {
		_ = watcher.Remove(r.target) // it may be gone
	}
	r.target = target
	if target != "" {
		_ = watcher.Add(target) // or else the file is read every now and then
	}
	return watcher.Add(dir)
}

// reload reads the file, and applies it if it is another than before. One that
// is wrong, or not there, leaves everything as it is, and is reported once.
func (r *reloader) reload(ctx context.Context) {
	next, content, err := load(r.flags)
	if err != nil {
		now := broken{err: err.Error()}
		now.content, _ = os.ReadFile(r.flags["config"]) // nothing if it is not there
		if r.broken != nil && r.broken.err == now.err && slices.Equal(r.broken.content, now.content) {
			return
		}
		r.broken = &now
		r.log.ErrorContext(ctx, "the configuration file is left aside, and the one before stays in use: mend it", "error", err)
		r.done(err)
		return
	}
	if slices.Equal(content, r.content) && r.broken == nil {
		return
	}
	r.content, r.broken = content, nil
	r.apply(ctx, next)
	r.done(nil)
}
