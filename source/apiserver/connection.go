package apiserver

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// connectionState tells the operator when the API server goes away and comes back, and
// what it refuses: once, and not at every attempt.
type connectionState struct {
	log *slog.Logger
	// credentials says what proves to the server who asks.
	credentials string

	mu sync.Mutex
	// unavailable has the kinds whose last attempt got no answer, or none of use.
	unavailable map[resource]bool
	// logged has what was said of it since then, by whether it can't be reached.
	logged map[bool]bool
	// unauthenticated has the kinds for which the server does not know who asks.
	unauthenticated map[resource]bool
	// denied has the verb that the server refuses to those whom it knows.
	denied map[resource]string
	// lastFailure has the last attempt of each kind if that failed, and counts how
	// many did.
	lastFailure   map[resource]failedRequest
	failureTime   map[resource]time.Time
	failureCounts map[failedRequest]uint64
	// failureBegan has an element when requests begin to fail.
	failureBegan chan struct{}
}

// failedRequest is a request and what became of it.
type failedRequest struct {
	resource resource
	verb     string
	// code is the HTTP status, or "unreachable", "timeout" or "error".
	code string
}

const codeUnreachable = "unreachable"

func newFailedRequest(k resource, verb string, err error) failedRequest {
	a := failedRequest{resource: k, verb: verb, code: "error"}
	status, answered := errors.AsType[*apierrors.StatusError](err)
	_, unreachable := errors.AsType[*url.Error](err)
	switch {
	case answered:
		a.code = strconv.Itoa(int(status.ErrStatus.Code))
	case errors.Is(err, errTimeout):
		a.code = "timeout"
	case unreachable:
		a.code = codeUnreachable
	}
	return a
}

// String is for the log.
func (a failedRequest) String() string { return string(a.resource) + ": " + a.code }

// recordLocked remembers what became of an attempt.
func (c *connectionState) recordLocked(k resource, verb string, err error) {
	before, failing := c.lastFailure[k]
	switch {
	case err != nil && !isExpired(err):
		if len(c.lastFailure) == 0 {
			select {
			case c.failureBegan <- struct{}{}:
			default:
			}
		}
		a := newFailedRequest(k, verb, err)
		c.lastFailure[k], c.failureTime[k] = a, time.Now()
		c.failureCounts[a]++
	case failing && (verb == verbWatch || verb == before.verb):
		delete(c.lastFailure, k)
	}
}

// awaitingRetry reports whether the last request for the kind was not answered, or has
// failed before a time and was not repeated since.
func (c *connectionState) awaitingRetry(k resource, since time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	last, failing := c.lastFailure[k]
	return failing && (last.code == codeUnreachable || c.failureTime[k].Before(since))
}

// countFailures returns how many requests of the kind have failed.
func (c *connectionState) countFailures(k resource) map[Failure]uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	failed := map[Failure]uint64{}
	for a, n := range c.failureCounts {
		if a.resource == k {
			failed[Failure{Verb: a.verb, Code: a.code}] = n
		}
	}
	return failed
}

// describeFailures returns which kinds are not answered as they should, and how they are.
func (c *connectionState) describeFailures() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var failures []string
	for _, k := range allResources() {
		if a, ok := c.lastFailure[k]; ok {
			failures = append(failures, a.String())
		}
	}
	return failures
}

func newConnectionState(log *slog.Logger, credentials string) *connectionState {
	return &connectionState{
		log: log, credentials: credentials,
		unavailable: map[resource]bool{}, logged: map[bool]bool{}, unauthenticated: map[resource]bool{}, denied: map[resource]string{},
		lastFailure: map[resource]failedRequest{}, failureTime: map[resource]time.Time{}, failureCounts: map[failedRequest]uint64{}, failureBegan: make(chan struct{}, 1),
	}
}

// onResponse takes what an attempt ended in.
func (c *connectionState) onResponse(ctx context.Context, k resource, verb string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recordLocked(k, verb, err)
	switch {
	case apierrors.IsUnauthorized(err):
		c.onAnsweredLocked(ctx, k)
		if len(c.unauthenticated) == 0 {
			c.log.WarnContext(ctx, "API server does not accept the credentials; what is programmed stays. "+
				"Check the token or client certificate of the kubeconfig's user, or of the pod's ServiceAccount",
				"credentials", c.credentials, "error", err)
		}
		c.unauthenticated[k] = true
	case isDenied(err):
		c.onAnsweredLocked(ctx, k)
		c.onAuthenticatedLocked(ctx, k)
		if c.denied[k] == "" {
			c.denied[k] = verb
			c.log.WarnContext(ctx, "API server refuses a request; what is programmed stays. "+
				"Allow list and watch of services, endpointslices.discovery.k8s.io and nodes",
				"verb", verb, "resource", string(k), "error", err)
		}
	case err == nil || isExpired(err):
		c.onAnsweredLocked(ctx, k)
		c.onAuthenticatedLocked(ctx, k)
		// Who may only list lists again and again, and that is no news. Who may
		// watch has the list already, or in the same stream.
		if refused := c.denied[k]; refused != "" && (verb == verbWatch || verb == refused) {
			delete(c.denied, k)
			c.log.InfoContext(ctx, "API server allows a request that it had refused", "verb", verb, "resource", string(k))
		}
	default:
		c.onUnavailableLocked(ctx, k, verb, err)
	}
}

// onUnavailableLocked notes that there was no answer, or none of use.
func (c *connectionState) onUnavailableLocked(ctx context.Context, k resource, verb string, err error) {
	c.unavailable[k] = true
	_, unreachable := errors.AsType[*url.Error](err)
	switch {
	case c.logged[unreachable]:
	case unreachable:
		c.log.WarnContext(ctx, "API server can't be reached; what is programmed stays", "error", err)
	default:
		c.log.WarnContext(ctx, "API server does not answer as it should; what is programmed stays",
			"resource", string(k), "code", newFailedRequest(k, verb, err).code, "error", err)
	}
	c.logged[unreachable] = true
}

// onAnsweredLocked notes that there was an answer.
func (c *connectionState) onAnsweredLocked(ctx context.Context, k resource) {
	if !c.unavailable[k] {
		return
	}
	delete(c.unavailable, k)
	if len(c.unavailable) == 0 {
		clear(c.logged)
		c.log.InfoContext(ctx, "API server is back")
	}
}

// onAuthenticatedLocked notes that the server knows who asks.
func (c *connectionState) onAuthenticatedLocked(ctx context.Context, k resource) {
	if !c.unauthenticated[k] {
		return
	}
	delete(c.unauthenticated, k)
	if len(c.unauthenticated) == 0 {
		c.log.InfoContext(ctx, "API server accepts the credentials again")
	}
}

// onOptionalDenied notes that the server refuses the kind and that this is as well.
func (c *connectionState) onOptionalDenied(ctx context.Context, k resource, verb string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failureCounts[newFailedRequest(k, verb, err)]++
	delete(c.lastFailure, k)
	c.onAnsweredLocked(ctx, k)
	c.onAuthenticatedLocked(ctx, k)
}

// isDenied reports whether the server does not serve this, or not to us, whom it
// knows. Trying again soon is of no use then.
func isDenied(err error) bool {
	status, ok := errors.AsType[*apierrors.StatusError](err)
	if !ok {
		return false
	}
	switch status.ErrStatus.Code {
	case http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound,
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

// demotingHandler passes on what client-go logs as details: what matters of it is
// reported by contact, and client-go repeats it at every attempt.
type demotingHandler struct{ slog.Handler }

func (d demotingHandler) demote(l slog.Level) slog.Level {
	return min(l, slog.LevelInfo) + slog.LevelDebug
}

// Enabled asks for the level that the record will have.
func (d demotingHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return d.Handler.Enabled(ctx, d.demote(level))
}

// Handle passes the record on, with its lower level.
func (d demotingHandler) Handle(ctx context.Context, record slog.Record) error {
	record.Level = d.demote(record.Level)
	if !d.Handler.Enabled(ctx, record.Level) {
		return nil // errors come unasked
	}
	return d.Handler.Handle(ctx, record)
}

// WithAttrs returns a handler that demotes as well.
func (d demotingHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return demotingHandler{d.Handler.WithAttrs(attrs)}
}

// WithGroup returns a handler that demotes as well.
func (d demotingHandler) WithGroup(name string) slog.Handler {
	return demotingHandler{d.Handler.WithGroup(name)}
}
