package apiserver

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"

	"k8s.io/client-go/rest"

	"fairlead/kube"
)

// Options say which API server to follow, and for which node.
type Options struct {
	// Config says how to reach the API server, see [Config].
	Config *rest.Config
	// NodeName is the name of this node's Node object.
	NodeName string
	// Version is the program's, for the user agent. It may be empty.
	Version string
	// Logger takes what is unusual. Nil discards it.
	Logger *slog.Logger
}

// Source follows the objects of an API server.
type Source struct {
	log    *slog.Logger
	synced atomic.Bool
}

// New returns a Source. It starts nothing and does not speak to the server.
func New(opts Options) (*Source, error) {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Source{log: log}, nil
}

// Run delivers everything there is, and then each change. It blocks until ctx is
// done, and then returns nil. deliver is called from within Run, one call at a
// time. Run must be called only once.
//
// The first Delta comes when all lists are complete. Changes that arrive while
// deliver is busy gather and come in one Delta.
func (s *Source) Run(ctx context.Context, deliver func(kube.Delta)) error {
	return errors.New("not yet")
}

// Synced reports whether the first Delta has been delivered.
func (s *Source) Synced() bool { return s.synced.Load() }
