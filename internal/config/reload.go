package config

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"

	"fairlead.io/fairlead/internal/inotify"
)

// Load returns the configuration from flags and, if --config is set, from its file. content
// is the content of the file, nil without --config.
func Load(flags Flags) (c Config, content []byte, err error) {
	path, ok := flags["config"]
	if !ok {
		c, err = parse(fromFlags(flags))
		c.Fields = c.fields(flags, nil)
		return c, nil, err
	}
	file, err := readConfigFile(path, flags["mode"])
	if err != nil {
		// Report invalid flags together with the broken file.
		_, flagsErr := parse(fromFlags(flags))
		return c, nil, errors.Join(err, flagsErr)
	}
	c, err = parse(mergeConfigFile(flags, file))
	c.Fields = c.fields(flags, &file)
	return c, file.content, err
}

const (
	// quietPeriod is how long the file must stay unchanged before it is read, because a
	// file written in place is empty for a moment. maxQuietWait limits the wait for a
	// file that keeps changing.
	quietPeriod  = 100 * time.Millisecond
	maxQuietWait = 10 * quietPeriod
	// pollPeriod is how often the file is read without a notification, because symlinks
	// may lead through folders that are not watched. retryPeriod replaces it while the
	// file is missing or invalid, or while a folder of the file cannot be watched.
	pollPeriod  = 30 * time.Second
	retryPeriod = time.Second
)

// Reloader watches the configuration file and applies its changes.
type Reloader struct {
	options ReloaderOptions
	// content is the content that was applied last.
	content []byte

	// Only Run uses the fields below.
	rejected *rejectedFile // the last failure reported, nil after a success
	// watcher is nil until the kernel has created an inotify instance.
	watcher *fsnotify.Watcher
	// unwatched is the last reported reason why folders of the file are not watched, empty if they are.
	unwatched string
	// targetDir is the folder of the file after resolving symlinks, empty if it is the
	// folder of the path.
	targetDir string
}

// ReloaderOptions are the dependencies and settings of a [Reloader].
type ReloaderOptions struct {
	// Flags contains the path of the file, and Content is the content from [Load].
	Flags   Flags
	Content []byte
	Logger  *slog.Logger
	// Apply is called with each valid configuration, and OnResult with the result of each
	// new content.
	Apply    func(context.Context, Config)
	OnResult func(error)

	poll time.Duration // overrides pollPeriod if not 0
}

// NewReloader returns a Reloader for the file of --config.
func NewReloader(o ReloaderOptions) *Reloader {
	o.poll = cmp.Or(o.poll, pollPeriod)
	return &Reloader{options: o, content: o.Content}
}

// rejectedFile describes a file that was not applied.
type rejectedFile struct {
	content []byte
	err     string
}

// Run follows the file until ctx is done. While the kernel does not let it watch the file's
// folder, it reads the file periodically.
func (r *Reloader) Run(ctx context.Context) error {
	path := filepath.Clean(r.options.Flags["config"])
	defer func() {
		if r.watcher != nil {
			_ = r.watcher.Close()
		}
	}()
	err := r.addWatches(path)
	r.logWatchResult(ctx, path, err)
	// The file may have changed before the watch started.
	quiet := time.NewTimer(quietPeriod)
	defer quiet.Stop()
	pending, limit := true, time.Now().Add(maxQuietWait)
	schedule := func(own bool) {
		switch now := time.Now(); {
		case !pending:
			pending, limit = true, now.Add(maxQuietWait)
			quiet.Reset(quietPeriod)
		case own: // events for other files do not extend the wait
			quiet.Reset(min(quietPeriod, limit.Sub(now)))
		}
	}
	poll := time.NewTimer(r.options.poll)
	defer poll.Stop()
	for {
		var events <-chan fsnotify.Event
		var failures <-chan error
		if r.watcher != nil {
			events, failures = r.watcher.Events, r.watcher.Errors
		}
		select {
		case <-ctx.Done():
			return nil
		case <-poll.C:
			schedule(false)
		case <-quiet.C:
			err := r.addWatches(path) // before reading, so that no change is missed
			r.logWatchResult(ctx, path, err)
			if wait := r.reload(ctx, limit); wait > 0 {
				quiet.Reset(wait)
				continue
			}
			pending = false
			next := r.options.poll
			if err != nil || r.rejected != nil {
				next = min(next, retryPeriod)
			}
			poll.Reset(next)
		case event, ok := <-events:
			if !ok {
				return nil
			}
			own := filepath.Base(path) == filepath.Base(event.Name)
			schedule(own || filepath.Dir(event.Name) == r.targetDir)
		case err, ok := <-failures:
			if !ok {
				return nil
			}
			r.options.Logger.WarnContext(ctx, "configuration file watch failed and may have missed changes; reading the file", "error", err)
			schedule(false)
		}
	}
}

// addWatches watches the folder of the file rather than the file, because editors replace
// files by renaming, and the kubelet replaces the folder that a ConfigMap's files link to. If
// the path is a symlink, addWatches also watches the folder of its target. Calls that find the
// same folders have no effect.
func (r *Reloader) addWatches(path string) error {
	if r.watcher == nil {
		watcher, err := fsnotify.NewWatcher()
		if err != nil {
			return inotify.Explain(err)
		}
		r.watcher = watcher
	}
	dir, target := filepath.Dir(path), ""
	if file, err := filepath.EvalSymlinks(path); err == nil && filepath.Dir(file) != dir {
		target = filepath.Dir(file)
	}
	if r.targetDir != "" && r.targetDir != target {
		_ = r.watcher.Remove(r.targetDir) // the folder may no longer exist
	}
	r.targetDir = target
	var targetErr error
	if target != "" {
		targetErr = r.watcher.Add(target)
	}
	return inotify.Explain(cmp.Or(r.watcher.Add(dir), targetErr))
}

// logWatchResult logs when the file's folders cannot be watched, and when they can again. A
// missing folder is reported with the missing file.
func (r *Reloader) logWatchResult(ctx context.Context, path string, err error) {
	reason := ""
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		reason = err.Error()
	}
	switch reason {
	case r.unwatched:
	case "":
		r.options.Logger.InfoContext(ctx, "configuration file is watched again", "file", path)
	default:
		r.options.Logger.WarnContext(ctx, "configuration file cannot be watched; reading it periodically until it can", "file", path,
			"period", retryPeriod, "error", err)
	}
	r.unwatched = reason
}

// reload reads the file and applies changed content. A missing or invalid file is reported
// once and changes nothing. If a program may be writing the file, reload returns how long to wait
// before it must be called again, at most until limit.
func (r *Reloader) reload(ctx context.Context, limit time.Time) (wait time.Duration) {
	next, content, err := Load(r.options.Flags)
	// The timer may have started at an event for another file. Then the file may have been read
	// between the calls that truncate and write it.
	if wait := min(quietPeriod-sinceModified(r.options.Flags["config"]), time.Until(limit)); wait > 0 {
		return wait
	}
	if err != nil {
		now := rejectedFile{err: err.Error()}
		now.content, _ = os.ReadFile(r.options.Flags["config"]) // empty if the file does not exist
		if r.rejected != nil && r.rejected.err == now.err && slices.Equal(r.rejected.content, now.content) {
			return 0
		}
		r.rejected = &now
		r.options.Logger.ErrorContext(ctx, "configuration file is invalid; keeping the previous configuration until it is fixed", "error", err)
		r.options.OnResult(err)
		return 0
	}
	if slices.Equal(content, r.content) && r.rejected == nil {
		return 0
	}
	r.content, r.rejected = content, nil
	r.options.Apply(ctx, next)
	r.options.OnResult(nil)
	return 0
}

// sinceModified returns the age of the file's content, or quietPeriod if there is no file.
func sinceModified(path string) time.Duration {
	info, err := os.Stat(path)
	if err != nil {
		return quietPeriod
	}
	return time.Since(info.ModTime())
}
