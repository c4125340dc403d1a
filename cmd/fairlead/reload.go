package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

// settleTime is how long a file must have been left alone to be read: one that
// is written in place is empty for a moment.
const settleTime = 100 * time.Millisecond

// reloader follows the configuration file.
type reloader struct {
	flags   given
	content []byte
	log     *slog.Logger
	// apply is given each configuration that is valid, and done what became of
	// each new content.
	apply func(context.Context, config)
	done  func(error)
}

// run blocks until ctx is done, or until the folder can't be watched.
func (r *reloader) run(ctx context.Context) error {
	path := r.flags["config"]
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("--config: watch %s: %w", path, err)
	}
	defer watcher.Close() //nolint:errcheck // nothing was written
	// The folder, as a file is often replaced by renaming another: by editors,
	// and by the kubelet, which swaps the folder that a ConfigMap's files link to.
	if err := watcher.Add(filepath.Dir(path)); err != nil {
		return fmt.Errorf("--config: watch the folder of %s: %w", path, err)
	}
	// It may have changed before it was watched.
	settled := time.NewTimer(settleTime)
	defer settled.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-settled.C:
			r.reload(ctx)
		case _, ok := <-watcher.Events:
			if !ok {
				return nil
			}
			settled.Reset(settleTime)
		case err, ok := <-watcher.Errors:
			if !ok {
				return nil
			}
			r.log.WarnContext(ctx, "changes of the configuration file may have been missed; reading it", "error", err)
			settled.Reset(settleTime)
		}
	}
}

// reload reads the file, and applies it if it is another than before. One that
// is wrong, or not there, leaves everything as it is.
func (r *reloader) reload(ctx context.Context) {
	next, content, err := load(r.flags)
	if err != nil {
		r.log.ErrorContext(ctx, "the configuration file is left aside, and the one before stays in use: mend it", "error", err)
		r.content = nil
		r.done(err)
		return
	}
	if slices.Equal(content, r.content) {
		return
	}
	r.content = content
	r.apply(ctx, next)
	r.done(nil)
}
