package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/miekg/dns"

	"fairlead.io/fairlead/internal/nettest"
)

// searchDomain is where a pod of the namespace default looks for names first.
const searchDomain = "default.svc.cluster.local"

// resolver finds Services by name, as the C library of a pod does: by asking
// the cluster's name server, every time. Go's own would read this machine's
// /etc/hosts and /etc/resolv.conf.
type resolver struct {
	host   *nettest.Host // that asks
	server netip.AddrPort
}

func (c *cluster) resolver(host *nettest.Host) resolver {
	return resolver{host: host, server: c.nameServer()}
}

// resolvConf is what says the same to programs.
func (c *cluster) resolvConf() string {
	return fmt.Sprintf("nameserver %s\nsearch %s svc.cluster.local cluster.local\noptions ndots:5\n", c.net.Node.IPv4, searchDomain)
}

// lookup returns the addresses of a Service, IPv4 first.
func (r resolver) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for _, kind := range []uint16{dns.TypeA, dns.TypeAAAA} {
		answer, err := r.query(ctx, name, kind)
		if err != nil {
			return nil, fmt.Errorf("look up %s: %w", name, err)
		}
		for _, record := range answer.Answer {
			var ip net.IP
			switch record := record.(type) {
			case *dns.A:
				ip = record.A
			case *dns.AAAA:
				ip = record.AAAA
			}
			if addr, ok := netip.AddrFromSlice(ip); ok {
				addrs = append(addrs, addr.Unmap())
			}
		}
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("look up %s: it has no address", name)
	}
	return addrs, nil
}

// query asks up to three times: UDP may lose packets.
func (r resolver) query(ctx context.Context, name string, kind uint16) (*dns.Msg, error) {
	question := new(dns.Msg).SetQuestion(name+"."+searchDomain+".", kind)
	client := dns.Client{Timeout: time.Second}
	var err error
	for range 3 {
		var conn net.Conn
		if conn, err = r.host.Dial(ctx, "udp", r.server); err != nil {
			return nil, err
		}
		var answer *dns.Msg
		answer, _, err = client.ExchangeWithConnContext(ctx, question, &dns.Conn{Conn: conn})
		_ = conn.Close()
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil:
			continue
		case answer.Rcode != dns.RcodeSuccess:
			return nil, fmt.Errorf("the name server says %s", dns.RcodeToString[answer.Rcode])
		}
		return answer, nil
	}
	return nil, err
}

// dial connects to a port of a Service, at one of its addresses, chosen at
// random: those of both families are to be used. It has the signature that
// http.Transport wants.
func (r resolver) dial(ctx context.Context, network, hostPort string) (net.Conn, error) {
	name, portText, err := net.SplitHostPort(hostPort)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, err
	}
	addrs, err := r.lookup(ctx, name)
	if err != nil {
		return nil, err
	}
	addr := addrs[rand.IntN(len(addrs))] //nolint:gosec // not a secret
	return r.host.Dial(ctx, network, netip.AddrPortFrom(addr, uint16(port)))
}
