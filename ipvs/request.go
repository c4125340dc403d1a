package ipvs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ipvsConn is IPVS of a network namespace, as its generic netlink family offers it
// (linux/ip_vs.h, IPVS_GENL_NAME).
type ipvsConn struct {
	conn   *nlconn.Conn
	family netlink.HeaderType
}

// dialIPVS connects to IPVS. The error is unix.ENOENT where the kernel has none:
// to ask makes it load the module, where there is a modprobe.
func dialIPVS(netns int) (*ipvsConn, error) {
	conn, err := nlconn.Dial(unix.NETLINK_GENERIC, netns)
	if err != nil {
		return nil, err
	}
	k := &ipvsConn{conn: conn}
	if err := k.resolveFamily(); err != nil {
		return nil, errors.Join(err, k.close())
	}
	return k, nil
}

func (k *ipvsConn) close() error { return k.conn.Close() }

// resolveFamily asks for the number of the family, which the kernel assigns when the module is
// loaded.
func (k *ipvsConn) resolveFamily() error {
	request := newMessage(unix.GENL_ID_CTRL, command(unix.CTRL_CMD_GETFAMILY), func(b []byte) []byte {
		return nlconn.AppendString(b, unix.CTRL_ATTR_FAMILY_NAME, "IPVS")
	})
	body, err := k.conn.Get(context.Background(), request)
	if err != nil {
		return fmt.Errorf("ask the kernel for IPVS: %w", err)
	}
	number, _ := nlconn.Attribute(body[genericHeaderLen:], unix.CTRL_ATTR_FAMILY_ID)
	k.family = netlink.HeaderType(nlconn.Uint16(number, binary.NativeEndian))
	return nil
}

// genericHeaderLen is the size of a struct genlmsghdr (linux/genetlink.h).
const genericHeaderLen = 4

// newMessage encodes a command of a family: a header with version 1 of the family, and
// attributes.
func newMessage(family netlink.HeaderType, c command, attributes func([]byte) []byte) netlink.Message {
	b := append(make([]byte, 0, messageCapacity), byte(c), 1, 0, 0)
	return netlink.Message{Header: netlink.Header{Type: family}, Data: attributes(b)}
}

// messageCapacity is room for the largest request.
const messageCapacity = 192

// command is a command of the IPVS family.
type command uint8

const (
	newService  command = 1
	setService  command = 2
	delService  command = 3
	getService  command = 4
	newDest     command = 5
	setDest     command = 6
	delDest     command = 7
	getDest     command = 8
	setTimeouts command = 12
)

func (c command) String() string {
	return map[command]string{
		newService: "add the virtual server", setService: "change the virtual server", delService: "delete the virtual server",
		newDest: "add the destination", setDest: "change the destination", delDest: "delete the destination",
	}[c]
}

// Attributes of a command, a service and a destination (linux/ip_vs.h).
const (
	attrService    = 1
	attrDest       = 2
	attrTCPTimeout = 4
	attrTCPFin     = 5
	attrUDPTimeout = 6

	serviceFamily    = 1
	serviceProtocol  = 2
	serviceAddr      = 3
	servicePort      = 4
	serviceFwmark    = 5
	serviceScheduler = 6
	serviceFlags     = 7
	serviceTimeout   = 8
	serviceNetmask   = 9

	destAddr           = 1
	destPort           = 2
	destForwarding     = 3
	destWeight         = 4
	destUpperThreshold = 5
	destLowerThreshold = 6
	destActive         = 7
	destInactive       = 8
	destFamily         = 11
)

// request is a change of one virtual server or destination.
type request struct {
	command
	serverKey

	settings                // of newService and setService
	dest     netip.AddrPort // of the commands about destinations
	weight   uint32         // of newDest and setDest
}

// String says what is done, to what: "add the destination 10.0.0.1:80 of 10.96.0.1:80/TCP".
func (r request) String() string {
	if r.dest.IsValid() {
		return fmt.Sprintf("%s %s of %s", r.command, r.dest, r.serverKey)
	}
	return fmt.Sprintf("%s %s", r.command, r.serverKey)
}

// message encodes the request for the family.
func (r request) message(family netlink.HeaderType) netlink.Message {
	return newMessage(family, r.command, func(b []byte) []byte {
		b = nlconn.AppendNested(b, attrService, r.appendService)
		if r.dest.IsValid() {
			b = nlconn.AppendNested(b, attrDest, r.appendDestination)
		}
		return b
	})
}

func (r request) appendService(b []byte) []byte {
	b = r.appendKey(b)
	if r.command != newService && r.command != setService {
		return b
	}
	var flags [8]byte
	binary.NativeEndian.PutUint32(flags[:], r.flags)
	binary.NativeEndian.PutUint32(flags[4:], flagMask)
	b = nlconn.AppendString(b, serviceScheduler, r.scheduler)
	b = nlconn.AppendBytes(b, serviceFlags, flags[:])
	b = nlconn.AppendUint32(b, serviceTimeout, r.timeout)
	// All of the client's address counts for persistence.
	if r.addr.Addr().Is4() {
		return nlconn.AppendBytes(b, serviceNetmask, []byte{0xff, 0xff, 0xff, 0xff})
	}
	return nlconn.AppendUint32(b, serviceNetmask, 128)
}

func (r request) appendDestination(b []byte) []byte {
	b = appendAddrPort(b, destAddr, destPort, r.dest)
	if r.command != delDest {
		b = nlconn.AppendUint32(b, destForwarding, 0) // NAT
		b = nlconn.AppendUint32(b, destWeight, r.weight)
		b = nlconn.AppendUint32(b, destUpperThreshold, 0)
		b = nlconn.AppendUint32(b, destLowerThreshold, 0)
	}
	return nlconn.AppendUint16(b, destFamily, addressFamily(r.dest.Addr()))
}

// appendKey appends the attributes that the kernel finds the virtual server by.
func (s serverKey) appendKey(b []byte) []byte {
	b = nlconn.AppendUint16(b, serviceFamily, addressFamily(s.addr.Addr()))
	b = nlconn.AppendUint16(b, serviceProtocol, uint16(s.protocol))
	return appendAddrPort(b, serviceAddr, servicePort, s.addr)
}

// appendAttribute appends the attribute of a command about a virtual server.
func (s serverKey) appendAttribute(b []byte) []byte {
	return nlconn.AppendNested(b, attrService, s.appendKey)
}

// appendAddrPort appends an address as the kernel's union nf_inet_addr, which has an IPv4
// address in the first four of 16 bytes, and a port in network byte order.
func appendAddrPort(b []byte, addrType, portType uint16, a netip.AddrPort) []byte {
	var addr [16]byte
	if a.Addr().Is4() {
		v4 := a.Addr().As4()
		copy(addr[:], v4[:])
	} else {
		addr = a.Addr().As16()
	}
	b = nlconn.AppendBytes(b, addrType, addr[:])
	return nlconn.AppendBytes(b, portType, []byte{byte(a.Port() >> 8), byte(a.Port())}) //nolint:gosec // the two halves
}

func addressFamily(a netip.Addr) uint16 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func parseAddr(b []byte, family uint16) netip.Addr {
	if len(b) < 16 {
		return netip.Addr{}
	}
	if family == unix.AF_INET {
		b = b[:4]
	}
	a, _ := netip.AddrFromSlice(b[:min(16, len(b))])
	return a
}

// run carries out requests, many by one system call, and returns the kernel's answer to
// each.
func (k *ipvsConn) run(requests []request) ([]error, error) {
	messages := make([]netlink.Message, len(requests))
	for i, r := range requests {
		messages[i] = r.message(k.family)
	}
	return k.conn.Batch(context.Background(), messages)
}

// dumpServers returns all virtual servers of the namespace by protocol and address, but
// those by firewall mark.
//
// One may be missing, or two, when any are added or deleted meanwhile, in whatever
// namespace: the kernel goes on in its table where as many came before as it has
// listed (net/netfilter/ipvs/ip_vs_ctl.c, ip_vs_genl_dump_services). See complete.
func (k *ipvsConn) dumpServers() (map[serverKey]settings, error) {
	found := map[serverKey]settings{}
	list := func() error {
		request := newMessage(k.family, getService, func(b []byte) []byte { return b })
		_, err := k.conn.Dump(context.Background(), request, func(body []byte) error {
			forEachService(body, func(s serverKey, set settings) { found[s] = set })
			return nil
		})
		return err
	}
	err := list()
	if errors.Is(err, unix.ENOENT) { // The module was loaded anew.
		if err = k.resolveFamily(); err == nil {
			err = list()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list the virtual servers: %w", err)
	}
	return found, nil
}

// addMissing looks for virtual servers one by one that were not listed although they
// should have been.
func (k *ipvsConn) addMissing(found map[serverKey]settings, expected iter.Seq[serverKey]) error {
	for s := range expected {
		if _, listed := found[s]; listed {
			continue
		}
		set, there, err := k.getServer(s)
		if err != nil {
			return err
		}
		if there {
			found[s] = set
		}
	}
	return nil
}

// getServer returns one virtual server, and whether it is there.
func (k *ipvsConn) getServer(s serverKey) (set settings, there bool, err error) {
	body, err := k.conn.Get(context.Background(), newMessage(k.family, getService, s.appendAttribute))
	forEachService(body, func(found serverKey, of settings) { set, there = of, found == s })
	if err != nil && !isNotFound(err) {
		return settings{}, false, fmt.Errorf("look for the virtual server %s: %w", s, err)
	}
	return set, there, nil
}

// forEachService calls visit with the virtual servers in a message of the family.
func forEachService(body []byte, visit func(serverKey, settings)) {
	for typ, data := range nlconn.Attributes(body[min(genericHeaderLen, len(body)):]) {
		if typ != attrService {
			continue
		}
		if s, set, ok := parseService(data); ok {
			visit(s, set)
		}
	}
}

// parseService decodes a virtual server; one by firewall mark is none of ours.
func parseService(b []byte) (serverKey, settings, bool) {
	var (
		s                serverKey
		set              settings
		family, port     uint16
		addr             []byte
		marked, complete bool
	)
	for typ, data := range nlconn.Attributes(b) {
		switch typ {
		case serviceFamily:
			family = nlconn.Uint16(data, binary.NativeEndian)
		case serviceProtocol:
			s.protocol = dataplane.Protocol(nlconn.Uint16(data, binary.NativeEndian)) //nolint:gosec // it is one
		case serviceAddr:
			addr = data
		case servicePort:
			port, complete = nlconn.Uint16(data, binary.BigEndian), true
		case serviceFwmark:
			marked = true
		case serviceScheduler:
			set.scheduler = unix.ByteSliceToString(data)
		case serviceFlags:
			set.flags = nlconn.Uint32(data[:min(4, len(data))]) & flagMask // struct ip_vs_flags: behind them is a mask
		case serviceTimeout:
			set.timeout = nlconn.Uint32(data)
		}
	}
	if set.flags&flagPersistent == 0 {
		set.timeout = 0
	}
	s.addr = netip.AddrPortFrom(parseAddr(addr, family), port)
	return s, set, complete && !marked && s.addr.Addr().IsValid()
}

// destination is what the kernel has of one.
type destination struct {
	weight uint32
	// connections are those that it has: established ones and others, which the
	// kernel remembers for a while.
	connections uint32
	// nat says that it is reached by translation, as all of ours are.
	nat bool
}

// dumpDestinations returns those of a virtual server. It returns none if there is no
// such server.
func (k *ipvsConn) dumpDestinations(s serverKey) (map[netip.AddrPort]destination, error) {
	found := map[netip.AddrPort]destination{}
	_, err := k.conn.Dump(context.Background(), newMessage(k.family, getDest, s.appendAttribute), func(body []byte) error {
		for typ, data := range nlconn.Attributes(body[min(genericHeaderLen, len(body)):]) {
			if typ == attrDest {
				addr, d := parseDestination(data, addressFamily(s.addr.Addr()))
				found[addr] = d
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("list the destinations of %s: %w", s, err)
	}
	return found, nil
}

func parseDestination(b []byte, family uint16) (netip.AddrPort, destination) {
	var (
		addr []byte
		port uint16
		d    destination
	)
	for typ, data := range nlconn.Attributes(b) {
		switch typ {
		case destAddr:
			addr = data
		case destPort:
			port = nlconn.Uint16(data, binary.BigEndian)
		case destFamily:
			family = nlconn.Uint16(data, binary.NativeEndian)
		case destForwarding:
			d.nat = nlconn.Uint32(data)&7 == 0 // IP_VS_CONN_F_FWD_MASK
		case destWeight:
			d.weight = nlconn.Uint32(data)
		case destActive, destInactive:
			d.connections += nlconn.Uint32(data)
		}
	}
	return netip.AddrPortFrom(parseAddr(addr, family), port), d
}

// setTimeouts sets for how long connections are remembered, those that are not 0.
func (k *ipvsConn) setTimeouts(tcp, tcpFin, udp time.Duration) error {
	// What is 0 stays as it is (net/netfilter/ipvs/ip_vs_ctl.c, ip_vs_set_timeout).
	seconds := func(d time.Duration) uint32 { return uint32(d / time.Second) } //nolint:gosec // checked when it was given
	request := newMessage(k.family, setTimeouts, func(b []byte) []byte {
		b = nlconn.AppendUint32(b, attrTCPTimeout, seconds(tcp))
		b = nlconn.AppendUint32(b, attrTCPFin, seconds(tcpFin))
		return nlconn.AppendUint32(b, attrUDPTimeout, seconds(udp))
	})
	answers, err := k.conn.Batch(context.Background(), []netlink.Message{request})
	if err == nil {
		err = answers[0]
	}
	if err != nil {
		return fmt.Errorf("set the timeouts of connections: %w", err)
	}
	return nil
}
