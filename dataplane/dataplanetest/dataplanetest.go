// Package dataplanetest is the suite of behaviours that every backend has, seen
// from the network: it builds a node, pods and a host outside out of network
// namespaces, programs Services, and opens real connections, of TCP, UDP and
// SCTP, over IPv4 and IPv6. It needs root, and of the kernel what
// [fairlead.io/fairlead/internal/nettest] and the backend need.
package dataplanetest

import (
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// Opener opens the Dataplane under test in the network namespace that the file
// descriptor netns stands for; it fails t if it cannot. The suite closes it,
// and may open several in one namespace, one after the other or at a time.
type Opener func(t testing.TB, netns int) dataplane.Dataplane

// Limits are what a backend cannot do for want of the kernel's doing it.
type Limits struct {
	// AffinityLingers says that a client's endpoint is remembered, whatever the
	// timeout, for as long as the kernel remembers one of the client's connections,
	// which for TCP is some minutes. The suite checks that instead.
	AffinityLingers bool
	// AmbiguousPorts says that a client who uses one source port for connections to
	// two Services loses the first if both are at one endpoint. The suite's clients
	// use none twice.
	AmbiguousPorts bool
}

// Run runs the suite. Each test has a network of its own, and most run in
// parallel.
func Run(t *testing.T, open Opener, limits Limits) {
	t.Helper()
	s := suite{open: open, limits: limits}
	t.Run("a Service of 1000 endpoints", s.manyEndpoints)
	t.Run("connections reach the endpoints", s.reach)
	t.Run("the choice of endpoints is even", s.even)
	t.Run("clients outside of the pod network are masqueraded", s.masquerade)
	t.Run("without endpoints connections are refused", s.noEndpoints)
	t.Run("without endpoints connections are dropped where that is wanted", s.drop)
	t.Run("clients are masqueraded as the Service wants", s.masqueradeWhom)
	t.Run("other ports of a cluster IP are refused, and other cluster IPs dropped", s.undeclared)
	t.Run("what is neither TCP, UDP nor SCTP is refused or dropped alike", s.otherProtocols)
	t.Run("node ports answer on the node's addresses for them", s.nodePorts)
	t.Run("node ports at loopback addresses are refused", s.localhost)
	t.Run("packets to loopback addresses from other hosts are dropped", s.loopback)
	t.Run("pings to Services are answered where that is wanted", s.pings)
	t.Run("invalid packets of endpoints reach nobody", s.invalid)
	t.Run("connections that a client has lost", s.lostConnections)
	t.Run("connections of which the node sees one direction", s.oneDirection)
	t.Run("outside clients get local endpoints where the policy is Local", s.externalLocal)
	t.Run("clients out of the source ranges are dropped", s.sourceRanges)
	t.Run("clients stick to an endpoint where there is affinity", s.affinity)
	t.Run("thousands of clients stick", s.manyClients)
	t.Run("a client's first connections stick together", s.atOnce)
	t.Run("a pod reaches itself through its Service", s.hairpin)
	t.Run("endpoints with the address of the node", s.nodeAsEndpoint)
	t.Run("what is no frontend is left alone", s.others)
	t.Run("a Service with the longest names", s.longNames)
	t.Run("a Service changes", s.changes)
	t.Run("Services of the same pods", s.sharedPods)
	t.Run("a Service with many frontends", s.manyFrontends)
	t.Run("frontends move between Services", s.frontendsMove)
	t.Run("connections survive", s.survive)
	t.Run("endpoints come and go under load", s.flapUnderLoad)
	t.Run("connections while endpoints come and go", s.storm)
	t.Run("a restart under load", s.restartUnderLoad)
	t.Run("Read returns what was programmed", s.read)
	t.Run("an equal Replace writes nothing", s.equalReplace)
	t.Run("a Replace tells how far it is", s.progress)
	t.Run("another's change is drift", s.drift)
}

type suite struct {
	open   Opener
	limits Limits
}
