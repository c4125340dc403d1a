package main

import (
	"fmt"
	"testing"

	"fairlead.io/fairlead/internal/nettest"
)

// The program forgets flows of UDP to an endpoint that has left, so that they go on to
// another.
func TestStaleUDPFlows(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	var conns []*nettest.Conn
	for _, addr := range serviceAddrs(10, 80) {
		conn, err := n.client.Open(t.Context(), nettest.UDP, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if answer, err := conn.Ask(t.Context()); err != nil || answer.Host != "a" {
			t.Fatalf("answer %+v, error %v; want one of a", answer, err)
		}
		conns = append(conns, conn)
	}
	n.writePods("backend", "b")
	n.removeFile("pod-a.yaml")
	for _, conn := range conns {
		eventually(t, func() error {
			answer, err := conn.Ask(t.Context())
			if err == nil && answer.Host != "b" {
				err = fmt.Errorf("answered by %s, want b", answer.Host)
			}
			return err
		})
	}
}
