package sync

import (
	"log/slog"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// The values that the zero Options stand for.
const (
	DefaultRetryMin = 100 * time.Millisecond
	DefaultRetryMax = 30 * time.Second
)

// Options adjust a [Syncer]. The zero value is ready to use.
type Options struct {
	// Logger gets a Warn when a Service starts to fail or fails differently,
	// an Info when it no longer does, and a Debug for each commit. Nil means
	// no logging.
	Logger *slog.Logger

	// OnCommit is called after each call to the dataplane, also after one that
	// failed, from the goroutine of Run: the next call waits until it returns.
	// It must not call [Syncer.WaitSynced]. What it is given is its own to keep,
	// but not to change.
	OnCommit func(Commit)

	// RetryMin is the delay before the first attempt to repair what failed,
	// and RetryMax the longest one; in between it doubles with each attempt.
	// A random part of up to a quarter is taken off each delay, so that nodes
	// that fail together do not retry together. Zero means [DefaultRetryMin]
	// and [DefaultRetryMax].
	RetryMin, RetryMax time.Duration

	// ResyncPeriod is the time after which a Replace happens although nothing
	// asked for one. Zero, the default, means never: a dataplane announces
	// drift by itself. Set it for one that has no way to notice.
	ResyncPeriod time.Duration

	// Prioritize reports whether Replace is given a Service before others, because other
	// programs need it for their work. Nil means that none is.
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

// retryDelay returns the time to wait after attempt attempts have failed, with
// random, in [0, 1), deciding how much of it is taken off.
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
