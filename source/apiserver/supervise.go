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
	// listLimit bounds the answer to a request for a list. kube-apiserver ends
	// such requests after a minute itself (--request-timeout).
	listLimit = 2 * time.Minute
	// streamLimit is the time that a streamed list has until its closing bookmark.
	// It is extended while objects arrive at streamFlow in streamExtension.
	streamLimit     = time.Minute
	streamExtension = 10 * time.Second
	streamFlow      = 100
	// unstreamedFor is how long lists are not streamed after one was not finished.
	unstreamedFor = time.Hour
	// silenceStep is as long as kube-apiserver waits between bookmarks at most, and
	// silenceSteps is how many times that a watch may be silent.
	silenceStep  = time.Minute
	silenceSteps = 3
	// verifyMin and verifyMax are how long after a watch has begun it is verified
	// that resource versions did not go backwards. A watch that has expired ends
	// earlier. verifyAttempts requests are made, verifyPause apart.
	verifyMin, verifyMax = time.Second, 5 * time.Second
	verifyPause          = 10 * time.Second
	verifyAttempts       = 4
	// awayLimit is how long requests may fail until a watch is not continued but
	// everything is listed. A server that was restored from a backup meanwhile may
	// have reached higher versions than before.
	awayLimit = 5 * time.Minute
)

// errNotStreamed has the reflector list without streaming.
var errNotStreamed = errors.New("streamed lists were not finished before")

// errListAgain has the reflector list instead of continuing a watch.
var errListAgain = errors.New("everything is listed again")

// supervised is a watch that ends when it is stopped or when it makes no progress.
type supervised struct {
	watch.Interface

	cancel context.CancelFunc
}

// Stop ends the watch.
func (s supervised) Stop() {
	s.cancel()
	s.Interface.Stop()
}

// supervision is what ends a watch that makes no progress.
type supervision struct {
	*list
	// cancel ends the watch with an error, after which the reflector lists.
	cancel context.CancelFunc
	opened chan watch.Interface
	// streamed says that the watch begins with a list, and version is where it
	// begins otherwise.
	streamed bool
	version  string
	// lists is how many lists were complete before the watch.
	lists uint64
	// verify says that resource versions may have gone backwards, and away that
	// requests have failed for long.
	verify, away bool
}

// watch makes a watch that is ended when it makes no progress.
func (l *list) watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	sup := &supervision{
		list: l, opened: make(chan watch.Interface, 1), streamed: opts.SendInitialEvents != nil, version: opts.ResourceVersion,
		lists: l.progress.lists.Load(),
	}
	if !sup.streamed && l.progress.consistent.Load() {
		return nil, errListAgain
	}
	if sup.streamed {
		if l.progress.avoidsStreams() {
			return nil, errNotStreamed
		}
		l.src.box.list(l.kind)
		if l.progress.consistent.Load() {
			opts.ResourceVersion = ""
		}
	}
	sup.verify, sup.away = l.progress.begin(opts.TimeoutSeconds)
	if !l.src.lists.begin() {
		return nil, context.Canceled
	}
	request, cancel := context.WithCancel(ctx)
	sup.cancel = cancel
	go func() {
		defer l.src.lists.Done()
		sup.run(request)
	}()
	stream, err := l.request(&opts).Watch(request)
	if err != nil {
		if request.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("no answer to a watch of %s: %w", l.kind, errTimeout)
		}
		cancel()
	}
	if err == nil || !sup.streamed || !refusal(err) {
		// Whoever can't stream a list may still be able to list.
		l.heard(ctx, verbWatch, err)
	}
	if err != nil {
		return nil, err
	}
	sup.opened <- stream
	return supervised{stream, cancel}, nil
}

// run ends the watch when it makes no progress, or is to be replaced by a list. It
// returns when ctx, which is the watch's, is done.
func (s *supervision) run(ctx context.Context) {
	switch {
	case s.streamed:
		if !s.awaitList(ctx) {
			return
		}
	case s.away:
		if s.pause(ctx, verifyMin+rand.N(verifyMax-verifyMin)) && len(s.opened) > 0 {
			s.src.log.DebugContext(ctx, "list again after the API server was away for long", "resource", string(s.kind))
			s.listAgain()
			return
		}
	case s.verify:
		if !s.verifyVersion(ctx) {
			return
		}
	}
	s.awaitSilence(ctx)
}

// pause waits. It reports false if the watch has ended, or is to end because a new
// list is asked for.
func (s *supervision) pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-s.again:
		s.listAgain()
		return false
	case <-timer.C:
		return true
	}
}

// listAgain ends the watch and has everything listed, as of now.
func (s *supervision) listAgain() {
	s.progress.consistent.Store(true)
	s.cancel()
}

// awaitList waits until a streamed list is complete. It ends the list and reports
// false if that takes too long.
func (s *supervision) awaitList(ctx context.Context) bool {
	for wait := streamLimit - streamExtension; ; wait = 0 {
		if wait > 0 && !s.pause(ctx, wait) {
			return false
		}
		events := s.progress.events.Load()
		if !s.pause(ctx, streamExtension) {
			return false
		}
		if s.progress.lists.Load() != s.lists {
			return true
		}
		if s.progress.events.Load()-events < streamFlow {
			break
		}
	}
	if len(s.opened) == 0 {
		if s.progress.silent(true) > 1 {
			s.src.disconnect()
		}
		s.cancel()
		return false
	}
	s.progress.unfinished(time.Now())
	s.src.log.WarnContext(ctx, "API server did not finish a streamed list in time; lists are requested without streaming (sendInitialEvents) for some time",
		"resource", string(s.kind), "limit", streamLimit, "until", time.Now().Add(unstreamedFor).Format(time.RFC3339))
	s.cancel()
	return false
}

// verifyVersion asks for the API server's current resource version after a watch
// has ended early, and for the newest of the known objects. If one has a lower version
// than is known, or the object is gone, history may be another one than before, which
// the API server does not say by itself. verifyVersion then ends the watch and reports
// false.
func (s *supervision) verifyVersion(ctx context.Context) bool {
	wait := verifyMin + rand.N(verifyMax-verifyMin)
	for attempts := 0; attempts < verifyAttempts; {
		if !s.pause(ctx, wait) {
			return false
		}
		if len(s.opened) == 0 {
			continue // The watch is not answered yet.
		}
		attempts++
		wait = verifyPause
		continued, err := s.isContinued(ctx)
		if err != nil {
			s.src.log.DebugContext(ctx, "current resource version is unknown", "resource", string(s.kind), "error", err)
			continue
		}
		if !continued {
			s.listAgain()
		}
		return continued
	}
	return true
}

// isContinued reports whether the API server's data can be the continuation of what
// is known. It requests one object at most.
func (s *supervision) isContinued(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyPause)
	defer cancel()
	name, known := s.progress.newestObject()
	opts := metav1.ListOptions{Limit: 1}
	s.kind.narrow(&opts, s.src.nodeName)
	if known != "" {
		selectors := []string{fields.OneTermEqualSelector(metav1.ObjectNameField, name.Name).String()}
		if opts.FieldSelector != "" {
			selectors = append(selectors, opts.FieldSelector)
		}
		opts.FieldSelector = strings.Join(selectors, ",")
	}
	objects := s.empty()
	request := s.src.clients[s.kind.group()].Get().Resource(string(s.kind)).VersionedParams(&opts, metav1.ParameterCodec)
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
		s.progress.foundLower(known, object.GetResourceVersion())
	}
	return !lower, nil
}

// awaitSilence ends a watch that is silent.
func (s *supervision) awaitSilence(ctx context.Context) {
	for quiet := 0; quiet < silenceSteps; quiet++ {
		events := s.progress.events.Load()
		if !s.pause(ctx, silenceStep) {
			return
		}
		if s.progress.events.Load() != events {
			s.progress.moved()
			quiet = -1
		}
	}
	expected := s.progress.bookmarks.Load()
	times := s.progress.silent(expected)
	if expected {
		s.src.log.WarnContext(ctx, "watch is silent, without bookmarks; it is made anew",
			"resource", string(s.kind), "silent_for", silenceSteps*silenceStep, "times", times)
	}
	select {
	case stream := <-s.opened:
		if times == 1 || !expected {
			stream.Stop() // The reflector continues where the watch was.
			return
		}
		s.src.disconnect()
		s.listAgain()
	default:
		s.cancel()
	}
}

// list requests a list, or a page of it.
func (l *list) list(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
	if !l.src.lists.begin() {
		return nil, context.Canceled
	}
	defer l.src.lists.Done()
	l.src.box.list(l.kind)
	if l.progress.consistent.Load() && opts.Continue == "" {
		opts.ResourceVersion, opts.ResourceVersionMatch = "", ""
	}
	objects := l.empty()
	request, cancel := context.WithTimeout(ctx, listLimit)
	defer cancel()
	err := l.request(&opts).Do(request).Into(objects)
	if err != nil && request.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("no complete answer to a list of %s within %s: %w", l.kind, listLimit, errTimeout)
		if l.progress.silent(true) > 1 {
			l.src.disconnect()
		}
	}
	l.heard(ctx, verbList, err)
	if err != nil {
		return nil, err
	}
	l.progress.listed()
	// A page at a time, before the next one comes.
	l.src.trimmer.list(objects)
	return objects, nil
}

// errTimeout is wrapped by errors about requests that were not answered in time.
var errTimeout = errors.New("timeout")
