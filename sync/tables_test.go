package sync

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// TestSplitError checks that only an error that is exclusively about keys leaves the other keys
// known.
func TestSplitError(t *testing.T) {
	t.Parallel()
	k := dataplane.Key{Namespace: "default", Name: "web", Family: dataplane.IPv4}
	keyed := &dataplane.Error{Op: "apply", Failed: map[dataplane.Key]error{k: errors.New("no memory")}}
	for name, tt := range map[string]struct {
		err         error
		keys, whole bool
	}{
		"none":                           {nil, false, false},
		"keys":                           {keyed, true, false},
		"keys, wrapped":                  {fmt.Errorf("nft: %w", keyed), true, false},
		"keys joined with another error": {errors.Join(keyed, errors.New("connection lost")), false, true},
		"no keys":                        {&dataplane.Error{Op: "apply"}, false, true},
		"another":                        {errors.New("connection lost"), false, true},
	} {
		failed, whole := splitError(tt.err)
		if (len(failed) > 0) != tt.keys || (whole != nil) != tt.whole {
			t.Errorf("%s: got %v and %v, want keys %t and failure of the whole call %t", name, failed, whole, tt.keys, tt.whole)
		}
	}
}

func TestRetryDelay(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		opts     Options
		attempts int
		want     time.Duration // without the random part
	}{
		{Options{}, 1, DefaultRetryMin},
		{Options{}, 2, 2 * DefaultRetryMin},
		{Options{}, 4, 8 * DefaultRetryMin},
		{Options{}, 9, 256 * DefaultRetryMin},
		{Options{}, 10, DefaultRetryMax},
		{Options{}, 1 << 30, DefaultRetryMax},
		{Options{RetryMin: time.Minute}, 1, time.Minute},
		{Options{RetryMin: time.Minute}, 5, time.Minute},
		{Options{RetryMin: time.Second, RetryMax: 3 * time.Second}, 2, 2 * time.Second},
		{Options{RetryMin: time.Second, RetryMax: 3 * time.Second}, 3, 3 * time.Second},
	} {
		opts := tt.opts.withDefaults()
		if got := opts.retryDelay(tt.attempts, 0); got != tt.want {
			t.Errorf("%v to %v, attempt %d: %v, want %v", opts.RetryMin, opts.RetryMax, tt.attempts, got, tt.want)
		}
		if got, least := opts.retryDelay(tt.attempts, 0.999), tt.want*3/4; got < least || got > tt.want*4/5 {
			t.Errorf("%v to %v, attempt %d, largest random part: %v, want slightly more than %v", opts.RetryMin, opts.RetryMax, tt.attempts, got, least)
		}
	}
}
