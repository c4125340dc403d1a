package apiserver

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// Server serves objects over HTTP, see [Server.ServeHTTP]. Its methods may be called concurrently.
type Server struct {
	collections map[resource]*collection
	mux         *http.ServeMux
}

// New returns a Server without objects.
func New() *Server {
	s := &Server{collections: map[resource]*collection{}, mux: http.NewServeMux()}
	for _, r := range resources() {
		c := newCollection()
		s.collections[r] = c
		at := "/apis/" + r.group + "/" + r.version
		if r.group == "" {
			at = "/api/" + r.version
		}
		all := func(w http.ResponseWriter, q *http.Request) { serveCollection(w, q, r, c) }
		one := func(w http.ResponseWriter, q *http.Request) { serveObject(w, q, r, c) }
		s.mux.HandleFunc("GET "+at+"/"+r.plural, all)
		s.mux.HandleFunc("GET "+at+"/"+r.plural+"/{name}", one)
		s.mux.HandleFunc("GET "+at+"/namespaces/{namespace}/"+r.plural, all)
		s.mux.HandleFunc("GET "+at+"/namespaces/{namespace}/"+r.plural+"/{name}", one)
	}
	for _, at := range []string{"/api/v1", "/apis/events.k8s.io/v1"} {
		s.mux.HandleFunc("POST "+at+"/namespaces/{namespace}/events", acceptEvent)
		s.mux.HandleFunc("PATCH "+at+"/namespaces/{namespace}/events/{name}", respondNotFound)
	}
	s.mux.HandleFunc("/", respondNotFound)
	return s
}

// Put creates or updates the objects. When it returns, all watches have the changes.
func (s *Server) Put(versions ...*Version) {
	for _, v := range versions {
		s.collections[v.resource].apply(v, false)
	}
}

// Delete deletes the objects. Clients receive these versions with the event of the deletion, so
// they must be new versions too.
func (s *Server) Delete(versions ...*Version) {
	for _, v := range versions {
		s.collections[v.resource].apply(v, true)
	}
}

// ServeHTTP answers GET requests for objects, lists and watches of the four resources. It answers
// POST requests for Events with the request body.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// acceptEvent responds as if the Event had been created.
func acceptEvent(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		respondError(w, r, http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
		return
	}
	w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
	w.WriteHeader(http.StatusCreated)
	_, _ = w.Write(body) // an error means that the client has disconnected
}

func respondNotFound(w http.ResponseWriter, r *http.Request) {
	respondError(w, r, http.StatusNotFound, metav1.StatusReasonNotFound, r.Method+" "+r.URL.Path+" is not served")
}

// respondError responds with a Status object.
func respondError(w http.ResponseWriter, r *http.Request, code int32, reason metav1.StatusReason, message string) {
	enc, err := negotiate(r)
	if err != nil {
		enc = jsonEncoding{}
	}
	data, err := enc.status(newStatus(code, reason, message))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", enc.contentType())
	w.WriteHeader(int(code))
	_, _ = w.Write(data) // an error means that the client has disconnected
}

func newStatus(code int32, reason metav1.StatusReason, message string) *metav1.Status {
	return &metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
		Status:   metav1.StatusFailure, Code: code, Reason: reason, Message: message,
	}
}

func serveObject(w http.ResponseWriter, r *http.Request, res resource, c *collection) {
	v := c.get(types.NamespacedName{Namespace: r.PathValue("namespace"), Name: r.PathValue("name")})
	if v == nil {
		respondError(w, r, http.StatusNotFound, metav1.StatusReasonNotFound, fmt.Sprintf("%s %q not found", res.plural, r.PathValue("name")))
		return
	}
	respond(w, r, func(enc encoding) ([]byte, error) { return enc.object(v) })
}

func respond(w http.ResponseWriter, r *http.Request, encode func(encoding) ([]byte, error)) {
	enc, err := negotiate(r)
	if err != nil {
		respondError(w, r, http.StatusNotAcceptable, metav1.StatusReasonNotAcceptable, err.Error())
		return
	}
	data, err := encode(enc)
	if err != nil {
		respondError(w, r, http.StatusInternalServerError, metav1.StatusReasonInternalError, err.Error())
		return
	}
	w.Header().Set("Content-Type", enc.contentType())
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	_, _ = w.Write(data) // an error means that the client has disconnected
}

func serveCollection(w http.ResponseWriter, r *http.Request, res resource, c *collection) {
	s, err := parseSelector(r)
	if err != nil {
		respondError(w, r, http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
		return
	}
	if on, _ := strconv.ParseBool(r.URL.Query().Get("watch")); on {
		serveWatch(w, r, res, c, s)
		return
	}
	items, number, _ := c.list(s)
	respond(w, r, func(enc encoding) ([]byte, error) { return enc.list(res, number, items) })
}

func parseSelector(r *http.Request) (selector, error) {
	s := selector{namespace: r.PathValue("namespace")}
	query := r.URL.Query()
	var err error
	if s.labels, err = labels.Parse(query.Get("labelSelector")); err != nil {
		return s, fmt.Errorf("labelSelector: %w", err)
	}
	if s.fields, err = fields.ParseSelector(query.Get("fieldSelector")); err != nil {
		return s, fmt.Errorf("fieldSelector: %w", err)
	}
	for _, requirement := range s.fields.Requirements() {
		switch requirement.Field {
		case "metadata.name", "metadata.namespace", "spec.clusterIP", "spec.type":
		default:
			return s, fmt.Errorf("fieldSelector: unsupported field %s", requirement.Field)
		}
	}
	return s, nil
}

// serveWatch streams changes until the client disconnects or is too far behind.
func serveWatch(w http.ResponseWriter, r *http.Request, res resource, c *collection, s selector) {
	enc, err := negotiate(r)
	if err != nil {
		respondError(w, r, http.StatusNotAcceptable, metav1.StatusReasonNotAcceptable, err.Error())
		return
	}
	query := r.URL.Query()
	number, err := strconv.ParseUint(query.Get("resourceVersion"), 10, 64)
	if err != nil && query.Get("resourceVersion") != "" {
		respondError(w, r, http.StatusBadRequest, metav1.StatusReasonBadRequest, "resourceVersion: "+err.Error())
		return
	}
	stream := stream{enc: enc, selector: s, writer: w, flush: http.NewResponseController(w).Flush}
	initial, _ := strconv.ParseBool(query.Get("sendInitialEvents"))
	var at int
	if initial || number == 0 {
		var items []*Version
		items, number, at = c.list(s)
		err = stream.appendInitial(items)
		if err == nil && initial {
			err = stream.appendBookmark(res, number)
		}
		if err != nil {
			respondError(w, r, http.StatusInternalServerError, metav1.StatusReasonInternalError, err.Error())
			return
		}
	} else {
		var ok bool
		if at, ok = c.indexOf(number); !ok {
			respondError(w, r, http.StatusGone, metav1.StatusReasonExpired, "too old resource version")
			return
		}
	}
	w.Header().Set("Content-Type", enc.streamType())
	w.WriteHeader(http.StatusOK)
	_ = stream.follow(r, c, at) // the client has disconnected or is too far behind
}

// stream is the watch of one client.
type stream struct {
	enc      encoding
	selector selector
	writer   io.Writer
	flush    func() error
	buffer   bytes.Buffer
}

func (s *stream) appendInitial(items []*Version) error {
	for _, v := range items {
		if err := s.enc.appendEvent(&s.buffer, watch.Added, v); err != nil {
			return err
		}
	}
	return nil
}

// appendBookmark appends the bookmark that marks the end of the initial events.
func (s *stream) appendBookmark(r resource, number uint64) error {
	o := r.newObject()
	o.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	v, err := new(VersionSequence).Stamp(o)
	if err != nil {
		return err
	}
	o.SetResourceVersion(strconv.FormatUint(number, 10))
	return s.enc.appendEvent(&s.buffer, watch.Bookmark, v)
}

// maxKeptBuffer is the largest buffer, in bytes, that a stream keeps. Only an initial list needs a
// larger one.
const maxKeptBuffer = 1 << 20

// errTooFarBehind reports that the history no longer contains the position of a client.
var errTooFarBehind = errors.New("the client is too far behind")

// follow writes the contents of the buffer and then all later changes.
func (s *stream) follow(r *http.Request, c *collection, at int) error {
	for {
		changes, next, changed, ok := c.changesFrom(at)
		if !ok {
			return errTooFarBehind
		}
		at = next
		var sent []*Version
		for _, ch := range changes {
			event, selected := ch.event(s.selector)
			if !selected {
				continue
			}
			if err := s.enc.appendEvent(&s.buffer, event, ch.current); err != nil {
				return err
			}
			sent = append(sent, ch.current)
		}
		now := time.Now()
		for _, v := range sent {
			v.sentAt.CompareAndSwap(nil, &now)
		}
		if s.buffer.Len() > 0 || len(changes) == 0 {
			if _, err := s.writer.Write(s.buffer.Bytes()); err != nil {
				return err
			}
			if err := s.flush(); err != nil {
				return err
			}
			s.buffer.Reset()
			if s.buffer.Cap() > maxKeptBuffer {
				s.buffer = bytes.Buffer{}
			}
		}
		select {
		case <-r.Context().Done():
			return r.Context().Err()
		case <-changed:
		}
	}
}
