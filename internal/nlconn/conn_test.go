package nlconn

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/nettest"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const testTable = 1000

// newConn returns a route connection in a new namespace whose interface lo is up.
func newConn(t *testing.T) *Conn {
	t.Helper()
	ns := nettest.NamespaceT(t)
	c, err := Dial(unix.NETLINK_ROUTE, ns.Fd())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	up := netlink.Message{Header: netlink.Header{Type: unix.RTM_NEWLINK}, Data: []byte{
		unix.AF_UNSPEC, 0, 0, 0, 1, 0, 0, 0, unix.IFF_UP, 0, 0, 0, unix.IFF_UP, 0, 0, 0,
	}}
	if answers, err := c.Batch(t.Context(), []netlink.Message{up}); err != nil || answers[0] != nil {
		t.Fatal(answers, err)
	}
	return c
}

// routeRequest returns a request to add a local route. The kernel rejects scope 255
// (RT_SCOPE_NOWHERE).
func routeRequest(t *testing.T, to netip.Addr, scope byte) netlink.Message {
	t.Helper()
	header := []byte{unix.AF_INET, 32, 0, 0, unix.RT_TABLE_COMPAT, unix.RTPROT_STATIC, scope, unix.RTN_LOCAL, 0, 0, 0, 0}
	data, err := Encode(header, func(e *netlink.AttributeEncoder) {
		e.Bytes(unix.RTA_DST, to.AsSlice())
		e.Uint32(unix.RTA_OIF, 1)
		e.Uint32(unix.RTA_TABLE, testTable)
	})
	if err != nil {
		t.Fatal(err)
	}
	return netlink.Message{Header: netlink.Header{Type: unix.RTM_NEWROUTE, Flags: netlink.Create | netlink.Excl}, Data: data}
}

func testAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) //nolint:gosec // fits
}

// routes returns the destinations in the test table.
func routes(t *testing.T, c *Conn) map[netip.Addr]bool {
	t.Helper()
	all := map[netip.Addr]bool{}
	if _, err := c.Dump(t.Context(), routeDumpRequest(t), func(data []byte) error {
		if value, ok := Attribute(data[12:], unix.RTA_DST); ok {
			addr, _ := netip.AddrFromSlice(value)
			all[addr] = true
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

func routeDumpRequest(t *testing.T) netlink.Message {
	t.Helper()
	data, err := Encode([]byte{unix.AF_INET, 11: 0}, func(e *netlink.AttributeEncoder) { e.Uint32(unix.RTA_TABLE, testTable) })
	if err != nil {
		t.Fatal(err)
	}
	return netlink.Message{Header: netlink.Header{Type: unix.RTM_GETROUTE}, Data: data}
}

// TestBatchAnswers checks that each request gets its own answer, for any combination of errors
// and if sequence numbers wrap around.
func TestBatchAnswers(t *testing.T) {
	t.Parallel()
	for _, count := range []int{1, 2, BatchSize, BatchSize + 1, 3*BatchSize - 1} {
		for _, sequence := range []uint32{0, math.MaxUint32 - 10} {
			t.Run(fmt.Sprintf("%d requests from %d", count, sequence), func(t *testing.T) {
				t.Parallel()
				c := newConn(t)
				c.sequence = sequence
				fails := func(i int) bool { return i%7 == 3 || i == count-1 }
				var existing, requests []netlink.Message
				want := 0
				for i := range count {
					r := routeRequest(t, testAddr(i), unix.RT_SCOPE_HOST)
					requests = append(requests, r)
					if fails(i) {
						existing = append(existing, r)
					}
					want++
				}
				answers, err := c.Batch(t.Context(), existing)
				if err := errors.Join(append(answers, err)...); err != nil {
					t.Fatal(err)
				}
				answers, err = c.Batch(t.Context(), requests)
				if err != nil {
					t.Fatal(err)
				}
				for i, answer := range answers {
					if fails(i) != errors.Is(answer, unix.EEXIST) || !fails(i) && answer != nil {
						t.Errorf("answer to request %d: %v", i, answer)
					}
				}
				if all := routes(t, c); len(all) != want {
					t.Errorf("%d routes, want %d", len(all), want)
				}
			})
		}
	}
}

func TestEmptyBatch(t *testing.T) {
	t.Parallel()
	if answers, err := newConn(t).Batch(t.Context(), nil); len(answers) != 0 || err != nil {
		t.Errorf("answers %v, %v, want none", answers, err)
	}
}

// TestExtendedAcknowledgement checks that errors contain the kernel's text.
func TestExtendedAcknowledgement(t *testing.T) {
	t.Parallel()
	c := newConn(t)
	answers, err := c.Batch(t.Context(), []netlink.Message{
		routeRequest(t, testAddr(1), unix.RT_SCOPE_HOST),
		routeRequest(t, testAddr(2), unix.RT_SCOPE_NOWHERE),
		routeRequest(t, testAddr(3), unix.RT_SCOPE_HOST),
	})
	if err != nil {
		t.Fatal(err)
	}
	// See fib_create_info in net/ipv4/fib_semantics.c.
	if answer := answers[1]; !errors.Is(answer, unix.EINVAL) || !strings.Contains(fmt.Sprint(answer), "invalid argument: ") {
		t.Errorf("answer %v, want EINVAL with the kernel's text", answer)
	}
	if answers[0] != nil || answers[2] != nil {
		t.Errorf("answers %v, want an error for the second request only", answers)
	}
	// An error of a dump has the text too.
	_, err = c.Dump(t.Context(), netlink.Message{Header: netlink.Header{Type: unix.RTM_GETROUTE}, Data: []byte{unix.AF_INET, 32, 11: 0}},
		func([]byte) error { return nil })
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "invalid argument: ") {
		t.Errorf("dump: %v, want EINVAL with the kernel's text", err)
	}
	if all := routes(t, c); len(all) != 2 {
		t.Errorf("%d routes, want 2", len(all))
	}
}

// TestDumpAfterVisitError checks that a dump is read to the end after an error of visit, so
// that the next dump receives its own messages.
func TestDumpAfterVisitError(t *testing.T) {
	t.Parallel()
	c := newConn(t)
	const count = 3000
	var requests []netlink.Message
	for i := range count {
		requests = append(requests, routeRequest(t, testAddr(i), unix.RT_SCOPE_HOST))
	}
	answers, err := c.Batch(t.Context(), requests)
	if err := errors.Join(append(answers, err)...); err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	visited := 0
	if _, err := c.Dump(t.Context(), routeDumpRequest(t), func([]byte) error { visited++; return enough }); !errors.Is(err, enough) || visited != 1 {
		t.Errorf("%d messages, %v; want one message and its error", visited, err)
	}
	if all := routes(t, c); len(all) != count {
		t.Errorf("%d routes, want %d", len(all), count)
	}
}

func TestGet(t *testing.T) {
	t.Parallel()
	c := newConn(t)
	link := func(index byte) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: unix.RTM_GETLINK}, Data: []byte{unix.AF_UNSPEC, 4: index, 15: 0}}
	}
	data, err := c.Get(t.Context(), link(1))
	if err != nil {
		t.Fatal(err)
	}
	if name, _ := Attribute(data[16:], unix.IFLA_IFNAME); string(name) != "lo\x00" {
		t.Errorf("interface 1 is %q, want lo", name)
	}
	if _, err := c.Get(t.Context(), link(99)); !errors.Is(err, unix.ENODEV) {
		t.Errorf("error %v, want ENODEV", err)
	}
	if _, err := c.Get(t.Context(), link(1)); err != nil {
		t.Errorf("after an error: %v", err)
	}
}

// TestContextCanceled checks that requests after a canceled one do not receive its answers.
func TestContextCanceled(t *testing.T) {
	t.Parallel()
	c := newConn(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Batch(ended, []netlink.Message{routeRequest(t, testAddr(1), unix.RT_SCOPE_HOST)}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("error %v, want a deadline exceeded", err)
	}
	if _, err := c.Dump(ended, routeDumpRequest(t), func([]byte) error { return nil }); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("dump: error %v, want a deadline exceeded", err)
	}
	answers, err := c.Batch(t.Context(), []netlink.Message{
		routeRequest(t, testAddr(2), unix.RT_SCOPE_HOST), routeRequest(t, testAddr(2), unix.RT_SCOPE_HOST),
	})
	if err != nil || answers[0] != nil || !errors.Is(answers[1], unix.EEXIST) {
		t.Errorf("answers %v, %v; want EEXIST for the second request", answers, err)
	}
}
