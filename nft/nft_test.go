package nft_test

import (
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
	"fairlead.io/fairlead/nft"
)

func open(t testing.TB, netns int) dataplane.Dataplane {
	t.Helper()
	d, err := nft.Open(nft.Options{NetNS: netns})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestBehaviour runs the dataplane test suite, which sends real packets, against this
// backend. It also compares where each packet goes with what a Walker says.
func TestBehaviour(t *testing.T) {
	dataplanetest.RunExplained(t, open, dataplanetest.Limitations{}, explain)
}
