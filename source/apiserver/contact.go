package apiserver

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// contact tells the operator when the API server goes away and comes back, and
// what it refuses: once, and not at every attempt.
type contact struct {
	log *slog.Logger

	mu sync.Mutex
	// away has the kinds whose last attempt got no answer.
	away map[kind]bool
	// refused has what the server refuses.
	refused map[request]bool
}

type request struct {
	kind kind
	verb string
}

func newContact(log *slog.Logger) *contact {
	return &contact{log: log, away: map[kind]bool{}, refused: map[request]bool{}}
}

// heard takes what an attempt ended in.
func (c *contact) heard(ctx context.Context, k kind, verb string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := request{k, verb}
	switch {
	case refusal(err):
		c.back(ctx, k)
		if !c.refused[r] {
			c.refused[r] = true
			c.log.WarnContext(ctx, "API server refuses a request; what is programmed stays. "+
				"Allow list and watch of services, endpointslices.discovery.k8s.io and nodes",
				"verb", verb, "resource", string(k), "error", err)
		}
	case err == nil || isExpired(err):
		c.back(ctx, k)
		if c.refused[r] {
			delete(c.refused, r)
			c.log.InfoContext(ctx, "API server allows a request that it had refused", "verb", verb, "resource", string(k))
		}
	default:
		if len(c.away) == 0 {
			c.log.WarnContext(ctx, "API server can't be reached; what is programmed stays", "error", err)
		}
		c.away[k] = true
	}
}

// back notes that there was an answer.
func (c *contact) back(ctx context.Context, k kind) {
	if !c.away[k] {
		return
	}
	delete(c.away, k)
	if len(c.away) == 0 {
		c.log.InfoContext(ctx, "API server is back")
	}
}

// refusal reports whether the server does not serve this, or not to us. Trying
// again soon is of no use then.
func refusal(err error) bool {
	status, ok := errors.AsType[*apierrors.StatusError](err)
	if !ok {
		return false
	}
	switch status.ErrStatus.Code {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound,
		http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusUnprocessableEntity:
		return true
	default:
		return false
	}
}

// isExpired reports whether the server no longer has what changed since a
// version: the reflector lists again.
func isExpired(err error) bool {
	return apierrors.IsResourceExpired(err) || apierrors.IsGone(err)
}

// demoted passes on what client-go logs as details: what matters of it is
// reported by contact, and client-go repeats it at every attempt.
type demoted struct{ slog.Handler }

func (d demoted) level(l slog.Level) slog.Level { return min(l, slog.LevelInfo) + slog.LevelDebug }

// Enabled asks for the level that the record will have.
func (d demoted) Enabled(ctx context.Context, level slog.Level) bool {
	return d.Handler.Enabled(ctx, d.level(level))
}

// Handle passes the record on, with its lower level.
func (d demoted) Handle(ctx context.Context, record slog.Record) error {
	record.Level = d.level(record.Level)
	if !d.Handler.Enabled(ctx, record.Level) {
		return nil // errors come unasked
	}
	return d.Handler.Handle(ctx, record)
}

// WithAttrs returns a handler that demotes as well.
func (d demoted) WithAttrs(attrs []slog.Attr) slog.Handler {
	return demoted{d.Handler.WithAttrs(attrs)}
}

// WithGroup returns a handler that demotes as well.
func (d demoted) WithGroup(name string) slog.Handler { return demoted{d.Handler.WithGroup(name)} }
