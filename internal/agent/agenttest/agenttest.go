// Package agenttest provides helpers for tests of the node agent and of its command, which
// program nodes of package nettest.
package agenttest

import (
	"bytes"
	"context"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

// WaitTimeout bounds operations that take milliseconds on an idle machine.
const WaitTimeout = 15 * time.Second

// NoAnswerTimeout is how long to wait for an answer that must not arrive.
const NoAnswerTimeout = 100 * time.Millisecond

// OtherTables are nft commands that create tables of another program.
const OtherTables = `
	add table ip foreign
	add chain ip foreign in { type filter hook input priority 0; policy accept; }
	add set ip foreign services { type ipv4_addr; elements = { 10.96.0.10 }; }
	add table ip6 foreign
	add table inet fairlead
	add chain inet fairlead prerouting
	add rule inet fairlead prerouting counter`

// Eventually calls check until it returns nil. It fails the test after [WaitTimeout].
func Eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(WaitTimeout)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", WaitTimeout, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// ServiceAddrs returns the addresses of a Service that end with this byte, IPv4 first.
func ServiceAddrs(last byte, port uint16) []netip.AddrPort {
	return []netip.AddrPort{
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, last}), port),
		netip.AddrPortFrom(netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x10, 5: 0x96, 15: last}), port),
	}
}

// Command runs a program on the host and returns its output. It fails the test if the program
// fails.
func Command(t *testing.T, host *nettest.Host, name string, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := host.Do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, &out)
	}
	return out.String()
}

// ExpectNoAnswer sends one UDP packet to each address and fails the test if one is answered.
func ExpectNoAnswer(t *testing.T, from *nettest.Host, addrs []netip.AddrPort) {
	t.Helper()
	for _, addr := range addrs {
		ctx, cancel := context.WithTimeout(t.Context(), NoAnswerTimeout)
		if answer, err := from.Connect(ctx, nettest.UDP, addr); err == nil {
			t.Errorf("%s answered: %+v", addr, answer)
		}
		cancel()
	}
}
