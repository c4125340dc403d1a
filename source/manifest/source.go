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

	"fairlead.io/fairlead/kube"
)

const (
	// coalesceDelay is how long events gather after the first: an editor makes several
	// for one save, and a writer truncates a file before it fills it.
	coalesceDelay = 2 * time.Millisecond
	// retryDelay is when a file that could not be read is looked at once more, in
	// case it was being written.
	retryDelay = 150 * time.Millisecond
	// emptyFileDelay is how long after its last event a file must be without objects
	// to lose those that it had: a shell empties the file of kubectl get > a.yaml
	// at once, and kubectl fills it when it has the answer.
	emptyFileDelay = 2 * time.Second
)

// Options say what to read and how to complete it.
type Options struct {
	// Dir is the folder with the files.
	Dir string
	// ServiceCIDRs are the networks that Services without an address get one
	// from, at most one of each family. The first is the family that Services
	// have when they do not say.
	ServiceCIDRs []netip.Prefix
	// NodeName is the node of Pods that do not name one.
	NodeName string
	// Logger takes errors and warnings about the files. Nil discards them.
	Logger *slog.Logger
}

// Source reads a folder of Kubernetes objects and watches it.
type Source struct {
	opts   Options
	log    *slog.Logger
	model  *model
	hashes map[string][sha256.Size]byte
	// loggedErrors has the errors of now, which were logged.
	loggedErrors map[string]bool
	// loggedSkipped has the warning about each file with kinds that are not read.
	loggedSkipped map[string]string
	// loggedWarnings has the warnings about each file that were logged and still hold.
	loggedWarnings map[string][]string
	// loggedDangling has the links that were warned of, and where they lead.
	loggedDangling map[string]string
}

// New returns a Source for the folder. It starts nothing. The error names the
// folder if it cannot be read, or the network in ServiceCIDRs that cannot be
// used.
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

// Load reads the folder once and returns everything in it, as the first Delta
// of [Source.Run] would hold it. If something is wrong with files, the error is
// of type [Errors], and the Delta has what is right.
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

// Run reads the folder, delivers everything in it, even if that is nothing, and
// then delivers each change. It blocks until ctx is done, and then returns nil;
// or until the folder can be read no more, and then returns an error that names
// it. deliver is called from within Run, one call at a time. Run must be called
// only once.
//
// What is wrong with files is logged once, when it appears, and so are the node
// ports that Services are given.
func (s *Source) Run(ctx context.Context, deliver func(kube.Delta)) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch folder %s: %w", s.opts.Dir, err)
	}
	defer func() { _ = watcher.Close() }()
	// The watch begins before the first reading, so that nothing is missed.
	if err := watcher.Add(s.opts.Dir); err != nil {
		return fmt.Errorf("watch folder %s: %w", s.opts.Dir, err)
	}
	return s.run(ctx, watcher, deliver)
}

// run reads the folder, delivers everything, and then each change that the
// watcher announces.
func (s *Source) run(ctx context.Context, watcher *fsnotify.Watcher, deliver func(kube.Delta)) error {
	d, again, err := s.readAll(neverFinal)
	if err != nil {
		return err
	}
	s.logChanges()
	deliver(d)
	return s.watchLoop(ctx, watcher, again, deliver)
}

// pendingReads is what the next reading has to look at.
type pendingReads struct {
	files         map[string]bool
	allFiles      bool
	folderRemoved bool // the folder itself may be
}

func (p *pendingReads) any() bool { return p.allFiles || p.folderRemoved || len(p.files) > 0 }

// retrySchedule says when to look at files once more.
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

// Which files are read for the last time, so that what they are now is believed.
func neverFinal(string) bool  { return false }
func alwaysFinal(string) bool { return true }

// watchLoop is the loop of Run. again has the files to look at once more, and after
// how long.
func (s *Source) watchLoop(ctx context.Context, watcher *fsnotify.Watcher, again map[string]time.Duration, deliver func(kube.Delta)) error {
	next := pendingReads{files: map[string]bool{}}
	settled, retry := newStoppedTimer(), newStoppedTimer()
	defer settled.Stop()
	defer retry.Stop()
	later := retrySchedule{}
	waiting := false
	for {
		for name, after := range again {
			later[name] = time.Now().Add(after)
		}
		again = nil
		later.resetTimer(retry)
		final := map[string]bool{}
		select {
		case <-ctx.Done():
			return nil
		case event, ok := <-watcher.Events:
			if !ok {
				return fmt.Errorf("watch folder %s: the watch ended", s.opts.Dir)
			}
			s.addEvent(&next, event)
			if next.any() && !waiting {
				waiting = true
				settled.Reset(coalesceDelay)
			}
			continue
		case err, ok := <-watcher.Errors:
			if !ok {
				return fmt.Errorf("watch folder %s: the watch ended", s.opts.Dir)
			}
			// Events may be lost, so nothing is known.
			s.log.WarnContext(ctx, "watch lost events, reading the folder again",
				slog.String("folder", s.opts.Dir), slog.Any("error", err))
			next.allFiles = true
			if !waiting {
				waiting = true
				settled.Reset(coalesceDelay)
			}
			continue
		case <-settled.C:
			waiting = false
		case <-retry.C:
			for _, name := range later.due(time.Now()) {
				// An event that waits to be dealt with begins its time anew.
				final[name] = !next.allFiles && !next.folderRemoved && !next.files[name]
				next.files[name] = true
			}
		}
		var d kube.Delta
		var err error
		if next.folderRemoved {
			// Something else may be in its place by now.
			if err := watcher.Add(s.opts.Dir); err != nil {
				return fmt.Errorf("watch folder %s: %w", s.opts.Dir, pathErrorCause(err))
			}
		}
		last := func(name string) bool { return final[name] }
		if next.allFiles || next.folderRemoved {
			d, again, err = s.readAll(last)
			clear(later)
		} else {
			names := sortedKeys(next.files)
			d, again = s.readFiles(names, last)
			for _, name := range names {
				delete(later, name)
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

// addEvent adds to next what an event is about.
func (s *Source) addEvent(next *pendingReads, event fsnotify.Event) {
	name := filepath.Base(event.Name)
	switch {
	case filepath.Clean(event.Name) == filepath.Clean(s.opts.Dir):
		// The folder's last events come in any order.
		next.folderRemoved = next.folderRemoved || event.Has(fsnotify.Remove) || event.Has(fsnotify.Rename)
	case strings.HasPrefix(name, ".."):
		// A mounted ConfigMap: all files lead through the link ..data, which is
		// replaced.
		next.allFiles = true
	case isManifest(name):
		next.files[name] = true
	}
}

// isManifest reports whether a file of this name is read.
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

// pathErrorCause returns what went wrong with a file, without its path.
func pathErrorCause(err error) error {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return pathErr.Err
	}
	return err
}

// readAll reads all files of the folder, those included that were there before.
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
	d, again := s.readFiles(sortedKeys(names), final)
	return d, again, nil
}

// readFiles reads files and returns what they change, and those to look at once more
// after a while. It believes what it sees of a file for which final is true.
func (s *Source) readFiles(names []string, final func(name string) bool) (d kube.Delta, again map[string]time.Duration) {
	files := map[string]*parsedFile{}
	again = map[string]time.Duration{}
	retry := func(name string, after time.Duration) {
		if !final(name) {
			again[name] = after
		}
	}
	for _, name := range names {
		data, there, err := readFile(filepath.Join(s.opts.Dir, name))
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
		case !there:
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
		vanished := old != nil && len(old.objects) > 0 && len(file.objects) == 0 && len(file.errs) == 0
		if vanished && !final(name) {
			// Emptied by a writer that is about to fill it, most likely.
			retry(name, emptyFileDelay)
			continue
		}
		if vanished {
			s.log.Info("file has no objects any more, so those that it had are gone", slog.String("file", name),
				slog.Int("objects", len(old.objects)), slog.Int("bytes", len(data)))
		}
		s.hashes[name] = hash
		files[name] = file
		s.logWarnings(name, file)
		if len(file.errs) > 0 {
			retry(name, retryDelay)
		}
	}
	return s.model.update(files), again
}

// readErrorHint says what to do about a file that cannot be read, if that is known.
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

// isDanglingLink reports whether the name is that of a link that leads nowhere. It warns
// of that once, if it is final: the links of a mounted ConfigMap dangle for a
// moment before they are removed.
func (s *Source) isDanglingLink(name string, final bool) bool {
	to, err := os.Readlink(filepath.Join(s.opts.Dir, name))
	if err != nil {
		delete(s.loggedDangling, name)
		return false
	}
	if final && s.loggedDangling[name] != to {
		s.log.Warn("link leads to no file, so nothing is read", slog.String("file", name), slog.String("to", to))
		s.loggedDangling[name] = to
	}
	return true
}

// readFile reports false for what is not a file, or is gone.
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

// logChanges logs the errors that are new, and the node ports that were given.
func (s *Source) logChanges() {
	for _, g := range s.model.unloggedPorts {
		what := "health check"
		if g.key.port != 0 {
			what = nodePort{g.key.protocol, g.key.port}.String()
		}
		s.log.Info("node port given", slog.String("service", g.service.String()), slog.String("port", what), slog.Int("node_port", int(g.port.number)))
	}
	s.model.unloggedPorts = nil
	now := map[string]bool{}
	for _, err := range s.model.errors() {
		text := err.Error()
		now[text] = true
		if !s.loggedErrors[text] {
			s.log.Error("manifest is not valid, its last good objects stay", slog.String("file", err.File), slog.Any("error", err))
		}
	}
	s.loggedErrors = now
}

// logWarnings logs which objects of a file are not read, and which do nothing, once
// until that changes.
func (s *Source) logWarnings(name string, file *parsedFile) {
	text := strings.Join(file.skipped, ", ")
	if text != "" && text != s.loggedSkipped[name] {
		s.log.Warn("file has objects of kinds that are not read", slog.String("file", name), slog.String("ignored", text),
			slog.String("read", "Service, Pod, EndpointSlice"))
	}
	s.loggedSkipped[name] = text
	var idle []string
	for _, err := range file.warnings {
		text := err.Error()
		idle = append(idle, text)
		if !slices.Contains(s.loggedWarnings[name], text) {
			s.log.Warn("object is read, but does nothing", slog.String("file", name), slog.String("reason", text))
		}
	}
	s.loggedWarnings[name] = idle
}
