package compare

import (
	"context"
	"time"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/bench/testbed"
)

// server is the API server that one system watches. It has the content from the start, and serves
// it to the nodes on which the system is started, one after the other. Its methods may be called
// concurrently, except for changes of the same object.
type server interface {
	// attach makes the server reachable from a node and writes a kubeconfig for it. The caller must
	// call detach before it closes the testbed. Watches may end when ctx is done.
	attach(ctx context.Context, r *testbed.Testbed, kubeconfig string) (detach func() error, err error)
	// create, update and delete change objects in order, without delay. The caller must not modify
	// the objects afterwards.
	create(ctx context.Context, objects ...apiserver.Object) *request
	update(ctx context.Context, objects ...apiserver.Object) *request
	delete(ctx context.Context, objects ...apiserver.Object) *request
	// close stops the server, which must not be attached to a node.
	close() error
}

// request is a request to a server and its result.
type request struct {
	sentAt   time.Time     // when the request was sent
	done     chan struct{} // closed when the server has answered; duration and err are valid then
	duration time.Duration
	err      error
	// versions are the objects of the request, if the server is in this process.
	versions []*apiserver.Version
}

// untilEvent returns the time from the request until the server wrote its first event to a watch. In
// this time, the system has nothing to do yet. It is 0 for a real server, which does not show when it
// writes. The caller must have observed an effect.
func (r *request) untilEvent() time.Duration {
	var first time.Time
	for _, v := range r.versions {
		if at, ok := v.SentAt(); ok && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	if first.IsZero() {
		return 0
	}
	return first.Sub(r.sentAt)
}

// doRequest runs do and returns the completed request.
func doRequest(do func() error) *request {
	r := &request{sentAt: time.Now(), done: make(chan struct{})}
	r.complete(do())
	return r
}

// startRequest runs do in a new goroutine and returns immediately.
func startRequest(do func() error) *request {
	r := &request{sentAt: time.Now(), done: make(chan struct{})}
	go func() { r.complete(do()) }()
	return r
}

func (r *request) complete(err error) {
	r.duration, r.err = time.Since(r.sentAt), err
	close(r.done)
}

// wait waits for the answer.
func (r *request) wait() error {
	<-r.done
	return r.err
}

// serverFactory opens API servers that all have the same content.
type serverFactory interface {
	open(ctx context.Context) (server, error)
}

// serverFactory returns the factory for the configured kind of API server.
func (o *Options) serverFactory(c *content) (serverFactory, error) {
	if o.ControlPlane != "" {
		return &controlPlaneFactory{programs: o.ControlPlane, content: c, progress: o.progress}, nil
	}
	return newLocalServerFactory(c)
}
