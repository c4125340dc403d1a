package agent

import (
	"log/slog"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/nettest"
)

const (
	waitTimeout = agenttest.WaitTimeout
	// connectTimeout bounds connections that should succeed at once.
	connectTimeout  = 500 * time.Millisecond
	noAnswerTimeout = agenttest.NoAnswerTimeout

	podPort = 8080
)

// testNode is a network with a node for components of the agent to program.
type testNode struct {
	*nettest.Network

	t      *testing.T
	client *nettest.Host // a pod that is not an endpoint
}

func newTestNode(t *testing.T) *testNode {
	t.Helper()
	n := &testNode{t: t, Network: nettest.NewT(t, nettest.Options{})}
	n.client = n.PodT(t, "client")
	return n
}

// dialBackend opens a backend on the network's node.
func dialBackend(t *testing.T, network *nettest.Network, name string) dataplane.Dataplane {
	t.Helper()
	dp, err := backendByName(t, name).Dial(backend.Options{Logger: slog.New(slog.DiscardHandler), NetNS: network.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	return dp
}

// nft runs the nft program on the node and returns its output.
func (n *testNode) nft(args ...string) string {
	n.t.Helper()
	return agenttest.Command(n.t, n.Node, "nft", args...)
}
