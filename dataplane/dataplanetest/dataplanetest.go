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

// Limitations are what a backend cannot do for want of the kernel's doing it.
type Limitations struct {
	// AffinityOutlivesTimeout says that a client's endpoint is remembered, whatever the
	// timeout, for as long as the kernel remembers one of the client's connections,
	// which for TCP is some minutes. The suite checks that instead.
	AffinityOutlivesTimeout bool
	// NeedUniquePorts says that a client who uses one source port for connections to
	// two Services loses the first if both are at one endpoint. The suite's clients
	// use none twice.
	NeedUniquePorts bool
}

// Run runs the suite. Each test has a network of its own, and most run in
// parallel.
func Run(t *testing.T, open Opener, limits Limitations) {
	t.Helper()
	s := suite{open: open, limitations: limits}
	t.Run("a Service of 1000 endpoints", s.testManyEndpoints)
	t.Run("connections reach the endpoints", s.testConnectivity)
	t.Run("the choice of endpoints is even", s.testDistribution)
	t.Run("clients outside of the pod network are masqueraded", s.testMasqueradeOffCluster)
	t.Run("without endpoints connections are refused", s.testNoEndpoints)
	t.Run("without endpoints connections are dropped where that is wanted", s.testDropWithoutEndpoints)
	t.Run("clients are masqueraded as the Service wants", s.testMasqueradePolicies)
	t.Run("other ports of a cluster IP are refused, and other cluster IPs dropped", s.testUndeclaredPorts)
	t.Run("what is neither TCP, UDP nor SCTP is refused or dropped alike", s.testOtherProtocols)
	t.Run("node ports answer on the node's addresses for them", s.testNodePorts)
	t.Run("node ports at loopback addresses are refused", s.testLocalhostNodePorts)
	t.Run("packets to loopback addresses from other hosts are dropped", s.testProtectLoopback)
	t.Run("pings to Services are answered where that is wanted", s.testPingServiceIPs)
	t.Run("invalid packets of endpoints reach nobody", s.testInvalidPackets)
	t.Run("connections that a client has lost", s.testHalfOpenConnections)
	t.Run("connections of which the node sees one direction", s.testAsymmetricRoutes)
	t.Run("outside clients get local endpoints where the policy is Local", s.testExternalTrafficPolicyLocal)
	t.Run("clients out of the source ranges are dropped", s.testSourceRanges)
	t.Run("clients stick to an endpoint where there is affinity", s.testAffinity)
	t.Run("thousands of clients stick", s.testAffinityManyClients)
	t.Run("a client's first connections stick together", s.testAffinityConcurrentConnections)
	t.Run("a pod reaches itself through its Service", s.testHairpin)
	t.Run("endpoints with the address of the node", s.testNodeEndpoints)
	t.Run("what is no frontend is left alone", s.testOtherTraffic)
	t.Run("a Service with the longest names", s.testLongNames)
	t.Run("a Service changes", s.testServiceChanges)
	t.Run("Services of the same pods", s.testSharedEndpoints)
	t.Run("a Service with many frontends", s.testManyFrontends)
	t.Run("frontends move between Services", s.testFrontendMoves)
	t.Run("connections survive", s.testEstablishedConnections)
	t.Run("endpoints come and go under load", s.testEndpointChangesUnderLoad)
	t.Run("connections while endpoints come and go", s.testChurn)
	t.Run("a restart under load", s.testWarmRestartUnderLoad)
	t.Run("Read returns what was programmed", s.testReadState)
	t.Run("an equal Replace writes nothing", s.testEqualReplace)
	t.Run("a Replace tells how far it is", s.testReplaceProgress)
	t.Run("another's change is drift", s.testDrift)
}

type suite struct {
	open        Opener
	limitations Limitations
}
