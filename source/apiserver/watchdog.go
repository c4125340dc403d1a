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
	// listTimeout limits a list request. kube-apiserver ends list requests after one minute
	// by default (--request-timeout).
	listTimeout = 2 * time.Minute
	// streamTimeout is the time for a streamed list to send its closing bookmark. It is
	// extended while at least streamMinEvents arrive per streamExtension.
	streamTimeout   = time.Minute
	streamExtension = 10 * time.Second
	streamMinEvents = 100
	// streamingDisabledFor is how long lists are not streamed after one did not finish.
	streamingDisabledFor = time.Hour
	// watchTimeoutMin and watchTimeoutMax bound the requested duration of a watch that begins
	// at a known version. client-go requests five to ten minutes, which is up to six times as
	// many requests. A watch that begins with a streamed list keeps client-go's duration:
	// kube-apiserver compresses such a watch for each client until it ends.
	watchTimeoutMin, watchTimeoutMax = 30 * time.Minute, time.Hour
	// silenceCheckPeriod is the longest interval at which kube-apiserver sends bookmarks. A
	// watch may be silent for maxSilentPeriods of them.
	silenceCheckPeriod = time.Minute
	maxSilentPeriods   = 3
	// verifyDelayMin and verifyDelayMax bound the delay between the start of a watch and
	// the check that resource versions did not go backwards. An expired watch ends before
	// that. The check is attempted up to verifyAttempts times, at intervals of verifyPause.
	verifyDelayMin, verifyDelayMax = time.Second, 5 * time.Second
	verifyPause                    = 10 * time.Second
	verifyAttempts                 = 4
	// longOutageAfter is how long requests may fail before the next watch is replaced by a
	// list. If the server was restored from a backup during the outage, its versions may be
	// higher than the known ones again.
	longOutageAfter = 5 * time.Minute
)

// errStreamingDisabled makes the reflector list without streaming.
var errStreamingDisabled = errors.New("an earlier streamed list did not finish")

// errRelist makes the reflector list instead of continuing a watch.
var errRelist = errors.New("a new list is required")

// cancelingWatch is a watch whose Stop also cancels its request.
type cancelingWatch struct {
	watch.Interface

	cancel context.CancelFunc
	// onStop is called by Stop.
	onStop func()
}

// Stop ends the watch and its request. The reflector calls it.
func (w cancelingWatch) Stop() {
	w.cancel()
	w.Interface.Stop()
	w.onStop()
}

// watchdog ends a watch that makes no progress.
type watchdog struct {
	*resourceReflector
	// cancel ends the watch with an error, after which the reflector lists.
	cancel context.CancelFunc
	opened chan watch.Interface
	// streamed means that the watch begins with a streamed list.
	streamed bool
	// listsBefore is the number of complete lists before the watch.
	listsBefore uint64
	// unverified, if not nil, is the state before resource versions may have gone backwards.
	unverified *knownState
	// longOutage means that requests failed for longer than longOutageAfter.
	longOutage bool
}

// watch opens a watch with a watchdog.
func (r *resourceReflector) watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	wd := &watchdog{
		resourceReflector: r, opened: make(chan watch.Interface, 1), streamed: opts.SendInitialEvents != nil,
		listsBefore: r.progress.completeLists.Load(),
	}
	if !wd.streamed && r.progress.requireConsistent.Load() {
		return nil, errRelist
	}
	if wd.streamed {
		if r.progress.streamingDisabled() {
			return nil, errStreamingDisabled
		}
		r.source.queue.beginList(r.resource)
		if r.progress.requireConsistent.Load() {
			opts.ResourceVersion = ""
		}
	}
	if !wd.streamed {
		seconds := int64((watchTimeoutMin + rand.N(watchTimeoutMax-watchTimeoutMin)).Seconds())
		opts.TimeoutSeconds = &seconds
	}
	endedEarly, longOutage := r.progress.beginWatch(opts.TimeoutSeconds)
	wd.longOutage = longOutage
	if !wd.streamed {
		wd.unverified = r.progress.beginVerification(endedEarly, opts.ResourceVersion)
	}
	if !r.source.inFlight.tryAdd() {
		return nil, context.Canceled
	}
	requestCtx, cancel := context.WithCancel(ctx)
	wd.cancel = cancel
	go func() {
		defer r.source.inFlight.Done()
		wd.run(requestCtx)
	}()
	stream, err := wd.openStream(requestCtx, opts)
	if r.dropFieldSelector(ctx, err) {
		stream, err = wd.openStream(requestCtx, opts)
	}
	if err != nil {
		if requestCtx.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("no response to the watch of %s: %w", r.resource, errTimeout)
		}
		cancel()
	}
	if err == nil || !wd.streamed || !isDenied(err) {
		// A server that denies a streamed list may still allow a list.
		r.onResponse(ctx, verbWatch, err)
	}
	if err != nil {
		return nil, err
	}
	wd.opened <- stream
	return cancelingWatch{stream, cancel, r.deliverChanges}, nil
}

// run ends the watch when it makes no progress or when a list must replace it. It returns
// when ctx, the context of the watch, is done.
func (w *watchdog) run(ctx context.Context) {
	switch {
	case w.streamed:
		if !w.awaitStreamedList(ctx) {
			return
		}
	case w.longOutage:
		if w.sleep(ctx, verifyDelayMin+rand.N(verifyDelayMax-verifyDelayMin)) && len(w.opened) > 0 {
			w.source.log.DebugContext(ctx, "listing again after a long outage of the API server", "resource", string(w.resource))
			w.relist()
			return
		}
	case w.unverified != nil:
		if !w.verifyVersion(ctx) {
			return
		}
	}
	w.endSilentWatch(ctx)
}

// sleep waits. It reports false if the watch has ended. If a list is requested, it ends the
// watch and reports false.
func (w *watchdog) sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-w.relistRequests:
		w.relist()
		return false
	case <-timer.C:
		return true
	}
}

// relist ends the watch and makes the reflector request a consistent list.
func (w *watchdog) relist() {
	w.progress.requireConsistent.Store(true)
	w.cancel()
}

// awaitStreamedList waits until a streamed list is complete. If that takes too long, it
// ends the watch and reports false.
func (w *watchdog) awaitStreamedList(ctx context.Context) bool {
	for wait := streamTimeout - streamExtension; ; wait = 0 {
		if wait > 0 && !w.sleep(ctx, wait) {
			return false
		}
		events := w.progress.events.Load()
		if !w.sleep(ctx, streamExtension) {
			return false
		}
		if w.progress.completeLists.Load() != w.listsBefore {
			return true
		}
		if w.progress.events.Load()-events < streamMinEvents {
			break
		}
	}
	if len(w.opened) == 0 {
		if w.progress.recordSilence(true) > 1 {
			w.source.closeConnections()
		}
		w.cancel()
		return false
	}
	w.progress.disableStreaming(time.Now())
	w.source.log.WarnContext(ctx, "API server did not finish a streamed list in time; using lists without streaming (sendInitialEvents)",
		"resource", string(w.resource), "limit", streamTimeout, "until", time.Now().Add(streamingDisabledFor).Format(time.RFC3339))
	w.cancel()
	return false
}

// verifyVersion checks that resource versions did not go backwards after a watch ended
// early: it requests the server's current version and the object with the highest known
// version. If either version is lower than the known one, or the object is gone without a
// deletion, or exists after its deletion, the server may have been restored from a backup,
// which it does not report. verifyVersion then ends the watch and reports false. If the
// requests fail, the next watch checks again.
func (w *watchdog) verifyVersion(ctx context.Context) bool {
	wait := verifyDelayMin + rand.N(verifyDelayMax-verifyDelayMin)
	for attempts := 0; attempts < verifyAttempts; {
		if !w.sleep(ctx, wait) {
			return false
		}
		if len(w.opened) == 0 {
			continue // The server has not accepted the watch yet.
		}
		attempts++
		wait = verifyPause
		continued, err := w.historyContinues(ctx)
		if err != nil {
			w.source.log.DebugContext(ctx, "can't get the current resource version", "resource", string(w.resource), "error", err)
			continue
		}
		if continued {
			w.progress.endVerification()
		} else {
			w.relist()
		}
		return continued
	}
	return true
}

// historyContinues reports whether the server's data can be a continuation of the known
// data. It requests at most one object.
func (w *watchdog) historyContinues(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyPause)
	defer cancel()
	newest := w.unverified.newest
	opts := metav1.ListOptions{Limit: 1}
	w.source.selection.addSelectors(w.resource, &opts)
	if newest.version != "" {
		selectors := []string{fields.OneTermEqualSelector(metav1.ObjectNameField, newest.name.Name).String()}
		if opts.FieldSelector != "" {
			selectors = append(selectors, opts.FieldSelector)
		}
		opts.FieldSelector = strings.Join(selectors, ",")
	}
	objects := w.newList()
	request := w.source.clients[w.resource.groupVersion()].Get().Resource(string(w.resource)).VersionedParams(&opts, metav1.ParameterCodec)
	if newest.name.Namespace != "" {
		request = request.Namespace(newest.name.Namespace)
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
	if isBefore(list.GetResourceVersion(), w.unverified.version) {
		return false, nil // the next list logs it
	}
	if newest.version == "" {
		return true, nil
	}
	if len(items) == 0 {
		return newest.deleted || w.progress.isNewestDeletion(newest.name), nil
	}
	object, err := meta.Accessor(items[0])
	if err != nil {
		return false, err
	}
	lower := isBefore(object.GetResourceVersion(), newest.version)
	if lower {
		w.progress.recordLowerVersion(newest.version, object.GetResourceVersion())
	}
	return !lower, nil
}

// endSilentWatch ends the watch after maxSilentPeriods without events and bookmarks.
func (w *watchdog) endSilentWatch(ctx context.Context) {
	for quiet := 0; quiet < maxSilentPeriods; quiet++ {
		events := w.progress.events.Load()
		if !w.sleep(ctx, silenceCheckPeriod) {
			return
		}
		if w.progress.events.Load() != events {
			w.progress.recordProgress()
			quiet = -1
		}
	}
	expected := w.progress.sendsBookmarks.Load()
	times := w.progress.recordSilence(expected)
	if expected {
		w.source.log.WarnContext(ctx, "watch received neither events nor bookmarks; restarting it",
			"resource", string(w.resource), "silent_for", maxSilentPeriods*silenceCheckPeriod, "times", times)
	}
	select {
	case stream := <-w.opened:
		if times == 1 || !expected {
			stream.Stop() // the reflector continues at the last version
			return
		}
		w.source.closeConnections()
		w.relist()
	default:
		w.cancel()
	}
}

// list requests a list or one page of it.
func (r *resourceReflector) list(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
	if !r.source.inFlight.tryAdd() {
		return nil, context.Canceled
	}
	defer r.source.inFlight.Done()
	r.source.queue.beginList(r.resource)
	if r.progress.requireConsistent.Load() && opts.Continue == "" {
		opts.ResourceVersion, opts.ResourceVersionMatch = "", ""
	}
	objects := r.newList()
	requestCtx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	err := r.newRequest(&opts).Do(requestCtx).Into(objects)
	if r.dropFieldSelector(ctx, err) {
		err = r.newRequest(&opts).Do(requestCtx).Into(objects)
	}
	if err != nil && requestCtx.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("no complete list of %s within %s: %w", r.resource, listTimeout, errTimeout)
		if r.progress.recordSilence(true) > 1 {
			r.source.closeConnections()
		}
	}
	r.onResponse(ctx, verbList, err)
	if err != nil {
		return nil, err
	}
	r.progress.onList()
	// Trim each page before the next one arrives.
	r.source.trimmer.trimPage(objects)
	return objects, nil
}

// errTimeout is wrapped by errors of requests that timed out.
var errTimeout = errors.New("timeout")
