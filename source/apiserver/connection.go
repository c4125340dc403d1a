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

// connectionState logs when the API server becomes unavailable, denies requests or
// recovers. It logs each change once instead of each failed attempt.
type connectionState struct {
	log *slog.Logger
	// credentials describes how the client authenticates.
	credentials string

	mu sync.Mutex
	// unavailable has the resources whose last request got no response or a server error.
	unavailable map[resource]bool
	// logged records the warnings since the first entry in unavailable, by whether the
	// server is unreachable.
	logged map[bool]bool
	// unauthenticated has the resources for which the server rejects the credentials.
	unauthenticated map[resource]bool
	// denied has the verb that the server denies to an authenticated client.
	denied map[resource]string
	// lastFailure has the last request for each resource if it failed, failureTime its
	// time, and failureCounts the number of failed requests.
	lastFailure   map[resource]failedRequest
	failureTime   map[resource]time.Time
	failureCounts map[failedRequest]uint64
	// lastResponse is when the server last answered a request, even with an error.
	lastResponse time.Time
	// failureBegan holds one element when requests start to fail.
	failureBegan chan struct{}
}

// failedRequest identifies a failed request and its result.
type failedRequest struct {
	resource resource
	verb     string
	// code is the HTTP status, or "unreachable", "timeout" or "error".
	code string
}

const (
	codeUnreachable = "unreachable"
	codeTimeout     = "timeout"
	codeError       = "error"
)

func newFailedRequest(res resource, verb string, err error) failedRequest {
	a := failedRequest{resource: res, verb: verb, code: codeError}
	status, answered := errors.AsType[*apierrors.StatusError](err)
	_, unreachable := errors.AsType[*url.Error](err)
	switch {
	case answered:
		a.code = strconv.Itoa(int(status.ErrStatus.Code))
	case errors.Is(err, errTimeout):
		a.code = codeTimeout
	case unreachable:
		a.code = codeUnreachable
	}
	return a
}

// String returns the form used in logs.
func (f failedRequest) String() string { return string(f.resource) + ": " + f.code }

// recordLocked stores the result of a request. The caller holds mu.
func (c *connectionState) recordLocked(res resource, verb string, err error) {
	if code := newFailedRequest(res, verb, err).code; err == nil || code != codeUnreachable && code != codeTimeout && code != codeError {
		c.lastResponse = time.Now()
	}
	before, failing := c.lastFailure[res]
	switch {
	case err != nil && !isExpired(err):
		if len(c.lastFailure) == 0 {
			select {
			case c.failureBegan <- struct{}{}:
			default:
			}
		}
		a := newFailedRequest(res, verb, err)
		c.lastFailure[res], c.failureTime[res] = a, time.Now()
		c.failureCounts[a]++
	case failing && (verb == verbWatch || verb == before.verb):
		delete(c.lastFailure, res)
	}
}

// awaitingRetry reports whether the last request for the resource found the server
// unreachable, or failed before since and has not been repeated.
func (c *connectionState) awaitingRetry(res resource, since time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	last, failing := c.lastFailure[res]
	return failing && (last.code == codeUnreachable || c.failureTime[res].Before(since))
}

// countFailures returns the number of failed requests for the resource.
func (c *connectionState) countFailures(res resource) map[Failure]uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	failed := map[Failure]uint64{}
	for a, n := range c.failureCounts {
		if a.resource == res {
			failed[Failure{Verb: a.verb, Code: a.code}] = n
		}
	}
	return failed
}

// describeFailures returns the resources whose last request failed, with the failure's
// code.
func (c *connectionState) describeFailures() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var failures []string
	for _, res := range allResources() {
		if a, ok := c.lastFailure[res]; ok {
			failures = append(failures, a.String())
		}
	}
	return failures
}

// status returns the state of the connection.
func (c *connectionState) status() ConnectionStatus {
	failures := c.describeFailures()
	c.mu.Lock()
	defer c.mu.Unlock()
	s := ConnectionStatus{Connected: !c.lastResponse.IsZero(), LastResponse: c.lastResponse, Failures: failures}
	for _, f := range c.lastFailure {
		if f.code == codeUnreachable || f.code == codeTimeout {
			s.Connected = false
		}
	}
	return s
}

func newConnectionState(log *slog.Logger, credentials string) *connectionState {
	return &connectionState{
		log: log, credentials: credentials,
		unavailable: map[resource]bool{}, logged: map[bool]bool{}, unauthenticated: map[resource]bool{}, denied: map[resource]string{},
		lastFailure: map[resource]failedRequest{}, failureTime: map[resource]time.Time{}, failureCounts: map[failedRequest]uint64{}, failureBegan: make(chan struct{}, 1),
	}
}

// onResponse logs changes that follow from the result of a request.
func (c *connectionState) onResponse(ctx context.Context, res resource, verb string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recordLocked(res, verb, err)
	switch {
	case apierrors.IsUnauthorized(err):
		c.onAnsweredLocked(ctx, res)
		if len(c.unauthenticated) == 0 {
			c.log.WarnContext(ctx, "API server does not accept the credentials; programmed Services stay in place. "+
				"Check the token or client certificate of the kubeconfig's user, or of the pod's ServiceAccount",
				"credentials", c.credentials, "error", err)
		}
		c.unauthenticated[res] = true
	case isDenied(err):
		c.onAnsweredLocked(ctx, res)
		c.onAuthenticatedLocked(ctx, res)
		if c.denied[res] == "" {
			c.denied[res] = verb
			c.log.WarnContext(ctx, "API server denies a request; programmed Services stay in place. "+
				"Allow list and watch of services, endpointslices.discovery.k8s.io and nodes",
				"verb", verb, "resource", string(res), "error", err)
		}
	case err == nil || isExpired(err):
		c.onAnsweredLocked(ctx, res)
		c.onAuthenticatedLocked(ctx, res)
		// A client that may only list succeeds at each list, which is no recovery. A
		// client that may watch has the list already, or gets it in the same stream.
		if refused := c.denied[res]; refused != "" && (verb == verbWatch || verb == refused) {
			delete(c.denied, res)
			c.log.InfoContext(ctx, "API server allows a request that it denied before", "verb", verb, "resource", string(res))
		}
	default:
		c.onUnavailableLocked(ctx, res, verb, err)
	}
}

// onUnavailableLocked records that a request got no response or a server error.
func (c *connectionState) onUnavailableLocked(ctx context.Context, res resource, verb string, err error) {
	c.unavailable[res] = true
	_, unreachable := errors.AsType[*url.Error](err)
	switch {
	case c.logged[unreachable]:
	case unreachable:
		c.log.WarnContext(ctx, "API server can't be reached; programmed Services stay in place", "error", err)
	default:
		c.log.WarnContext(ctx, "API server returns errors; programmed Services stay in place",
			"resource", string(res), "code", newFailedRequest(res, verb, err).code, "error", err)
	}
	c.logged[unreachable] = true
}

// onAnsweredLocked records that the server responded.
func (c *connectionState) onAnsweredLocked(ctx context.Context, res resource) {
	if !c.unavailable[res] {
		return
	}
	delete(c.unavailable, res)
	if len(c.unavailable) == 0 {
		clear(c.logged)
		c.log.InfoContext(ctx, "API server is back")
	}
}

// onAuthenticatedLocked records that the server accepts the credentials.
func (c *connectionState) onAuthenticatedLocked(ctx context.Context, res resource) {
	if !c.unauthenticated[res] {
		return
	}
	delete(c.unauthenticated, res)
	if len(c.unauthenticated) == 0 {
		c.log.InfoContext(ctx, "API server accepts the credentials again")
	}
}

// onOptionalDenied records that the server denies an optional resource, which needs no
// warning.
func (c *connectionState) onOptionalDenied(ctx context.Context, res resource, verb string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failureCounts[newFailedRequest(res, verb, err)]++
	c.lastResponse = time.Now()
	delete(c.lastFailure, res)
	c.onAnsweredLocked(ctx, res)
	c.onAuthenticatedLocked(ctx, res)
}

// isDenied reports whether the server denies the request permanently: it does not serve the
// resource, does not allow the authenticated client to read it, or does not accept the
// parameters. An early retry is useless.
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

// isExpired reports whether the server no longer has the changes since the requested
// version. The reflector lists again.
func isExpired(err error) bool {
	return apierrors.IsResourceExpired(err) || apierrors.IsGone(err)
}

// demotingHandler passes client-go's records on at a lower level. connectionState reports
// failures once; client-go repeats them at each attempt.
type demotingHandler struct{ slog.Handler }

func (d demotingHandler) demote(l slog.Level) slog.Level {
	return min(l, slog.LevelInfo) + slog.LevelDebug
}

// Enabled checks the lowered level.
func (d demotingHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return d.Handler.Enabled(ctx, d.demote(level))
}

// Handle passes the record on at the lowered level.
func (d demotingHandler) Handle(ctx context.Context, record slog.Record) error {
	record.Level = d.demote(record.Level)
	if !d.Handler.Enabled(ctx, record.Level) {
		return nil // client-go does not call Enabled for errors
	}
	return d.Handler.Handle(ctx, record)
}

// WithAttrs implements [slog.Handler].
func (d demotingHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return demotingHandler{d.Handler.WithAttrs(attrs)}
}

// WithGroup implements [slog.Handler].
func (d demotingHandler) WithGroup(name string) slog.Handler {
	return demotingHandler{d.Handler.WithGroup(name)}
}
