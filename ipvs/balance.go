package ipvs

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/nft"
)

// Destinations returns the destinations of the virtual server at an address that can receive a new
// connection of a client, and which of them the kernel remembers for the client. ok is false if
// the address has no virtual server. Destinations needs no Dataplane and writes nothing. The error
// is as for [Open].
func Destinations(netns int, p dataplane.Protocol, server netip.AddrPort, client netip.Addr) (b nft.Balance, ok bool, err error) {
	err = inNamespace(netns, func() error {
		return withIPVS(func(c *ipvsConn) error {
			s := serverKey{p, server}
			set, exists, err := c.getServer(s)
			if err != nil || !exists {
				return err
			}
			ok = true
			destinations, err := c.dumpDestinations(s)
			if err != nil {
				return err
			}
			for addr, d := range destinations {
				if d.weight > 0 {
					b.Destinations = append(b.Destinations, addr)
				}
			}
			slices.SortFunc(b.Destinations, netip.AddrPort.Compare)
			if set.flags&flagPersistent == 0 {
				return nil
			}
			remembered, expires, err := findTemplate(p, server, client)
			if err != nil {
				return err
			}
			if slices.Contains(b.Destinations, remembered) {
				b.Remembered, b.Expires = remembered, expires
			}
			return nil
		})
	})
	if err != nil {
		return nft.Balance{}, false, explain(err)
	}
	return b, ok, nil
}

// connectionFile lists all connections of the namespace's IPVS. A persistence template is a
// connection with the client port 0 (net/netfilter/ipvs/ip_vs_conn.c, ip_vs_conn_seq_show).
const connectionFile = "/proc/thread-self/net/ip_vs_conn"

// findTemplate returns the destination that persistence selects for a client, and the time until
// the kernel forgets it.
func findTemplate(p dataplane.Protocol, server netip.AddrPort, client netip.Addr) (netip.AddrPort, time.Duration, error) {
	f, err := os.Open(connectionFile)
	if errors.Is(err, fs.ErrNotExist) {
		return netip.AddrPort{}, 0, nil
	}
	if err != nil {
		return netip.AddrPort{}, 0, fmt.Errorf("read the connections of IPVS: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read from
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		t, ok := parseTemplate(lines.Text())
		if ok && t.protocol == p && t.client == client && t.server == server {
			return t.destination, t.expires, nil
		}
	}
	if err := lines.Err(); err != nil {
		return netip.AddrPort{}, 0, fmt.Errorf("read the connections of IPVS: %w", err)
	}
	return netip.AddrPort{}, 0, nil
}

// template is a persistence template.
type template struct {
	protocol            dataplane.Protocol
	client              netip.Addr
	server, destination netip.AddrPort
	expires             time.Duration
}

// parseTemplate decodes a line of the connection file. ok is false if it is not a template of a
// virtual server with a port.
//
//	TCP C0A80A01 0000 0A600001 0050 0AF40105 1F90 NONE            10799
func parseTemplate(line string) (t template, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[2] != "0000" {
		return template{}, false
	}
	for _, p := range []dataplane.Protocol{dataplane.TCP, dataplane.UDP, dataplane.SCTP} {
		if p.String() == fields[0] {
			t.protocol = p
		}
	}
	client, err1 := parseConnectionAddr(fields[1], fields[2])
	server, err2 := parseConnectionAddr(fields[3], fields[4])
	destination, err3 := parseConnectionAddr(fields[5], fields[6])
	seconds, err4 := strconv.Atoi(fields[8])
	if t.protocol == 0 || errors.Join(err1, err2, err3, err4) != nil {
		return template{}, false
	}
	t.client, t.server, t.destination, t.expires = client.Addr(), server, destination, time.Duration(seconds)*time.Second
	return t, true
}

// parseConnectionAddr decodes an address and a port of the connection file. IPv4 addresses are
// hexadecimal numbers, and IPv6 addresses are written in full.
func parseConnectionAddr(addr, port string) (netip.AddrPort, error) {
	number, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("port %q: %w", port, err)
	}
	if strings.Contains(addr, ":") {
		a, err := netip.ParseAddr(strings.Trim(addr, "[]"))
		if err != nil {
			return netip.AddrPort{}, fmt.Errorf("address %q: %w", addr, err)
		}
		return netip.AddrPortFrom(a, uint16(number)), nil
	}
	b, err := hex.DecodeString(addr)
	if err != nil || len(b) != 4 {
		return netip.AddrPort{}, fmt.Errorf("address %q is not an IPv4 address in hexadecimal digits", addr)
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(number)), nil
}
