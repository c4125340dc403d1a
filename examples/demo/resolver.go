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

// searchDomain is the first search domain of pods in the namespace default.
const searchDomain = "default.svc.cluster.local"

// resolver looks up Services by name. Like the C library in a pod, it asks the cluster's name
// server for each lookup. Go's resolver would read this machine's /etc/hosts and /etc/resolv.conf.
type resolver struct {
	host   *nettest.Host // sends the queries
	server netip.AddrPort
}

func (c *cluster) resolver(host *nettest.Host) resolver {
	return resolver{host: host, server: c.nameServer()}
}

// resolvConf returns the resolv.conf for programs in pods.
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
		return nil, fmt.Errorf("look up %s: no addresses", name)
	}
	return addrs, nil
}

// query sends a query up to three times, because UDP packets may be lost.
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
			return nil, fmt.Errorf("the name server answered %s", dns.RcodeToString[answer.Rcode])
		}
		return answer, nil
	}
	return nil, err
}

// dial connects to a port of a Service, at a randomly selected address, so that connections use
// both address families. Its signature is that of http.Transport.DialContext.
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
