package main

import (
	"fmt"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// TestStaleUDPFlows checks that UDP flows to a removed endpoint continue to another one.
func TestStaleUDPFlows(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	var conns []*nettest.Conn
	for _, addr := range agenttest.ServiceAddrs(10, 80) {
		conn, err := n.client.Open(t.Context(), nettest.UDP, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if answer, err := conn.Ask(t.Context()); err != nil || answer.Host != "a" {
			t.Fatalf("answer %+v, error %v; want an answer from a", answer, err)
		}
		conns = append(conns, conn)
	}
	n.writePods("backend", "b")
	n.removeFile("pod-a.yaml")
	for _, conn := range conns {
		agenttest.Eventually(t, func() error {
			answer, err := conn.Ask(t.Context())
			if err == nil && answer.Host != "b" {
				err = fmt.Errorf("answer from %s, want b", answer.Host)
			}
			return err
		})
	}
}
