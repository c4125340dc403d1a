package apiserver

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	// listTimeout bounds the answer to a request for a list. kube-apiserver ends
	// such requests after a minute itself (--request-timeout).
	listTimeout = 2 * time.Minute
	// streamTimeout is the time that a streamed list has until its closing bookmark.
	// It is extended while objects arrive at streamMinEvents in streamExtension.
	streamTimeout   = time.Minute
	streamExtension = 10 * time.Second
	streamMinEvents = 100
	// streamingDisabledFor is how long lists are not streamed after one was not finished.
	streamingDisabledFor = time.Hour
	// silenceCheckPeriod is as long as kube-apiserver waits between bookmarks at most, and
	// maxSilentPeriods is how many times that a watch may be silent.
	silenceCheckPeriod = time.Minute
	maxSilentPeriods   = 3
	// verifyDelayMin and verifyDelayMax are how long after a watch has begun it is verified
	// that resource versions did not go backwards. A watch that has expired ends
	// earlier. verifyAttempts requests are made, verifyPause apart.
	verifyDelayMin, verifyDelayMax = time.Second, 5 * time.Second
	verifyPause                    = 10 * time.Second
	verifyAttempts                 = 4
	// longOutageAfter is how long requests may fail until a watch is not continued but
	// everything is listed. A server that was restored from a backup meanwhile may
	// have reached higher versions than before.
	longOutageAfter = 5 * time.Minute
)

// errStreamingDisabled has the reflector list without streaming.
var errStreamingDisabled = errors.New("streamed lists were not finished before")

// errRelist has the reflector list instead of continuing a watch.
var errRelist = errors.New("everything is listed again")

// cancelingWatch is a watch that ends when it is stopped or when it makes no progress.
type cancelingWatch struct {
	watch.Interface

	cancel context.CancelFunc
}

// Stop ends the watch.
func (s cancelingWatch) Stop() {
	s.cancel()
	s.Interface.Stop()
}

// watchdog is what ends a watch that makes no progress.
type watchdog struct {
	*resourceReflector
	// cancel ends the watch with an error, after which the reflector lists.
	cancel context.CancelFunc
	opened chan watch.Interface
	// streamed says that the watch begins with a list, and version is where it
	// begins otherwise.
	streamed bool
	version  string
	// listsBefore is how many lists were complete before the watch.
	listsBefore uint64
	// verifyVersions says that resource versions may have gone backwards, and away that
	// requests have failed for long.
	verifyVersions, longOutage bool
}

// watch makes a watch that is ended when it makes no progress.
func (l *resourceReflector) watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	sup := &watchdog{
		resourceReflector: l, opened: make(chan watch.Interface, 1), streamed: opts.SendInitialEvents != nil, version: opts.ResourceVersion,
		listsBefore: l.progress.completeLists.Load(),
	}
	if !sup.streamed && l.progress.requireConsistent.Load() {
		return nil, errRelist
	}
	if sup.streamed {
		if l.progress.streamingDisabled() {
			return nil, errStreamingDisabled
		}
		l.source.queue.beginList(l.resource)
		if l.progress.requireConsistent.Load() {
			opts.ResourceVersion = ""
		}
	}
	sup.verifyVersions, sup.longOutage = l.progress.beginWatch(opts.TimeoutSeconds)
	if !l.source.inFlight.tryAdd() {
		return nil, context.Canceled
	}
	request, cancel := context.WithCancel(ctx)
	sup.cancel = cancel
	go func() {
		defer l.source.inFlight.Done()
		sup.run(request)
	}()
	stream, err := l.newRequest(&opts).Watch(request)
	if err != nil {
		if request.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("no answer to a watch of %s: %w", l.resource, errTimeout)
		}
		cancel()
	}
	if err == nil || !sup.streamed || !isDenied(err) {
		// Whoever can't stream a list may still be able to list.
		l.onResponse(ctx, verbWatch, err)
	}
	if err != nil {
		return nil, err
	}
	sup.opened <- stream
	return cancelingWatch{stream, cancel}, nil
}

// run ends the watch when it makes no progress, or is to be replaced by a list. It
// returns when ctx, which is the watch's, is done.
func (s *watchdog) run(ctx context.Context) {
	switch {
	case s.streamed:
		if !s.awaitStreamedList(ctx) {
			return
		}
	case s.longOutage:
		if s.sleep(ctx, verifyDelayMin+rand.N(verifyDelayMax-verifyDelayMin)) && len(s.opened) > 0 {
			s.source.log.DebugContext(ctx, "list again after the API server was away for long", "resource", string(s.resource))
			s.relist()
			return
		}
	case s.verifyVersions:
		if !s.verifyVersion(ctx) {
			return
		}
	}
	s.endSilentWatch(ctx)
}

// sleep waits. It reports false if the watch has ended, or is to end because a new
// list is asked for.
func (s *watchdog) sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-s.relistRequests:
		s.relist()
		return false
	case <-timer.C:
		return true
	}
}

// relist ends the watch and has everything listed, as of now.
func (s *watchdog) relist() {
	s.progress.requireConsistent.Store(true)
	s.cancel()
}

// awaitStreamedList waits until a streamed list is complete. It ends the list and reports
// false if that takes too long.
func (s *watchdog) awaitStreamedList(ctx context.Context) bool {
	for wait := streamTimeout - streamExtension; ; wait = 0 {
		if wait > 0 && !s.sleep(ctx, wait) {
			return false
		}
		events := s.progress.events.Load()
		if !s.sleep(ctx, streamExtension) {
			return false
		}
		if s.progress.completeLists.Load() != s.listsBefore {
			return true
		}
		if s.progress.events.Load()-events < streamMinEvents {
			break
		}
	}
	if len(s.opened) == 0 {
		if s.progress.recordSilence(true) > 1 {
			s.source.closeConnections()
		}
		s.cancel()
		return false
	}
	s.progress.disableStreaming(time.Now())
	s.source.log.WarnContext(ctx, "API server did not finish a streamed list in time; lists are requested without streaming (sendInitialEvents) for some time",
		"resource", string(s.resource), "limit", streamTimeout, "until", time.Now().Add(streamingDisabledFor).Format(time.RFC3339))
	s.cancel()
	return false
}

// verifyVersion asks for the API server's current resource version after a watch
// has ended early, and for the newest of the known objects. If one has a lower version
// than is known, or the object is gone, history may be another one than before, which
// the API server does not say by itself. verifyVersion then ends the watch and reports
// false.
func (s *watchdog) verifyVersion(ctx context.Context) bool {
	wait := verifyDelayMin + rand.N(verifyDelayMax-verifyDelayMin)
	for attempts := 0; attempts < verifyAttempts; {
		if !s.sleep(ctx, wait) {
			return false
		}
		if len(s.opened) == 0 {
			continue // The watch is not answered yet.
		}
		attempts++
		wait = verifyPause
		continued, err := s.historyContinues(ctx)
		if err != nil {
			s.source.log.DebugContext(ctx, "current resource version is unknown", "resource", string(s.resource), "error", err)
			continue
		}
		if !continued {
			s.relist()
		}
		return continued
	}
	return true
}

// historyContinues reports whether the API server's data can be the continuation of what
// is known. It requests one object at most.
func (s *watchdog) historyContinues(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyPause)
	defer cancel()
	name, known := s.progress.newestObject()
	opts := metav1.ListOptions{Limit: 1}
	s.resource.addSelectors(&opts, s.source.nodeName)
	if known != "" {
		selectors := []string{fields.OneTermEqualSelector(metav1.ObjectNameField, name.Name).String()}
		if opts.FieldSelector != "" {
			selectors = append(selectors, opts.FieldSelector)
		}
		opts.FieldSelector = strings.Join(selectors, ",")
	}
	objects := s.newList()
	request := s.source.clients[s.resource.groupVersion()].Get().Resource(string(s.resource)).VersionedParams(&opts, metav1.ParameterCodec)
	if name.Namespace != "" {
		request = request.Namespace(name.Namespace)
	}
	if err := request.Do(ctx).Into(objects); err != nil {
		return false, err
	}
	list, err := meta.ListAccessor(objects)
	if err != nil {
		return false, err
	}
	items, err := meta.ExtractList(objects)
	if err != nil {
		return false, err
	}
	if isBefore(list.GetResourceVersion(), s.version) {
		return false, nil // The next list reports it.
	}
	if known == "" {
		return true, nil
	}
	if len(items) == 0 {
		return false, nil
	}
	object, err := meta.Accessor(items[0])
	if err != nil {
		return false, err
	}
	lower := isBefore(object.GetResourceVersion(), known)
	if lower {
		s.progress.recordLowerVersion(known, object.GetResourceVersion())
	}
	return !lower, nil
}

// endSilentWatch ends a watch that is silent.
func (s *watchdog) endSilentWatch(ctx context.Context) {
	for quiet := 0; quiet < maxSilentPeriods; quiet++ {
		events := s.progress.events.Load()
		if !s.sleep(ctx, silenceCheckPeriod) {
			return
		}
		if s.progress.events.Load() != events {
			s.progress.recordProgress()
			quiet = -1
		}
	}
	expected := s.progress.sendsBookmarks.Load()
	times := s.progress.recordSilence(expected)
	if expected {
		s.source.log.WarnContext(ctx, "watch is silent, without bookmarks; it is made anew",
			"resource", string(s.resource), "silent_for", maxSilentPeriods*silenceCheckPeriod, "times", times)
	}
	select {
	case stream := <-s.opened:
		if times == 1 || !expected {
			stream.Stop() // The reflector continues where the watch was.
			return
		}
		s.source.closeConnections()
		s.relist()
	default:
		s.cancel()
	}
}

// list requests a list, or a page of it.
func (l *resourceReflector) list(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
	if !l.source.inFlight.tryAdd() {
		return nil, context.Canceled
	}
	defer l.source.inFlight.Done()
	l.source.queue.beginList(l.resource)
	if l.progress.requireConsistent.Load() && opts.Continue == "" {
		opts.ResourceVersion, opts.ResourceVersionMatch = "", ""
	}
	objects := l.newList()
	request, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	err := l.newRequest(&opts).Do(request).Into(objects)
	if err != nil && request.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("no complete answer to a list of %s within %s: %w", l.resource, listTimeout, errTimeout)
		if l.progress.recordSilence(true) > 1 {
			l.source.closeConnections()
		}
	}
	l.onResponse(ctx, verbList, err)
	if err != nil {
		return nil, err
	}
	l.progress.onList()
	// A page at a time, before the next one comes.
	l.source.trimmer.trimPage(objects)
	return objects, nil
}

// errTimeout is wrapped by errors about requests that were not answered in time.
var errTimeout = errors.New("timeout")
