package compare

import (
	"context"

	"fairlead/bench/apiserver"
	"fairlead/bench/rig"
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
	// create, update and delete change objects, one right after the other. They return
	// when the server has the last change. Objects are not changed afterwards.
	create(ctx context.Context, objects ...apiserver.Object) error
	update(ctx context.Context, objects ...apiserver.Object) error
	delete(ctx context.Context, objects ...apiserver.Object) error
	// close ends the server, which no node is joined with any more.
	close() error
}

// servers opens a server for each system, all with the same content.
type servers interface {
	open(ctx context.Context) (server, error)
}

// servers returns what opens the API servers that were asked for.
func (o *Options) servers(c *content) (servers, error) {
	if o.ControlPlane != "" {
		return &controlPlanes{programs: o.ControlPlane, content: c}, nil
	}
	return newFeeds(c)
}
