package main

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"fairlead.io/fairlead/internal/nettest"
)

// localhost are the addresses that node ports are served at by a relay.
func localhost(port uint16) []netip.AddrPort {
	return []netip.AddrPort{
		netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port),
		netip.AddrPortFrom(netip.IPv6Loopback(), port),
	}
}

// awaitRefusedHere waits until the node's own connections are refused.
func (n *node) awaitRefusedHere(network string, addr netip.AddrPort) {
	n.t.Helper()
	eventually(n.t, func() error {
		answer, err := connect(n.t.Context(), n.Node, network, addr)
		if errors.Is(err, nettest.ErrRefused) {
			return nil
		}
		return fmt.Errorf("%s %s: answer %+v, error %w; want a refusal", network, addr, answer, err)
	})
}

// Node ports are served at loopback addresses where these are asked for, over TCP
// alone, and so are health-check node ports; that follows the configuration, and
// what is programmed.
func TestLocalhostNodePorts(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a", "b")
	n.put("backend.yaml", `apiVersion: v1
kind: Service
metadata: {name: backend}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  healthCheckNodePort: 32000
  ipFamilyPolicy: RequireDualStack
  selector: {app: backend}
  ports:
    - {name: tcp, port: 80, nodePort: 30080, targetPort: web}
    - {name: udp, port: 80, nodePort: 30080, targetPort: 8080, protocol: UDP}
`)
	n.putPods("backend", "a", "b")
	path := filepath.Join(t.TempDir(), "config.yaml")
	configure := func(addresses string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(configHeader+"nodePortAddresses: ["+addresses+"]\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	configure("all")
	args := append(n.runArgs(), "--config="+path)
	n.program = n.start(nil, args...)
	n.program.await(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
	listeners := func(v4, v6 int) {
		t.Helper()
		for family, want := range map[string]int{"IPv4": v4, "IPv6": v6} {
			n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK,
				fmt.Sprintf("kubeproxy_nftables_localhost_nodeport_listeners{ip_family=%q} %d\n", family, want))
		}
	}
	refused := func(networks ...string) {
		t.Helper()
		for _, network := range networks {
			for _, addr := range localhost(30080) {
				n.awaitRefusedHere(network, addr)
			}
		}
	}
	listeners(0, 0)
	refused("tcp", "udp")

	configure("localhost")
	listeners(1, 1)
	for _, addr := range localhost(30080) {
		eventually(t, func() error { return answers(t.Context(), n.Node, "tcp", addr, "a", "b") })
	}
	refused("udp")
	for _, addr := range localhost(32000) {
		n.awaitGet(n.Node, addr.String(), "/", http.StatusOK, `"localEndpoints": 2`)
	}
	n.awaitClosed(n.on(n.Node.IPv4, 32000))

	n.drop("pod-a.yaml")
	eventually(t, func() error { return answers(t.Context(), n.Node, "tcp", localhost(30080)[1], "b") })
	n.drop("pod-b.yaml")
	listeners(0, 0)
	refused("tcp")
	n.putPods("backend", "a")
	listeners(1, 1)

	configure("127.0.0.0/8")
	listeners(1, 0)
	eventually(t, func() error { return answers(t.Context(), n.Node, "tcp", localhost(30080)[0], "a") })
	n.awaitRefusedHere("tcp", localhost(30080)[1])
	n.stop()
	refused("tcp")
}
