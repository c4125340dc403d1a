//go:build ipvs

// The tests in this file need a kernel that has IPVS, which few machines for tests
// have: `make test-vm` runs them in virtual machines, behind this build tag.

package ipvs

import (
	"testing"

	"fairlead/dataplane"
	"fairlead/dataplane/dataplanetest"
)

func open(t testing.TB, netns int) dataplane.Dataplane {
	t.Helper()
	d, err := Open(Options{NetNS: netns})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestBehaviour(t *testing.T) {
	dataplanetest.Run(t, open, dataplanetest.Limits{AffinityLingers: true})
}
