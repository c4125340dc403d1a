package flowoffload

import (
	"context"
	"errors"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
	"fairlead.io/fairlead/nft"
)

// TestBehaviour runs the tests of all backends while connections are offloaded after their first
// packets.
func TestBehaviour(t *testing.T) {
	skipWithoutFlowtables(t)
	dataplanetest.Run(t, func(t testing.TB, netns int) dataplane.Dataplane {
		t.Helper()
		inner, err := nft.Open(nft.Options{NetNS: netns})
		if err != nil {
			t.Fatal(err)
		}
		d, err := New(inner, Options{NetNS: netns, Threshold: 1, OnFailure: func(err error) { t.Errorf("offloading fails: %v", err) }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- d.Run(ctx) }()
		return running{d, inner, func() error { stop(); return <-done }}
	}, dataplanetest.Limitations{})
}

// running is a Dataplane with a running [Dataplane.Run].
type running struct {
	*Dataplane

	inner dataplane.Dataplane
	stop  func() error
}

func (r running) Close() error {
	return errors.Join(r.stop(), r.Dataplane.Close(), r.inner.Close())
}
