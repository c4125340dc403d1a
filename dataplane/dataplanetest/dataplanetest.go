// Package dataplanetest is the suite of behaviours that every backend has, seen
// from the network: it builds a node, pods and a host outside out of network
// namespaces, programs Services, and opens real connections, of TCP, UDP and
// SCTP, over IPv4 and IPv6. It needs root, and of the kernel what
// [fairlead/internal/nettest] and the backend need.
package dataplanetest

import (
	"testing"

	"fairlead/dataplane"
)

// Opener opens the Dataplane under test in the network namespace that the file
// descriptor netns stands for; it fails t if it cannot. The suite closes it,
// and may open several in one namespace, one after the other or at a time.
type Opener func(t testing.TB, netns int) dataplane.Dataplane

// Run runs the suite. Each test has a network of its own, and most run in
// parallel.
func Run(t *testing.T, open Opener) {
	t.Helper()
	// First and alone: its servers need 2,000 file descriptors, and netlink
	// libraries that use select(2) cannot have a socket above 1,023.
	t.Run("a Service of 1000 endpoints", func(t *testing.T) { testManyEndpoints(t, open) })
	for _, tt := range []struct {
		name string
		test func(t *testing.T, open Opener)
	}{
		{"connections reach the endpoints", testReach},
		{"the choice of endpoints is even", testEven},
		{"clients outside of the pod network are masqueraded", testMasquerade},
		{"without endpoints connections are refused", testNoEndpoints},
		{"a pod reaches itself through its Service", testHairpin},
		{"what is no frontend is left alone", testOthers},
		{"a Service with the longest names", testLongNames},
		{"a Service changes", testChanges},
		{"Services of the same pods", testSharedPods},
		{"frontends move between Services", testFrontendsMove},
		{"connections survive", testSurvive},
		{"endpoints come and go under load", testFlapUnderLoad},
		{"a restart under load", testRestartUnderLoad},
		{"Read returns what was programmed", testRead},
		{"an equal Replace writes nothing", testEqualReplace},
		{"another's change is drift", testDrift},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.test(t, open)
		})
	}
}
