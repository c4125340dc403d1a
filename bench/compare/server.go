package compare

import (
	"context"
	"time"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/bench/testbed"
)

// server is the API server that one system follows. It has the content from the
// beginning, and serves it to the nodes on which the system is started, one after
// the other. Its methods may be called concurrently, but those that change the same
// object may not.
type server interface {
	// attach lets a node reach the server, and writes how into a kubeconfig. The
	// function that it returns undoes it, before the testbed is closed. Watches may end
	// when ctx is done.
	attach(ctx context.Context, r *testbed.Testbed, kubeconfig string) (leave func() error, err error)
	// create, update and delete change objects, one right after the other. Objects are
	// not changed afterwards.
	create(ctx context.Context, objects ...apiserver.Object) *request
	update(ctx context.Context, objects ...apiserver.Object) *request
	delete(ctx context.Context, objects ...apiserver.Object) *request
	// close ends the server, which no node is joined with any more.
	close() error
}

// request is what a server was asked for.
type request struct {
	sentAt   time.Time     // when it was asked
	done     chan struct{} // closed when it has answered; took and err are valid then
	duration time.Duration
	err      error
}

// doRequest does what a server is asked for, and returns when that is done.
func doRequest(do func() error) *request {
	r := &request{sentAt: time.Now(), done: make(chan struct{})}
	r.complete(do())
	return r
}

// startRequest is asked, but returns at once.
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

// serverFactory opens a server for each system, all with the same content.
type serverFactory interface {
	open(ctx context.Context) (server, error)
}

// serverFactory returns what opens the API servers that were asked for.
func (o *Options) serverFactory(c *content) (serverFactory, error) {
	if o.ControlPlane != "" {
		return &controlPlaneFactory{programs: o.ControlPlane, content: c, progress: o.progress}, nil
	}
	return newLocalServerFactory(c)
}
