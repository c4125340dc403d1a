package apiserver

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// scriptedBody is the body of a response. Each read returns the next chunk.
type scriptedBody struct {
	chunks [][]byte
	// end is returned after the last chunk. Nil makes reads wait for Close.
	end    error
	closed chan struct{}
}

func newScriptedBody(end error, chunks ...string) *scriptedBody {
	b := &scriptedBody{end: end, closed: make(chan struct{})}
	for _, c := range chunks {
		b.chunks = append(b.chunks, []byte(c))
	}
	return b
}

func (b *scriptedBody) Read(p []byte) (int, error) {
	select {
	case <-b.closed:
		return 0, errors.New("read of a closed body")
	default:
	}
	if len(b.chunks) == 0 {
		if b.end == nil {
			<-b.closed
			return 0, errors.New("closed while reading")
		}
		return 0, b.end
	}
	n := copy(p, b.chunks[0])
	if b.chunks[0] = b.chunks[0][n:]; len(b.chunks[0]) == 0 {
		b.chunks = b.chunks[1:]
	}
	return n, nil
}

func (b *scriptedBody) Close() error {
	close(b.closed)
	return nil
}

// watchEvent returns an event in JSON. The event named end marks the end of a list.
func watchEvent(event watch.EventType, name string) string {
	annotations := "{}"
	if name == "end" {
		annotations = `{"k8s.io/initial-events-end":"true"}`
	}
	return fmt.Sprintf(`{"type":%q,"object":{"apiVersion":"v1","kind":"Service","metadata":{"name":%q,"annotations":%s}}}`+"\n", event, name, annotations)
}

func compress(texts ...string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	for _, text := range texts {
		_, _ = io.WriteString(w, text) // a buffer has no errors
		_ = w.Flush()
	}
	_ = w.Close()
	return b.String()
}

// TestWatchStream checks which events a watch has, and when it is about to wait for the API server.
func TestWatchStream(t *testing.T) {
	s, err := New(Options{Config: &rest.Config{Host: "http://192.0.2.1", Transport: failingTransport{}}})
	if err != nil {
		t.Fatal(err)
	}
	reflector := s.reflectors[0]
	added := func(name string) string { return watchEvent(watch.Added, name) }
	modified := func(name string) string { return watchEvent(watch.Modified, name) }
	const failure = `ERROR an error on the server ("unable to decode an event from the watch stream: failure") has prevented the request from succeeding`
	for _, tt := range []struct {
		name     string
		streamed bool
		body     *scriptedBody
		want     []string
	}{
		{"nothing", false, newScriptedBody(io.EOF), []string{"wait", "closed"}},
		{"single events", false, newScriptedBody(io.EOF, added("a"), modified("b"), watchEvent(watch.Deleted, "c"), watchEvent(watch.Bookmark, "d")), []string{
			"wait", "ADDED a", "wait", "MODIFIED b", "wait", "DELETED c", "wait", "BOOKMARK d", "wait", "closed",
		}},
		{"several events together", false, newScriptedBody(io.EOF, added("a")+added("b")+added("c"), added("d")), []string{
			"wait", "ADDED a", "ADDED b", "ADDED c", "wait", "ADDED d", "wait", "closed",
		}},
		{"part of an event", false, newScriptedBody(io.EOF, added("a")+added("b")[:20], added("b")[20:]), []string{
			"wait", "ADDED a", "wait", "ADDED b", "wait", "closed",
		}},
		{"compressed", false, newScriptedBody(io.EOF, compress(added("a"), added("b"))+compress(added("c")), compress(added("d"))), []string{
			"wait", "ADDED a", "ADDED b", "ADDED c", "wait", "ADDED d", "wait", "closed",
		}},
		{"list", true, newScriptedBody(io.EOF, added("a"), added("b"), watchEvent(watch.Bookmark, "end"), modified("c")+modified("d"), modified("e")), []string{
			"ADDED a", "ADDED b", "BOOKMARK end", "wait", "MODIFIED c", "MODIFIED d", "wait", "MODIFIED e", "wait", "closed",
		}},
		{"unfinished list", true, newScriptedBody(io.EOF, added("a")), []string{"ADDED a", "closed"}},
		{"failed list", true, newScriptedBody(errors.New("failure"), added("a")), []string{"ADDED a", failure}},
		{"truncated event", false, newScriptedBody(io.ErrUnexpectedEOF, added("a"), added("b")[:20]), []string{"wait", "ADDED a", "wait", "wait", "closed"}},
		{"connection reset", false, newScriptedBody(errors.New("read: connection reset by peer"), added("a")), []string{"wait", "ADDED a", "wait", "closed"}},
		{"failed read", false, newScriptedBody(errors.New("failure"), added("a")), []string{"wait", "ADDED a", "wait", failure}},
		{"no event", false, newScriptedBody(io.EOF, "{]"), []string{"wait", strings.Replace(failure, ": failure", ": invalid character ']' looking for beginning of object key string", 1)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			stream := newWatchStream(tt.body, reflector.newWatchDecoder, tt.streamed, func() { got = append(got, "wait") })
			defer stream.Stop()
			for len(got) < 20 {
				event, ok := <-stream.ResultChan()
				if !ok {
					got = append(got, "closed")
					break
				}
				got = append(got, describeEvent(event))
				if event.Type == watch.Error {
					break // as in the reflector
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("events %q, want %q", got, tt.want)
			}
		})
	}
}

func describeEvent(event watch.Event) string {
	if svc, ok := event.Object.(*corev1.Service); ok {
		return string(event.Type) + " " + svc.Name
	}
	return string(event.Type) + " " + apierrors.FromObject(event.Object).Error()
}

// TestStopWatchStream checks that Stop ends a watch without an error while it waits, before the first
// event, during a list and later.
func TestStopWatchStream(t *testing.T) {
	s, err := New(Options{Config: &rest.Config{Host: "http://192.0.2.1", Transport: failingTransport{}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name     string
		streamed bool
		chunks   []string
	}{
		{"before the first event", false, nil},
		{"after an event", false, []string{watchEvent(watch.Added, "a")}},
		{"before a list", true, nil},
		{"during a list", true, []string{watchEvent(watch.Added, "a")}},
		{"after a list", true, []string{watchEvent(watch.Added, "a"), watchEvent(watch.Bookmark, "end")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				stream := newWatchStream(newScriptedBody(nil, tt.chunks...), s.reflectors[0].newWatchDecoder, tt.streamed, func() {})
				for range tt.chunks {
					<-stream.ResultChan()
				}
				go func() {
					synctest.Wait() // ResultChan or its receiver waits
					stream.Stop()
				}()
				if event, ok := <-stream.ResultChan(); ok {
					t.Errorf("%s after Stop, want the end", describeEvent(event))
				}
			})
		})
	}
}
