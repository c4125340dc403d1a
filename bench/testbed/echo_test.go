package testbed_test

import (
	"testing"
	"time"

	"fairlead.io/fairlead/bench/testbed"
)

func TestEcho(t *testing.T) {
	t.Parallel()
	e, err := testbed.NewEcho(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		took, err := e.RoundTrip()
		if err != nil {
			t.Fatal(err)
		}
		if took <= 0 || took > time.Minute {
			t.Errorf("a round trip took %s", took)
		}
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if _, err := e.RoundTrip(); err == nil {
		t.Error("a round trip after Close succeeded")
	}
}
