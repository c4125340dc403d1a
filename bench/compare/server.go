package compare

import (
	"context"
	"time"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/bench/rig"
)

// server is the API server that one system follows. It has the content from the
// beginning, and serves it to the nodes on which the system is started, one after
// the other. Its methods may be called concurrently, but those that change the same
// object may not.
type server interface {
	// join lets a node reach the server, and writes how into a kubeconfig. The
	// function that it returns undoes it, before the rig is closed. Watches may end
	// when ctx is done.
	join(ctx context.Context, r *rig.Rig, kubeconfig string) (leave func() error, err error)
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
	at   time.Time     // when it was asked
	done chan struct{} // closed when it has answered; took and err are valid then
	took time.Duration
	err  error
}

// asked does what a server is asked for, and returns when that is done.
func asked(do func() error) *request {
	r := &request{at: time.Now(), done: make(chan struct{})}
	r.answer(do())
	return r
}

// asking is asked, but returns at once.
func asking(do func() error) *request {
	r := &request{at: time.Now(), done: make(chan struct{})}
	go func() { r.answer(do()) }()
	return r
}

func (r *request) answer(err error) {
	r.took, r.err = time.Since(r.at), err
	close(r.done)
}

// wait waits for the answer.
func (r *request) wait() error {
	<-r.done
	return r.err
}

// servers opens a server for each system, all with the same content.
type servers interface {
	open(ctx context.Context) (server, error)
}

// servers returns what opens the API servers that were asked for.
func (o *Options) servers(c *content) (servers, error) {
	if o.ControlPlane != "" {
		return &controlPlanes{programs: o.ControlPlane, content: c, progress: o.progress}, nil
	}
	return newFeeds(c)
}
