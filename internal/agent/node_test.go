package agent

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/nettest"
)

const (
	// testTimeout bounds what takes milliseconds on a machine that has nothing else to do.
	testTimeout = 15 * time.Second
	// connectTimeout bounds a connection that should succeed at once.
	connectTimeout = 500 * time.Millisecond
	// noAnswerTimeout is how long an answer is waited for that must not come.
	noAnswerTimeout = 100 * time.Millisecond

	podPort = 8080
)

// eventually returns when check does without error, and fails the test if that
// takes too long.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(testTimeout)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", testTimeout, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// testNode is a network whose node parts of the agent program.
type testNode struct {
	*nettest.Network

	t      *testing.T
	client *nettest.Host // a pod that is no endpoint
}

func newTestNode(t *testing.T) *testNode {
	t.Helper()
	n := &testNode{t: t, Network: nettest.NewT(t, nettest.Options{})}
	n.client = n.PodT(t, "client")
	return n
}

// dialBackend opens a backend on the node of a network.
func dialBackend(t *testing.T, network *nettest.Network, name string) dataplane.Dataplane {
	t.Helper()
	dp, err := backendByName(t, name).Dial(backend.Options{Logger: slog.New(slog.DiscardHandler), NetNS: network.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	return dp
}

// nft runs the nft program on the node.
func (n *testNode) nft(args ...string) string {
	n.t.Helper()
	var out bytes.Buffer
	cmd := exec.CommandContext(n.t.Context(), "nft", args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := n.Node.Do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		n.t.Fatalf("nft %s: %v\n%s", args, err, &out)
	}
	return out.String()
}

// expectNoAnswer sends a packet to each of the addresses.
func (n *testNode) expectNoAnswer(from *nettest.Host, addrs []netip.AddrPort) {
	n.t.Helper()
	for _, addr := range addrs {
		ctx, cancel := context.WithTimeout(n.t.Context(), noAnswerTimeout)
		if answer, err := from.Connect(ctx, nettest.UDP, addr); err == nil {
			n.t.Errorf("%s answered: %+v", addr, answer)
		}
		cancel()
	}
}

// serviceAddrs returns the addresses of a Service, IPv4 first, that end with this byte.
func serviceAddrs(last byte, port uint16) []netip.AddrPort {
	return []netip.AddrPort{
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, last}), port),
		netip.AddrPortFrom(netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x10, 5: 0x96, 15: last}), port),
	}
}
