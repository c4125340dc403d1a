package preflight

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/internal/socketowner"
)

// listener is a listening TCP socket.
type listener struct {
	addr  netip.AddrPort
	inode uint32
}

// listeners returns the listening TCP sockets with a port in the network namespace of the calling
// thread.
func listeners(port uint16) ([]listener, error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket to list sockets: %w", err)
	}
	defer conn.Close() //nolint:errcheck // nothing was written to it
	var found []listener
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		// struct inet_diag_req_v2 (linux/inet_diag.h) with the state TCP_LISTEN.
		request := make([]byte, 56)
		request[0], request[1] = family, unix.IPPROTO_TCP
		const listen = 10
		binary.NativeEndian.PutUint32(request[4:], 1<<listen)
		messages, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request | netlink.Dump}, Data: request,
		})
		if err != nil {
			return nil, fmt.Errorf("list listening sockets: %w", err)
		}
		for _, m := range messages {
			// struct inet_diag_msg has the local port and address, and ends with the inode.
			const size = 72
			if len(m.Data) < size || binary.BigEndian.Uint16(m.Data[4:]) != port {
				continue
			}
			length := 4
			if family == unix.AF_INET6 {
				length = 16
			}
			addr, _ := netip.AddrFromSlice(m.Data[8 : 8+length])
			found = append(found, listener{netip.AddrPortFrom(addr, port), binary.NativeEndian.Uint32(m.Data[size-4:])})
		}
	}
	return found, nil
}

// checkServer checks that Fairlead can listen on an address, or listens on it.
func (c *checker) checkServer(ctx context.Context, name, address string) {
	check := name + "-port"
	if address == "" {
		c.Add(check, Info, "", "the server is turned off")
		return
	}
	addr, err := netip.ParseAddrPort(address)
	if err != nil {
		c.error(check, err)
		return
	}
	all, err := listeners(addr.Port())
	if err != nil {
		c.error(check, err)
		return
	}
	i := -1
	for j, l := range all {
		if addr.Addr().IsUnspecified() || l.addr.Addr().IsUnspecified() || l.addr.Addr().Unmap() == addr.Addr() {
			i = j
		}
	}
	if i < 0 {
		if c.holder != nil {
			c.Add(check, Failed, "compare --"+name+"-bind-address with the running instance's flags, and read its log",
				"nobody listens on %s, although Fairlead runs", address)
			return
		}
		c.Add(check, OK, "", "%s is free", address)
		return
	}
	process, err := socketowner.ByInode(all[i].inode)
	owner := process.String()
	if err != nil {
		owner = "a process that is not visible here"
	}
	ready, ours := 0, c.holder != nil && err == nil && process.PID == c.holder.PID
	if name == "healthz" {
		var answered bool
		ready, answered = c.askReady(ctx, all[i].addr)
		ours = ours || answered && err != nil && c.holder != nil
	}
	switch {
	case ours && ready == http.StatusServiceUnavailable:
		c.Add(check, Failed, "read the log of Fairlead", "Fairlead listens on %s and has not programmed the node: %s returns %d", address, health.ReadyPath, ready)
	case ours:
		c.Add(check, OK, "", "Fairlead listens on %s", address)
	case c.holder != nil && (err == nil || name == "healthz"):
		c.Add(check, Failed, "end the other process; Fairlead takes the address over within "+health.RetryPeriod.String(),
			"%s listens on %s instead of Fairlead: probes, load balancers and monitoring see that process", owner, address)
	case c.holder != nil:
		c.Add(check, Info, "run the command as root on the node", "%s listens on %s", owner, address)
	default:
		c.Add(check, Warning, "end the other process when Fairlead runs, or set --"+name+"-bind-address",
			"%s listens on %s: until it ends, Fairlead retries and its pod is not ready", owner, address)
	}
}

// askReady requests /readyz and returns the status, and whether Fairlead answered.
func (c *checker) askReady(ctx context.Context, addr netip.AddrPort) (status int, answered bool) {
	const timeout = 2 * time.Second
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ip := addr.Addr().Unmap()
	if ip.IsUnspecified() {
		ip = netip.IPv6Loopback()
		if addr.Addr().Is4() {
			ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
	}
	// The dialer must use the thread of the caller, whose network namespace is checked.
	conn, err := dial(ctx, netip.AddrPortFrom(ip, addr.Port()))
	if err != nil {
		return 0, false
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+netip.AddrPortFrom(ip, addr.Port()).String()+health.ReadyPath, nil)
	if err != nil {
		return 0, false
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return 0, false
	}
	return response.StatusCode, response.Body.Close() == nil && response.Header.Get(health.ReadyHeader) == "fairlead"
}

// dial connects in the calling goroutine.
func dial(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	return (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, "tcp", addr.String())
}
