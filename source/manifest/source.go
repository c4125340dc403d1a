package manifest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"

	"fairlead.io/fairlead/internal/inotify"
	"fairlead.io/fairlead/kube"
)

const (
	// coalesceDelay is how long events are collected after the first one: an editor causes
	// several for one save, and a writer truncates a file before it fills it.
	coalesceDelay = 2 * time.Millisecond
	// retryDelay is when an unreadable file is read again, in case it was being written.
	retryDelay = 150 * time.Millisecond
	// emptyFileDelay is how long after its last event a file must have no objects before
	// its previous objects are deleted. In "kubectl get > a.yaml", the shell empties the
	// file at once, and kubectl fills it when it has the response.
	emptyFileDelay = 2 * time.Second
	// pollPeriod is how often the folder is read while a limit of the kernel prevents watching
	// it. It is longer than the delays above, because each reading restarts them.
	pollPeriod = 5 * time.Second
)

// Options configures a [Source].
type Options struct {
	// Dir is the folder with the files.
	Dir string
	// ServiceCIDRs are the networks to allocate cluster IPs from, at most one per IP
	// family. The family of the first one is the default for Services that do not specify a
	// family.
	ServiceCIDRs []netip.Prefix
	// NodeName is the node of Pods without spec.nodeName.
	NodeName string
	// Logger receives errors and warnings about the files. Nil discards them.
	Logger *slog.Logger
}

// Source delivers the Kubernetes objects of a folder.
type Source struct {
	opts   Options
	log    *slog.Logger
	model  *model
	hashes map[string][sha256.Size]byte
	// loggedErrors has the current errors, which have been logged.
	loggedErrors map[string]bool
	// loggedSkipped has the logged warning about skipped kinds of each file.
	loggedSkipped map[string]string
	// loggedWarnings has the logged warnings of each file that still apply.
	loggedWarnings map[string][]string
	// loggedDangling has the dangling links that have been logged, and their targets.
	loggedDangling map[string]string
	// watcher is nil unless the folder is watched. Only Run uses it.
	watcher *fsnotify.Watcher
	// loggedLimit is the logged reason why the folder is not watched, empty if it is.
	loggedLimit string
}

// New returns a Source for the folder. It starts nothing. It returns an error if the folder
// cannot be read or a network in ServiceCIDRs is invalid.
func New(opts Options) (*Source, error) {
	addrs, err := newAddressAllocator(opts.ServiceCIDRs)
	if err != nil {
		return nil, err
	}
	if _, err := readDir(opts.Dir); err != nil {
		return nil, err
	}
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Source{
		opts:           opts,
		log:            log,
		model:          newModel(opts.NodeName, addrs),
		hashes:         map[string][sha256.Size]byte{},
		loggedErrors:   map[string]bool{},
		loggedSkipped:  map[string]string{},
		loggedWarnings: map[string][]string{},
		loggedDangling: map[string]string{},
	}, nil
}

// Load reads the folder once and returns its objects, as in the first Delta of
// [Source.Run]. If files have errors, Load returns an error of type [Errors] and a Delta
// with the valid objects.
func Load(opts Options) (kube.Delta, error) {
	s, err := New(opts)
	if err != nil {
		return kube.Delta{}, err
	}
	d, _, err := s.readAll(alwaysFinal)
	if err != nil {
		return kube.Delta{}, err
	}
	if errs := s.model.errors(); len(errs) > 0 {
		return d, errs
	}
	return d, nil
}

// Run reads the folder, delivers its objects, even if the folder is empty, and then each
// change. It blocks until ctx is done and then returns nil. If the folder can no longer be
// read, Run returns an error. It calls deliver synchronously, one call at a time. Run must
// be called only once.
//
// Run logs each error in a file once, when it appears, and each allocated node port. While a
// limit of the kernel prevents watching the folder, Run reads it periodically.
func (s *Source) Run(ctx context.Context, deliver func(kube.Delta)) error {
	defer func() {
		if s.watcher != nil {
			_ = s.watcher.Close()
		}
	}()
	// Watch before the first read, so that no change is missed.
	if err := s.watch(); err != nil {
		return err
	}
	return s.run(ctx, deliver)
}

// watch watches the folder. If a limit of the kernel prevents this, watch logs the limit, and
// s.watcher is nil.
func (s *Source) watch() error {
	var err error
	if s.watcher == nil {
		s.watcher, err = fsnotify.NewWatcher()
	}
	if err == nil {
		if err = s.watcher.Add(s.opts.Dir); err != nil {
			_ = s.watcher.Close()
		}
	}
	if err == nil {
		if s.loggedLimit != "" {
			s.log.Info("folder is watched again", slog.String("folder", s.opts.Dir))
			s.loggedLimit = ""
		}
		return nil
	}
	s.watcher = nil
	err = inotify.Explain(pathErrorCause(err))
	if _, ok := errors.AsType[*inotify.LimitError](err); !ok {
		return fmt.Errorf("watch folder %s: %w", s.opts.Dir, err)
	}
	if s.loggedLimit != err.Error() {
		s.log.Warn("folder cannot be watched; reading it periodically until it can", slog.String("folder", s.opts.Dir),
			slog.Duration("period", pollPeriod), slog.Any("error", err))
		s.loggedLimit = err.Error()
	}
	return nil
}

// run reads the folder, delivers its objects, and then each change.
func (s *Source) run(ctx context.Context, deliver func(kube.Delta)) error {
	d, retries, err := s.readAll(neverFinal)
	if err != nil {
		return err
	}
	s.logChanges()
	deliver(d)
	return s.watchLoop(ctx, retries, deliver)
}

// pendingReads has the files to read next.
type pendingReads struct {
	files         map[string]bool
	allFiles      bool
	folderRemoved bool // the folder itself may have been removed
}

func (p *pendingReads) any() bool { return p.allFiles || p.folderRemoved || len(p.files) > 0 }

// retrySchedule has the time at which to read each file again.
type retrySchedule map[string]time.Time

// due removes and returns the files whose time has come.
func (r retrySchedule) due(now time.Time) []string {
	var names []string
	for _, name := range sortedKeys(r) {
		if !r[name].After(now) {
			names = append(names, name)
			delete(r, name)
		}
	}
	return names
}

// resetTimer sets the timer to the earliest time.
func (r retrySchedule) resetTimer(timer *time.Timer) {
	timer.Stop()
	var first time.Time
	for _, at := range r {
		if first.IsZero() || at.Before(first) {
			first = at
		}
	}
	if !first.IsZero() {
		timer.Reset(time.Until(first))
	}
}

// neverFinal and alwaysFinal select the files for which [Source.readFiles] schedules no further
// read, so that it accepts their current content.
func neverFinal(string) bool  { return false }
func alwaysFinal(string) bool { return true }

// watchLoop is the loop of Run. retries has the delay until a file must be read again.
func (s *Source) watchLoop(ctx context.Context, retries map[string]time.Duration, deliver func(kube.Delta)) error {
	next := pendingReads{files: map[string]bool{}}
	coalesce, retry, poll := newStoppedTimer(), newStoppedTimer(), newStoppedTimer()
	defer coalesce.Stop()
	defer retry.Stop()
	defer poll.Stop()
	schedule := retrySchedule{}
	coalescing, polling := false, false
	for {
		for name, after := range retries {
			schedule[name] = time.Now().Add(after)
		}
		retries = nil
		schedule.resetTimer(retry)
		final := map[string]bool{}
		var events <-chan fsnotify.Event
		var failures <-chan error
		if s.watcher != nil {
			events, failures = s.watcher.Events, s.watcher.Errors
		} else if !polling {
			polling = true
			poll.Reset(pollPeriod)
		}
		select {
		case <-ctx.Done():
			return nil
		case event, ok := <-events:
			if !ok {
				return fmt.Errorf("watch folder %s: the watch ended", s.opts.Dir)
			}
			s.addEvent(&next, event)
			if next.any() && !coalescing {
				coalescing = true
				coalesce.Reset(coalesceDelay)
			}
			continue
		case err, ok := <-failures:
			if !ok {
				return fmt.Errorf("watch folder %s: the watch ended", s.opts.Dir)
			}
			// Events may be lost, so read all files.
			s.log.WarnContext(ctx, "watch lost events, reading the folder again",
				slog.String("folder", s.opts.Dir), slog.Any("error", err))
			next.allFiles = true
			if !coalescing {
				coalescing = true
				coalesce.Reset(coalesceDelay)
			}
			continue
		case <-coalesce.C:
			coalescing = false
		case <-retry.C:
			for _, name := range schedule.due(time.Now()) {
				// A pending event of the file restarts the delay.
				final[name] = !next.allFiles && !next.folderRemoved && !next.files[name]
				next.files[name] = true
			}
		case <-poll.C:
			polling = false
			if err := s.watch(); err != nil {
				return err
			}
			next.allFiles = true
		}
		var d kube.Delta
		var err error
		if next.folderRemoved {
			// Another folder may have replaced it.
			if err := s.watch(); err != nil {
				return err
			}
		}
		last := func(name string) bool { return final[name] }
		if next.allFiles || next.folderRemoved {
			d, retries, err = s.readAll(last)
			clear(schedule)
		} else {
			names := sortedKeys(next.files)
			d, retries = s.readFiles(names, last)
			for _, name := range names {
				delete(schedule, name)
			}
		}
		if err != nil {
			return err
		}
		next = pendingReads{files: map[string]bool{}}
		s.logChanges()
		if !isEmpty(d) {
			deliver(d)
		}
	}
}

func newStoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

func isEmpty(d kube.Delta) bool {
	return len(d.Services)+len(d.DeletedServices)+len(d.EndpointSlices)+len(d.DeletedEndpointSlices) == 0
}

// addEvent adds to next the files that an event concerns.
func (s *Source) addEvent(next *pendingReads, event fsnotify.Event) {
	name := filepath.Base(event.Name)
	switch {
	case filepath.Clean(event.Name) == filepath.Clean(s.opts.Dir):
		// The last events of a removed folder arrive in any order.
		next.folderRemoved = next.folderRemoved || event.Has(fsnotify.Remove) || event.Has(fsnotify.Rename)
	case strings.HasPrefix(name, ".."):
		// In a mounted ConfigMap all files are links through ..data, which is replaced.
		next.allFiles = true
	case isManifest(name):
		next.files[name] = true
	}
}

// isManifest reports whether a file with this name is read.
func isManifest(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return true
	default:
		return false
	}
}

func readDir(dir string) ([]fs.DirEntry, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read folder %s: %w", dir, pathErrorCause(err))
	}
	return entries, nil
}

// pathErrorCause returns the cause of a file error, without its path.
func pathErrorCause(err error) error {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return pathErr.Err
	}
	return err
}

// readAll reads all files of the folder, and all files that existed before.
func (s *Source) readAll(final func(name string) bool) (kube.Delta, map[string]time.Duration, error) {
	entries, err := readDir(s.opts.Dir)
	if err != nil {
		return kube.Delta{}, nil, err
	}
	names := map[string]bool{}
	for name := range s.model.files {
		names[name] = true
	}
	for _, entry := range entries {
		if isManifest(entry.Name()) {
			names[entry.Name()] = true
		}
	}
	d, retries := s.readFiles(sortedKeys(names), final)
	return d, retries, nil
}

// readFiles reads files and returns the resulting changes, and the delay until a file must
// be read again. If final is true for a file, its current content is accepted.
func (s *Source) readFiles(names []string, final func(name string) bool) (d kube.Delta, retries map[string]time.Duration) {
	files := map[string]*parsedFile{}
	retries = map[string]time.Duration{}
	retry := func(name string, after time.Duration) {
		if !final(name) {
			retries[name] = after
		}
	}
	for _, name := range names {
		data, exists, err := readFile(filepath.Join(s.opts.Dir, name))
		old := s.model.files[name]
		switch {
		case err != nil:
			delete(s.hashes, name)
			files[name] = &parsedFile{
				errs:         []*Error{{File: name, Line: 1, Message: fmt.Sprintf("cannot be read: %v%s", pathErrorCause(err), readErrorHint(err))}},
				unidentified: true,
			}
			retry(name, retryDelay)
			continue
		case !exists:
			delete(s.hashes, name)
			delete(s.loggedSkipped, name)
			delete(s.loggedWarnings, name)
			if s.isDanglingLink(name, final(name)) {
				retry(name, retryDelay)
			}
			if old != nil {
				files[name] = nil
			}
			continue
		}
		delete(s.loggedDangling, name)
		hash := sha256.Sum256(data)
		if s.hashes[name] == hash && old != nil {
			continue
		}
		file := parseFile(name, data)
		emptied := old != nil && len(old.objects) > 0 && len(file.objects) == 0 && len(file.errs) == 0
		if emptied && !final(name) {
			// Probably emptied by a writer that will fill it.
			retry(name, emptyFileDelay)
			continue
		}
		if emptied {
			s.log.Info("file has no objects any more; its previous objects are deleted", slog.String("file", name),
				slog.Int("objects", len(old.objects)), slog.Int("bytes", len(data)))
		}
		s.hashes[name] = hash
		files[name] = file
		s.logWarnings(name, file)
		if len(file.errs) > 0 {
			retry(name, retryDelay)
		}
	}
	return s.model.update(files), retries
}

// readErrorHint returns the fix for a file that cannot be read, if it is known.
func readErrorHint(err error) string {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return ": check its permissions"
	case errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENOTDIR):
		return ": correct the link"
	default:
		return ""
	}
}

// isDanglingLink reports whether name is a link to a missing file. If final is true, it
// logs a warning once: the links of a mounted ConfigMap dangle for a moment before they are
// removed.
func (s *Source) isDanglingLink(name string, final bool) bool {
	to, err := os.Readlink(filepath.Join(s.opts.Dir, name))
	if err != nil {
		delete(s.loggedDangling, name)
		return false
	}
	if final && s.loggedDangling[name] != to {
		s.log.Warn("dangling link, nothing is read", slog.String("file", name), slog.String("to", to))
		s.loggedDangling[name] = to
	}
	return true
}

// readFile returns the content of a file. It reports false if the file does not exist or is
// not a regular file.
func readFile(path string) ([]byte, bool, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, false, nil
	case err != nil:
		return nil, false, err
	case !info.Mode().IsRegular():
		return nil, false, nil
	}
	data, err := os.ReadFile(path) //nolint:gosec // the folder is the operator's choice
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	return data, err == nil, err
}

// logChanges logs new errors and newly allocated node ports.
func (s *Source) logChanges() {
	for _, g := range s.model.unloggedPorts {
		what := "health check"
		if g.key.port != 0 {
			what = nodePort{g.key.protocol, g.key.port}.String()
		}
		s.log.Info("node port allocated", slog.String("service", g.service.String()), slog.String("port", what), slog.Int("node_port", int(g.port.number)))
	}
	s.model.unloggedPorts = nil
	now := map[string]bool{}
	for _, err := range s.model.errors() {
		text := err.Error()
		now[text] = true
		if !s.loggedErrors[text] {
			s.log.Error("manifest is not valid; its last valid objects stay in place", slog.String("file", err.File), slog.Any("error", err))
		}
	}
	s.loggedErrors = now
}

// logWarnings logs skipped kinds and objects without effect, once until they change.
func (s *Source) logWarnings(name string, file *parsedFile) {
	text := strings.Join(file.skipped, ", ")
	if text != "" && text != s.loggedSkipped[name] {
		s.log.Warn("file has objects of kinds that are not supported", slog.String("file", name), slog.String("ignored", text),
			slog.String("supported", "Service, Pod, EndpointSlice"))
	}
	s.loggedSkipped[name] = text
	var warnings []string
	for _, err := range file.warnings {
		text := err.Error()
		warnings = append(warnings, text)
		if !slices.Contains(s.loggedWarnings[name], text) {
			s.log.Warn("object has no effect", slog.String("file", name), slog.String("reason", text))
		}
	}
	s.loggedWarnings[name] = warnings
}
