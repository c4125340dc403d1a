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

// contact tells the operator when the API server goes away and comes back, and
// what it refuses: once, and not at every attempt.
type contact struct {
	log *slog.Logger
	// credentials says what proves to the server who asks.
	credentials string

	mu sync.Mutex
	// away has the kinds whose last attempt got no answer, or none of use.
	away map[kind]bool
	// told has what was said of it since then, by whether it can't be reached.
	told map[bool]bool
	// unknown has the kinds for which the server does not know who asks.
	unknown map[kind]bool
	// refused has the verb that the server refuses to those whom it knows.
	refused map[kind]string
	// failing has the last attempt of each kind if that failed, and counts how
	// many did.
	failing  map[kind]attempt
	failedAt map[kind]time.Time
	counts   map[attempt]uint64
	// trouble has an element when requests begin to fail.
	trouble chan struct{}
}

// attempt is a request and what became of it.
type attempt struct {
	kind kind
	verb string
	// code is the HTTP status, or "unreachable", "timeout" or "error".
	code string
}

const codeUnreachable = "unreachable"

func newAttempt(k kind, verb string, err error) attempt {
	a := attempt{kind: k, verb: verb, code: "error"}
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
func (a attempt) String() string { return string(a.kind) + ": " + a.code }

// note remembers what became of an attempt.
func (c *contact) note(k kind, verb string, err error) {
	before, failing := c.failing[k]
	switch {
	case err != nil && !isExpired(err):
		if len(c.failing) == 0 {
			select {
			case c.trouble <- struct{}{}:
			default:
			}
		}
		a := newAttempt(k, verb, err)
		c.failing[k], c.failedAt[k] = a, time.Now()
		c.counts[a]++
	case failing && (verb == verbWatch || verb == before.verb):
		delete(c.failing, k)
	}
}

// awaitsRetry reports whether the last request for the kind was not answered, or has
// failed before a time and was not repeated since.
func (c *contact) awaitsRetry(k kind, since time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	last, failing := c.failing[k]
	return failing && (last.code == codeUnreachable || c.failedAt[k].Before(since))
}

// failed returns how many requests of the kind have failed.
func (c *contact) failed(k kind) map[Failure]uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	failed := map[Failure]uint64{}
	for a, n := range c.counts {
		if a.kind == k {
			failed[Failure{Verb: a.verb, Code: a.code}] = n
		}
	}
	return failed
}

// failures returns which kinds are not answered as they should, and how they are.
func (c *contact) failures() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var failures []string
	for _, k := range allKinds() {
		if a, ok := c.failing[k]; ok {
			failures = append(failures, a.String())
		}
	}
	return failures
}

func newContact(log *slog.Logger, credentials string) *contact {
	return &contact{
		log: log, credentials: credentials,
		away: map[kind]bool{}, told: map[bool]bool{}, unknown: map[kind]bool{}, refused: map[kind]string{},
		failing: map[kind]attempt{}, failedAt: map[kind]time.Time{}, counts: map[attempt]uint64{}, trouble: make(chan struct{}, 1),
	}
}

// heard takes what an attempt ended in.
func (c *contact) heard(ctx context.Context, k kind, verb string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.note(k, verb, err)
	switch {
	case apierrors.IsUnauthorized(err):
		c.back(ctx, k)
		if len(c.unknown) == 0 {
			c.log.WarnContext(ctx, "API server does not accept the credentials; what is programmed stays. "+
				"Check the token or client certificate of the kubeconfig's user, or of the pod's ServiceAccount",
				"credentials", c.credentials, "error", err)
		}
		c.unknown[k] = true
	case refusal(err):
		c.back(ctx, k)
		c.known(ctx, k)
		if c.refused[k] == "" {
			c.refused[k] = verb
			c.log.WarnContext(ctx, "API server refuses a request; what is programmed stays. "+
				"Allow list and watch of services, endpointslices.discovery.k8s.io and nodes",
				"verb", verb, "resource", string(k), "error", err)
		}
	case err == nil || isExpired(err):
		c.back(ctx, k)
		c.known(ctx, k)
		// Who may only list lists again and again, and that is no news. Who may
		// watch has the list already, or in the same stream.
		if refused := c.refused[k]; refused != "" && (verb == verbWatch || verb == refused) {
			delete(c.refused, k)
			c.log.InfoContext(ctx, "API server allows a request that it had refused", "verb", verb, "resource", string(k))
		}
	default:
		c.unwell(ctx, k, verb, err)
	}
}

// unwell notes that there was no answer, or none of use.
func (c *contact) unwell(ctx context.Context, k kind, verb string, err error) {
	c.away[k] = true
	_, unreachable := errors.AsType[*url.Error](err)
	switch {
	case c.told[unreachable]:
	case unreachable:
		c.log.WarnContext(ctx, "API server can't be reached; what is programmed stays", "error", err)
	default:
		c.log.WarnContext(ctx, "API server does not answer as it should; what is programmed stays",
			"resource", string(k), "code", newAttempt(k, verb, err).code, "error", err)
	}
	c.told[unreachable] = true
}

// back notes that there was an answer.
func (c *contact) back(ctx context.Context, k kind) {
	if !c.away[k] {
		return
	}
	delete(c.away, k)
	if len(c.away) == 0 {
		clear(c.told)
		c.log.InfoContext(ctx, "API server is back")
	}
}

// known notes that the server knows who asks.
func (c *contact) known(ctx context.Context, k kind) {
	if !c.unknown[k] {
		return
	}
	delete(c.unknown, k)
	if len(c.unknown) == 0 {
		c.log.InfoContext(ctx, "API server accepts the credentials again")
	}
}

// without notes that the server refuses the kind and that this is as well.
func (c *contact) without(ctx context.Context, k kind, verb string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[newAttempt(k, verb, err)]++
	delete(c.failing, k)
	c.back(ctx, k)
	c.known(ctx, k)
}

// refusal reports whether the server does not serve this, or not to us, whom it
// knows. Trying again soon is of no use then.
func refusal(err error) bool {
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
