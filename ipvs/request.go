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

// ipvsConn is a connection to IPVS of one network namespace, through its generic netlink
// family (linux/ip_vs.h, IPVS_GENL_NAME) and its socket options. It must not be used concurrently.
type ipvsConn struct {
	conn    *nlconn.Conn
	family  netlink.HeaderType
	options *optionReader
	// destinations is the result of the last readDestinations.
	destinations []addressedDestination
}

// dialIPVS connects to IPVS. The error is unix.ENOENT if the kernel has no IPVS. The request
// makes the kernel load the module if the host has modprobe.
func dialIPVS(netns int) (*ipvsConn, error) {
	conn, err := nlconn.Dial(unix.NETLINK_GENERIC, netns)
	if err != nil {
		return nil, err
	}
	options, err := openOptions(netns)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	c := &ipvsConn{conn: conn, options: options}
	if err := c.resolveFamily(); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

func (c *ipvsConn) close() error { return errors.Join(c.options.close(), c.conn.Close()) }

// resolveFamily reads the number of the family, which the kernel assigns when it loads the
// module.
func (c *ipvsConn) resolveFamily() error {
	request := newMessage(unix.GENL_ID_CTRL, command(unix.CTRL_CMD_GETFAMILY), func(b []byte) []byte {
		return nlconn.AppendString(b, unix.CTRL_ATTR_FAMILY_NAME, "IPVS")
	})
	body, err := c.conn.Get(context.Background(), request)
	if err != nil {
		return fmt.Errorf("resolve netlink family IPVS: %w", err)
	}
	number, _ := nlconn.Attribute(body[genericHeaderLen:], unix.CTRL_ATTR_FAMILY_ID)
	c.family = netlink.HeaderType(nlconn.Uint16(number, binary.NativeEndian))
	return nil
}

// genericHeaderLen is the size of a struct genlmsghdr (linux/genetlink.h).
const genericHeaderLen = 4

// newMessage encodes a command of a generic netlink family: a header with version 1, and
// attributes.
func newMessage(family netlink.HeaderType, c command, attributes func([]byte) []byte) netlink.Message {
	b := append(make([]byte, 0, messageCapacity), byte(c), 1, 0, 0)
	return netlink.Message{Header: netlink.Header{Type: family}, Data: attributes(b)}
}

// messageCapacity is enough for the largest request.
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

// Attributes of commands, services and destinations (linux/ip_vs.h).
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

// request changes one virtual server or destination.
type request struct {
	command
	serverKey

	settings                // for newService and setService
	dest     netip.AddrPort // for commands about destinations
	weight   uint32         // for newDest and setDest
}

// String describes the request: "add the destination 10.0.0.1:80 of 10.96.0.1:80/TCP".
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
	// Persistence uses the client's full address.
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

// appendKey appends the attributes that identify the virtual server.
func (s serverKey) appendKey(b []byte) []byte {
	b = nlconn.AppendUint16(b, serviceFamily, addressFamily(s.addr.Addr()))
	b = nlconn.AppendUint16(b, serviceProtocol, uint16(s.protocol))
	return appendAddrPort(b, serviceAddr, servicePort, s.addr)
}

// appendAttribute appends the service attribute of a request for one virtual server.
func (s serverKey) appendAttribute(b []byte) []byte {
	return nlconn.AppendNested(b, attrService, s.appendKey)
}

// appendAddrPort appends an address as the kernel's union nf_inet_addr, whose first 4 of 16
// bytes hold an IPv4 address, and a port in network byte order.
func appendAddrPort(b []byte, addrType, portType uint16, a netip.AddrPort) []byte {
	var addr [16]byte
	if a.Addr().Is4() {
		v4 := a.Addr().As4()
		copy(addr[:], v4[:])
	} else {
		addr = a.Addr().As16()
	}
	b = nlconn.AppendBytes(b, addrType, addr[:])
	return nlconn.AppendBytes(b, portType, []byte{byte(a.Port() >> 8), byte(a.Port())}) //nolint:gosec // the two bytes
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

// run executes requests, many in one system call, and returns the kernel's answer to each.
func (c *ipvsConn) run(requests []request) ([]error, error) {
	messages := make([]netlink.Message, len(requests))
	for i, r := range requests {
		messages[i] = r.message(c.family)
	}
	return c.conn.Batch(context.Background(), messages)
}

// countServers returns the number of IPv4 virtual servers, including the ones identified by a
// firewall mark.
func (c *ipvsConn) countServers() (int, error) { return c.options.countServers() }

// serverState is the state of a virtual server in the kernel.
type serverState struct {
	settings

	// destinations is the number of destinations, or unknownNumber.
	destinations int
}

const unknownNumber = -1

// readServers calls visit for each virtual server of a family that is identified by protocol and
// address. If complete is false, it may have missed some or visited some twice; see dumpServers.
// count is the number of virtual servers of the family, including the ones identified by a firewall
// mark, or unknownNumber.
func (c *ipvsConn) readServers(f dataplane.Family, visit func(serverKey, serverState)) (complete bool, count int, err error) {
	if f == dataplane.IPv4 {
		count, err := c.options.readServers(visit)
		if err == nil { // the module may be another one than at the last request, which a dump would show
			err = c.resolveFamily()
		}
		if !isUnsupported(err) {
			return true, count, err
		}
	}
	return false, unknownNumber, c.forEachServer(func(s serverKey, set settings, _ []byte) {
		if s.family() == f {
			visit(s, serverState{set, unknownNumber})
		}
	})
}

// readDestinations returns the destinations of a virtual server, or none if it does not exist.
// expected is their likely number, or unknownNumber. The result is valid until the next call.
func (c *ipvsConn) readDestinations(s serverKey, expected int) (_ []addressedDestination, err error) {
	c.destinations = c.destinations[:0]
	if s.addr.Addr().Is4() {
		c.destinations, err = c.options.readDestinations(s, expected, c.destinations)
		// If there are fewer, the missing ones may be IPv6 destinations.
		if err == nil && len(c.destinations) >= expected || err != nil && !isUnsupported(err) {
			return c.destinations, err
		}
		c.destinations = c.destinations[:0]
	}
	err = c.forEachDestination(s, func(data []byte) {
		addr, d := parseDestination(data, addressFamily(s.addr.Addr()))
		c.destinations = append(c.destinations, addressedDestination{addr, d})
	})
	return c.destinations, err
}

// dumpServers returns all virtual servers of the namespace that are identified by protocol and
// address. It ignores virtual servers identified by a firewall mark.
//
// A dump may miss one or two virtual servers while others are added or deleted, in any
// namespace. The kernel continues a dump at the position given by the number of virtual
// servers already dumped (net/netfilter/ipvs/ip_vs_ctl.c, ip_vs_genl_dump_services). See
// addMissing.
func (c *ipvsConn) dumpServers() (map[serverKey]settings, error) {
	servers := map[serverKey]settings{}
	if err := c.forEachServer(func(s serverKey, set settings, _ []byte) { servers[s] = set }); err != nil {
		return nil, err
	}
	return servers, nil
}

// forEachServer calls visit for each virtual server in a dump; see dumpServers. It can call
// visit twice for the same virtual server.
func (c *ipvsConn) forEachServer(visit func(s serverKey, set settings, attributes []byte)) error {
	dump := func() error {
		request := newMessage(c.family, getService, func(b []byte) []byte { return b })
		_, err := c.conn.Dump(context.Background(), request, func(body []byte) error {
			forEachService(body, visit)
			return nil
		})
		return err
	}
	err := dump()
	if errors.Is(err, unix.ENOENT) { // the module was reloaded
		if err = c.resolveFamily(); err == nil {
			err = dump()
		}
	}
	if err != nil {
		return fmt.Errorf("dump virtual servers: %w", err)
	}
	return nil
}

// addMissing reads expected virtual servers that are missing from the dump, one request each.
func (c *ipvsConn) addMissing(servers map[serverKey]settings, expected iter.Seq[serverKey]) error {
	for s := range expected {
		if _, ok := servers[s]; ok {
			continue
		}
		set, exists, err := c.getServer(s)
		if err != nil {
			return err
		}
		if exists {
			servers[s] = set
		}
	}
	return nil
}

// getServer reads one virtual server and reports whether it exists.
func (c *ipvsConn) getServer(s serverKey) (set settings, exists bool, err error) {
	body, err := c.conn.Get(context.Background(), newMessage(c.family, getService, s.appendAttribute))
	forEachService(body, func(key serverKey, st settings, _ []byte) { set, exists = st, key == s })
	if err != nil && !isNotFound(err) {
		return settings{}, false, fmt.Errorf("get virtual server %s: %w", s, err)
	}
	return set, exists, nil
}

// forEachService calls visit for the virtual servers in a message of the family.
func forEachService(body []byte, visit func(s serverKey, set settings, attributes []byte)) {
	for typ, data := range nlconn.Attributes(body[min(genericHeaderLen, len(body)):]) {
		if typ != attrService {
			continue
		}
		if s, set, ok := parseService(data); ok {
			visit(s, set, data)
		}
	}
}

// parseService decodes a virtual server. It reports false for one identified by a firewall
// mark.
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
			s.protocol = dataplane.Protocol(nlconn.Uint16(data, binary.NativeEndian)) //nolint:gosec // the kernel sends 8 bits
		case serviceAddr:
			addr = data
		case servicePort:
			port, complete = nlconn.Uint16(data, binary.BigEndian), true
		case serviceFwmark:
			marked = true
		case serviceScheduler:
			set.scheduler = unix.ByteSliceToString(data)
		case serviceFlags:
			set.flags = nlconn.Uint32(data[:min(4, len(data))]) & flagMask // struct ip_vs_flags: the flags, then a mask
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

// destination is the state of a destination in the kernel.
type destination struct {
	weight uint32
	// connections counts the active connections and the inactive ones, which the kernel keeps
	// for a while.
	connections uint32
	// active counts the active ones.
	active uint32
	// nat is true if the forwarding method is NAT, as for all managed destinations.
	nat bool
}

// addressedDestination is a destination with its address.
type addressedDestination struct {
	addr netip.AddrPort
	destination
}

// dumpDestinations returns the destinations of a virtual server, or none if it does not exist.
func (c *ipvsConn) dumpDestinations(s serverKey) (map[netip.AddrPort]destination, error) {
	all, err := c.readDestinations(s, unknownNumber)
	if err != nil {
		return nil, err
	}
	destinations := make(map[netip.AddrPort]destination, len(all))
	for _, d := range all {
		destinations[d.addr] = d.destination
	}
	return destinations, nil
}

// forEachDestination calls visit with the attributes of each destination of a virtual server.
func (c *ipvsConn) forEachDestination(s serverKey, visit func(attributes []byte)) error {
	_, err := c.conn.Dump(context.Background(), newMessage(c.family, getDest, s.appendAttribute), func(body []byte) error {
		for typ, data := range nlconn.Attributes(body[min(genericHeaderLen, len(body)):]) {
			if typ == attrDest {
				visit(data)
			}
		}
		return nil
	})
	if err != nil && !isNotFound(err) {
		return fmt.Errorf("dump destinations of %s: %w", s, err)
	}
	return nil
}

// isNAT reports whether the flags of a destination select NAT as the forwarding method.
func isNAT(connFlags uint32) bool {
	const forwardingMask = 7 // IP_VS_CONN_F_FWD_MASK
	return connFlags&forwardingMask == 0
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
			d.nat = isNAT(nlconn.Uint32(data))
		case destWeight:
			d.weight = nlconn.Uint32(data)
		case destActive:
			d.active = nlconn.Uint32(data)
			d.connections += d.active
		case destInactive:
			d.connections += nlconn.Uint32(data)
		}
	}
	return netip.AddrPortFrom(parseAddr(addr, family), port), d
}

// setTimeouts sets the connection timeouts. It keeps the kernel's value of a timeout that is
// 0.
func (c *ipvsConn) setTimeouts(tcp, tcpFin, udp time.Duration) error {
	// The kernel ignores a timeout of 0 (net/netfilter/ipvs/ip_vs_ctl.c, ip_vs_set_timeout).
	seconds := func(d time.Duration) uint32 { return uint32(d / time.Second) } //nolint:gosec // the flag is validated
	request := newMessage(c.family, setTimeouts, func(b []byte) []byte {
		b = nlconn.AppendUint32(b, attrTCPTimeout, seconds(tcp))
		b = nlconn.AppendUint32(b, attrTCPFin, seconds(tcpFin))
		return nlconn.AppendUint32(b, attrUDPTimeout, seconds(udp))
	})
	answers, err := c.conn.Batch(context.Background(), []netlink.Message{request})
	if err == nil {
		err = answers[0]
	}
	if err != nil {
		return fmt.Errorf("set connection timeouts: %w", err)
	}
	return nil
}
