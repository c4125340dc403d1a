package apiserver

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/watch"
	restwatch "k8s.io/client-go/rest/watch"
)

// watchBuffer is the size of a watch's read buffer in bytes.
const watchBuffer = 32 << 10

// watchStream is a watch whose events are decoded by the goroutine that receives them: client-go's
// reflector calls ResultChan for each event. A hand-over between goroutines would take longer than
// the event.
//
// While the watch begins with a list, another goroutine decodes, because a list takes less time on two
// processors.
type watchStream struct {
	body io.ReadCloser
	// newDecoder returns a decoder of a type of events, in protobuf or in JSON.
	newDecoder func(io.ReadCloser, watchEncoding) (watch.Decoder, error)
	// beforeWait is called by ResultChan before it reads further data from the API server, and may
	// wait for them.
	beforeWait func()
	// receiving means that ResultChan decodes, and not decodeList.
	receiving bool

	decoder watch.Decoder // nil before the first byte
	// next holds the event to receive. It is closed at the end of the watch.
	next  chan watch.Event
	ended bool // next is closed

	// listing receives the events of the list, and is nil without a list. It is closed if the watch ends
	// before the list does. listed is closed after the last event of the list.
	listing chan watch.Event
	listed  chan struct{}
	// lastListed means that listing gets one more event at most.
	lastListed atomic.Bool
	stopped    chan struct{} // closed by Stop
	stop       func()        // closes stopped once
}

// watchEncoding is the encoding of a watch's events.
type watchEncoding struct {
	mediaType string
	params    map[string]string
}

// openStream sends the watch request, like [rest.Request.Watch].
func (w *watchdog) openStream(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	// As in client-go, watches are not rate-limited.
	request := w.newRequest(&opts).Throttle(nil)
	if !w.source.uncompressed {
		// The transport then leaves the decompression to the watchStream, which sees in the
		// compressed data whether more events have arrived.
		request.SetHeader("Accept-Encoding", "gzip")
	}
	body, err := request.Stream(ctx)
	switch {
	case err == nil:
	case utilnet.IsProbableEOF(err), utilnet.IsTimeout(err):
		return watch.NewEmptyWatch(), nil // as in client-go: the reflector continues at the last version
	default:
		return nil, err
	}
	return newWatchStream(body, w.newWatchDecoder, w.streamed, w.deliverChanges), nil
}

// newWatchDecoder returns a decoder of the events of the resource.
func (r *resourceReflector) newWatchDecoder(from io.ReadCloser, encoding watchEncoding) (watch.Decoder, error) {
	gv := r.resource.groupVersion()
	objects, events, framer, err := runtime.NewClientNegotiator(r.source.clients[gv].serializer, gv).StreamDecoder(encoding.mediaType, encoding.params)
	if err != nil {
		return nil, err
	}
	return restwatch.NewDecoder(streaming.NewDecoder(framer.NewFrameReader(from), events), objects), nil
}

// newWatchStream returns a watchStream that decodes body. If streamed is set, the events begin with
// those of a list.
func newWatchStream(
	body io.ReadCloser, newDecoder func(io.ReadCloser, watchEncoding) (watch.Decoder, error), streamed bool, beforeWait func(),
) *watchStream {
	s := &watchStream{
		body: body, newDecoder: newDecoder, beforeWait: beforeWait, receiving: !streamed,
		next: make(chan watch.Event, 1), stopped: make(chan struct{}),
	}
	s.stop = sync.OnceFunc(func() { close(s.stopped) })
	if streamed {
		s.listing, s.listed = make(chan watch.Event), make(chan struct{})
		go s.decodeList()
	}
	return s
}

// Stop implements [watch.Interface]. It may be called by any goroutine.
func (s *watchStream) Stop() {
	s.stop()
	_ = s.body.Close() // the body of a response has no useful error
}

// ResultChan implements [watch.Interface]. It waits for the next event and returns a channel that
// holds it. After Stop, or when the request's context is done, it does not wait.
func (s *watchStream) ResultChan() <-chan watch.Event {
	if s.ended || len(s.next) > 0 {
		return s.next
	}
	if s.listing != nil {
		if !s.lastListed.Load() {
			return s.listing
		}
		select {
		case event, ok := <-s.listing:
			return s.give(event, ok)
		case <-s.listed:
			s.listing, s.receiving = nil, true
		}
	}
	return s.give(s.decode())
}

// give returns the channel next with an event, or closed if ok is false.
func (s *watchStream) give(event watch.Event, ok bool) <-chan watch.Event {
	if ok {
		s.next <- event
	} else {
		s.ended = true
		close(s.next)
	}
	return s.next
}

// decodeList decodes the events of a list, up to the bookmark at its end.
func (s *watchStream) decodeList() {
	for {
		event, ok := s.decode()
		if !ok {
			close(s.listing)
			return
		}
		last := event.Type == watch.Error || isEndOfList(event)
		s.lastListed.Store(last)
		select {
		case s.listing <- event:
		case <-s.stopped:
			close(s.listing)
			return
		}
		if last {
			close(s.listed)
			return
		}
	}
}

// isEndOfList reports whether an event marks the end of a streamed list.
func isEndOfList(event watch.Event) bool {
	if event.Type != watch.Bookmark {
		return false
	}
	accessor, err := meta.Accessor(event.Object)
	return err == nil && accessor.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true"
}

// decode decodes the next event. It reports false at the end of the watch. Like client-go's
// [watch.StreamWatcher], it returns other errors as events.
func (s *watchStream) decode() (watch.Event, bool) {
	event, object, err := s.decodeEvent()
	if err == nil {
		return watch.Event{Type: event, Object: object}, true
	}
	select {
	case <-s.stopped:
		return watch.Event{}, false
	default:
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || utilnet.IsProbableEOF(err) || utilnet.IsTimeout(err) {
		return watch.Event{}, false
	}
	reporter := apierrors.NewClientErrorReporter(http.StatusInternalServerError, "watch", "ClientWatchDecoding")
	return watch.Event{Type: watch.Error, Object: reporter.AsObject(fmt.Errorf("unable to decode an event from the watch stream: %w", err))}, true
}

func (s *watchStream) decodeEvent() (watch.EventType, runtime.Object, error) {
	if s.decoder == nil {
		if err := s.begin(); err != nil {
			return "", nil, err
		}
	}
	return s.decoder.Decode()
}

// begin waits for the first byte and creates the decoder.
func (s *watchStream) begin() error {
	content := bufio.NewReaderSize(arrivals{s}, watchBuffer)
	start, err := content.Peek(2)
	if err != nil {
		return err
	}
	if start[0] == 0x1f && start[1] == 0x8b { // RFC 1952, section 2.3.1
		uncompressed, err := gzip.NewReader(content)
		if err != nil {
			return err
		}
		content = bufio.NewReader(uncompressed)
		if start, err = content.Peek(1); err != nil {
			return err
		}
	}
	// A JSON event is an object. An event in protobuf starts with its length in four bytes.
	encoding := watchEncoding{protobuf, map[string]string{"stream": "watch"}}
	if start[0] == '{' {
		encoding = watchEncoding{mediaType: runtime.ContentTypeJSON}
	}
	s.decoder, err = s.newDecoder(readCloser{content, s.body}, encoding)
	return err
}

// arrivals reads the body of a watchStream.
type arrivals struct{ s *watchStream }

// Read implements [io.Reader].
func (a arrivals) Read(p []byte) (int, error) {
	if a.s.receiving {
		a.s.beforeWait()
	}
	return a.s.body.Read(p)
}

// readCloser reads from a buffer of the stream that it closes.
type readCloser struct {
	io.Reader
	io.Closer
}
