// Package dataplanetest tests the behavior that every dataplane backend must have, as seen
// from the network. It builds a node, pods and an outside host from network namespaces,
// programs Services, and opens real TCP, UDP and SCTP connections over IPv4 and IPv6.
//
// The suite needs root and the kernel features that [fairlead.io/fairlead/internal/nettest]
// and the backend under test need.
package dataplanetest

import (
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// Opener opens the Dataplane under test in the network namespace of the file descriptor
// netns. It fails t on error. The suite closes the Dataplane, and may open several in one
// namespace, consecutively or concurrently.
type Opener func(t testing.TB, netns int) dataplane.Dataplane

// Limitations describes what a backend cannot do because the kernel does not support it.
type Limitations struct {
	// AffinityOutlivesTimeout is set if a client keeps its endpoint beyond the affinity
	// timeout, for as long as the kernel tracks one of the client's connections. For TCP
	// that is several minutes. The suite then checks that behavior instead.
	AffinityOutlivesTimeout bool
	// NeedUniquePorts is set if a client that uses one source port for connections to two
	// Services loses the first connection when both reach the same endpoint. The suite's
	// clients then never reuse a source port.
	NeedUniquePorts bool
	// HashMovesMore is set if clients of other endpoints may move as well when an endpoint of
	// [dataplane.SourceHash] is removed or added.
	HashMovesMore bool
}

// Run runs the suite. Each test has its own network, and most tests run in parallel.
func Run(t *testing.T, open Opener, limits Limitations) {
	t.Helper()
	RunExplained(t, open, limits, nil)
}

// RunExplained runs the suite like Run. If explain is not nil, it also compares the explanation
// of each connection with the result of the connection.
func RunExplained(t *testing.T, open Opener, limits Limitations, explain Explainer) {
	t.Helper()
	s := suite{open: open, limitations: limits, explain: explain}
	t.Run("Service with 1000 endpoints", s.testManyEndpoints)
	t.Run("connections reach all endpoints", s.testConnectivity)
	t.Run("endpoints are chosen evenly", s.testDistribution)
	t.Run("endpoints are chosen in turn", s.testRoundRobin)
	t.Run("endpoints are chosen by the client's address", s.testSourceHash)
	t.Run("balancing with session affinity", s.testBalancingWithAffinity)
	t.Run("clients outside the pod network are masqueraded", s.testMasqueradeOffCluster)
	t.Run("connections without endpoints are rejected", s.testNoEndpoints)
	t.Run("connections without endpoints are dropped", s.testDropWithoutEndpoints)
	t.Run("masquerade policies", s.testMasqueradePolicies)
	t.Run("undeclared ports are rejected and unused cluster IPs dropped", s.testUndeclaredPorts)
	t.Run("protocols other than TCP, UDP and SCTP", s.testOtherProtocols)
	t.Run("node ports answer on the configured addresses", s.testNodePorts)
	t.Run("localhost node ports are rejected", s.testLocalhostNodePorts)
	t.Run("packets to loopback addresses from other hosts are dropped", s.testProtectLoopback)
	t.Run("pings to Service IPs", s.testPingServiceIPs)
	t.Run("invalid packets from endpoints are dropped", s.testInvalidPackets)
	t.Run("half-open connections are reset", s.testHalfOpenConnections)
	t.Run("masqueraded source ports are used again", s.testMasqueradedPortReuse)
	t.Run("connections with asymmetric routes", s.testAsymmetricRoutes)
	t.Run("external traffic policy Local", s.testExternalTrafficPolicyLocal)
	t.Run("source ranges", s.testSourceRanges)
	t.Run("session affinity", s.testAffinity)
	t.Run("session affinity of many clients", s.testAffinityManyClients)
	t.Run("session affinity of concurrent connections", s.testAffinityConcurrentConnections)
	t.Run("hairpin connections", s.testHairpin)
	t.Run("endpoints on the node itself", s.testNodeEndpoints)
	t.Run("other traffic is unchanged", s.testOtherTraffic)
	t.Run("Service with the longest names", s.testLongNames)
	t.Run("changes of a Service", s.testServiceChanges)
	t.Run("Services that share endpoints", s.testSharedEndpoints)
	t.Run("Service with many frontends", s.testManyFrontends)
	t.Run("frontends move between Services", s.testFrontendMoves)
	t.Run("established connections survive", s.testEstablishedConnections)
	t.Run("endpoints change under load", s.testEndpointChangesUnderLoad)
	t.Run("connections while endpoints come and go", s.testChurn)
	t.Run("warm restart under load", s.testWarmRestartUnderLoad)
	t.Run("Read returns the programmed state", s.testReadState)
	t.Run("an equal Replace writes nothing", s.testEqualReplace)
	t.Run("Replace reports progress", s.testReplaceProgress)
	t.Run("changes by another writer are drift", s.testDrift)
}

type suite struct {
	open        Opener
	limitations Limitations
	explain     Explainer
}
