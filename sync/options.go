package sync

import (
	"log/slog"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// Default values of Options.
const (
	DefaultRetryMin = 100 * time.Millisecond
	DefaultRetryMax = 30 * time.Second
)

// Options configures a [Syncer]. The zero value is ready to use.
type Options struct {
	// Logger receives a warning when a Service starts to fail or fails with a different error, an
	// info message when it recovers, and a debug message for each commit. Nil disables logging.
	Logger *slog.Logger

	// OnCommit is called after each dataplane call, successful or not, by the goroutine that made
	// the call: of Run or of [Syncer.UpdateInline].
	// The next call waits until it returns. OnCommit must not call [Syncer.WaitSynced]. It may
	// keep the Commit but must not modify it.
	OnCommit func(Commit)

	// RetryMin is the delay before the first retry after a failure. The delay doubles with each
	// attempt up to RetryMax. Each delay is shortened by a random part of up to a quarter, so
	// that nodes that fail together do not retry together. Zero means [DefaultRetryMin] and
	// [DefaultRetryMax].
	RetryMin, RetryMax time.Duration

	// ResyncPeriod is the maximum time between two calls of Replace. Zero, the default, means no
	// limit, because a dataplane reports drift. Set it for a dataplane that cannot detect drift.
	ResyncPeriod time.Duration

	// Prioritize reports whether Replace programs a Service before others, because other programs
	// depend on it. Nil prioritizes no Service.
	Prioritize func(dataplane.Key) bool
}

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.RetryMin <= 0 {
		o.RetryMin = DefaultRetryMin
	}
	if o.RetryMax <= 0 {
		o.RetryMax = DefaultRetryMax
	}
	o.RetryMax = max(o.RetryMax, o.RetryMin)
	return o
}

// retryDelay returns the delay after the given number of failed attempts. random, in [0, 1),
// determines the random part that is subtracted.
func (o Options) retryDelay(attempts int, random float64) time.Duration {
	d := o.RetryMin
	for range attempts - 1 {
		if d >= o.RetryMax/2 {
			d = o.RetryMax
			break
		}
		d *= 2
	}
	return d - time.Duration(random*float64(d)/4)
}
