package ipvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"time"

	"fairlead.io/fairlead/dataplane"

	"golang.org/x/sys/unix"
)

// kernel is IPVS of a network namespace, as its generic netlink family offers it
// (linux/ip_vs.h, IPVS_GENL_NAME).
type kernel struct {
	*conn

	family uint16
}

// dialKernel connects to IPVS. The error is unix.ENOENT where the kernel has none:
// to ask makes it load the module, where there is a modprobe.
func dialKernel(netns int) (*kernel, error) {
	c, err := dial(netns, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, err
	}
	k := &kernel{conn: c}
	request := message{
		typ:  unix.GENL_ID_CTRL,
		body: attrs{unix.CTRL_CMD_GETFAMILY, 1, 0, 0}.text(unix.CTRL_ATTR_FAMILY_NAME, "IPVS"),
	}
	c.seq++
	if err = c.send(request.appendTo(nil, c.seq)); err == nil {
		err = c.receive(func(h header, body []byte) (bool, error) {
			if h.typ == unix.NLMSG_ERROR {
				return true, errnoOf(body)
			}
			attrs(body[4:]).each(func(typ uint16, data []byte) {
				if typ == unix.CTRL_ATTR_FAMILY_ID && len(data) == 2 {
					k.family = binary.NativeEndian.Uint16(data)
				}
			})
			return true, nil
		})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ask the kernel for IPVS: %w", err), c.close())
	}
	return k, nil
}

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
	server

	settings                // of newService and setService
	dest     netip.AddrPort // of the commands about destinations
	weight   uint32         // of newDest and setDest
}

// String says what is done, to what: "add the destination 10.0.0.1:80 of 10.96.0.1:80/TCP".
func (r request) String() string {
	if r.dest.IsValid() {
		return fmt.Sprintf("%s %s of %s", r.command, r.dest, r.server)
	}
	return fmt.Sprintf("%s %s", r.command, r.server)
}

// message encodes the request for the family.
func (r request) message(family uint16) message {
	service := identify(r.server)
	if r.command == newService || r.command == setService {
		flags := binary.NativeEndian.AppendUint32(nil, r.flags)
		flags = binary.NativeEndian.AppendUint32(flags, flagMask)
		service = service.text(serviceScheduler, r.scheduler).bytes(serviceFlags, flags).uint32(serviceTimeout, r.timeout)
		// All of the client's address counts for persistence.
		if r.addr.Addr().Is4() {
			service = service.bytes(serviceNetmask, []byte{0xff, 0xff, 0xff, 0xff})
		} else {
			service = service.uint32(serviceNetmask, 128)
		}
	}
	body := attrs{byte(r.command), 1, 0, 0}.bytes(attrService, service)
	if r.dest.IsValid() {
		dest := attrs{}.bytes(destAddr, wide(r.dest.Addr())).bytes(destPort, networkPort(r.dest.Port()))
		if r.command != delDest {
			dest = dest.uint32(destForwarding, 0) // NAT
			dest = dest.uint32(destWeight, r.weight).uint32(destUpperThreshold, 0).uint32(destLowerThreshold, 0)
		}
		body = body.bytes(attrDest, dest.uint16(destFamily, addressFamily(r.dest.Addr())))
	}
	return message{typ: family, body: body}
}

func identify(s server) attrs {
	return attrs{}.uint16(serviceFamily, addressFamily(s.addr.Addr())).uint16(serviceProtocol, uint16(s.protocol)).
		bytes(serviceAddr, wide(s.addr.Addr())).bytes(servicePort, networkPort(s.addr.Port()))
}

func addressFamily(a netip.Addr) uint16 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// wide returns an address as the kernel's union nf_inet_addr: an IPv4 address is in
// the first four of 16 bytes.
func wide(a netip.Addr) []byte {
	b := make([]byte, 16)
	copy(b, a.AsSlice())
	return b
}

func narrow(b []byte, family uint16) netip.Addr {
	if len(b) < 16 {
		return netip.Addr{}
	}
	if family == unix.AF_INET {
		b = b[:4]
	}
	a, _ := netip.AddrFromSlice(b[:min(16, len(b))])
	return a
}

func networkPort(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

// run carries out requests, and returns the kernel's answer to each.
func (k *kernel) run(requests []request) ([]error, error) {
	messages := make([]message, len(requests))
	for i, r := range requests {
		messages[i] = r.message(k.family)
	}
	return k.transact(messages)
}

// servers returns all virtual servers of the namespace by protocol and address, but
// those by firewall mark.
//
// One may be missing, or two, when any are added or deleted meanwhile, in whatever
// namespace: the kernel goes on in its table where as many came before as it has
// listed (net/netfilter/ipvs/ip_vs_ctl.c, ip_vs_genl_dump_services). See complete.
func (k *kernel) servers() (map[server]settings, error) {
	found := map[server]settings{}
	err := k.dump(message{typ: k.family, body: attrs{byte(getService), 1, 0, 0}}, func(body []byte) error {
		eachService(body, func(s server, set settings) { found[s] = set })
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the virtual servers: %w", err)
	}
	return found, nil
}

// complete looks for virtual servers one by one that were not listed although they
// should have been.
func (k *kernel) complete(found map[server]settings, expected iter.Seq[server]) error {
	for s := range expected {
		if _, listed := found[s]; listed {
			continue
		}
		set, there, err := k.server(s)
		if err != nil {
			return err
		}
		if there {
			found[s] = set
		}
	}
	return nil
}

// server returns one virtual server, and whether it is there.
func (k *kernel) server(s server) (set settings, there bool, err error) {
	k.seq++
	m := message{typ: k.family, body: attrs{byte(getService), 1, 0, 0}.bytes(attrService, identify(s))}
	if err = k.send(m.appendTo(nil, k.seq)); err == nil {
		err = k.receive(func(h header, body []byte) (bool, error) {
			switch {
			case h.seq != k.seq:
				return false, nil
			case h.typ == unix.NLMSG_ERROR:
				return true, errnoOf(body)
			}
			eachService(body, func(found server, of settings) { set, there = of, found == s })
			return true, nil
		})
	}
	if err != nil && !isGone(err) {
		return settings{}, false, fmt.Errorf("look for the virtual server %s: %w", s, err)
	}
	return set, there, nil
}

// eachService calls visit with the virtual servers in a message of the family.
func eachService(body []byte, visit func(server, settings)) {
	attrs(body[min(4, len(body)):]).each(func(typ uint16, data []byte) {
		if typ != attrService {
			return
		}
		if s, set, ok := parseService(data); ok {
			visit(s, set)
		}
	})
}

// parseService decodes a virtual server; one by firewall mark is none of ours.
func parseService(b attrs) (server, settings, bool) {
	var (
		s                server
		set              settings
		family, port     uint16
		addr             []byte
		marked, complete bool
	)
	b.each(func(typ uint16, data []byte) {
		switch typ {
		case serviceFamily:
			family = number16(data, binary.NativeEndian)
		case serviceProtocol:
			s.protocol = dataplane.Protocol(number16(data, binary.NativeEndian)) //nolint:gosec // it is one
		case serviceAddr:
			addr = data
		case servicePort:
			port, complete = number16(data, binary.BigEndian), true
		case serviceFwmark:
			marked = true
		case serviceScheduler:
			set.scheduler = text(data)
		case serviceFlags:
			set.flags = number32(data) & flagMask
		case serviceTimeout:
			set.timeout = number32(data)
		}
	})
	if set.flags&flagPersistent == 0 {
		set.timeout = 0
	}
	s.addr = netip.AddrPortFrom(narrow(addr, family), port)
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

// destinations returns those of a virtual server. It returns none if there is no
// such server.
func (k *kernel) destinations(s server) (map[netip.AddrPort]destination, error) {
	found := map[netip.AddrPort]destination{}
	request := message{typ: k.family, body: attrs{byte(getDest), 1, 0, 0}.bytes(attrService, identify(s))}
	err := k.dump(request, func(body []byte) error {
		attrs(body[min(4, len(body)):]).each(func(typ uint16, data []byte) {
			if typ == attrDest {
				addr, d := parseDestination(data, addressFamily(s.addr.Addr()))
				found[addr] = d
			}
		})
		return nil
	})
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("list the destinations of %s: %w", s, err)
	}
	return found, nil
}

func parseDestination(b attrs, family uint16) (netip.AddrPort, destination) {
	var (
		addr []byte
		port uint16
		d    destination
	)
	b.each(func(typ uint16, data []byte) {
		switch typ {
		case destAddr:
			addr = data
		case destPort:
			port = number16(data, binary.BigEndian)
		case destFamily:
			family = number16(data, binary.NativeEndian)
		case destForwarding:
			d.nat = number32(data)&7 == 0 // IP_VS_CONN_F_FWD_MASK
		case destWeight:
			d.weight = number32(data)
		case destActive, destInactive:
			d.connections += number32(data)
		}
	})
	return netip.AddrPortFrom(narrow(addr, family), port), d
}

// setTimeouts sets for how long connections are remembered, those that are not 0.
func (k *kernel) setTimeouts(tcp, tcpFin, udp time.Duration) error {
	// What is 0 stays as it is (net/netfilter/ipvs/ip_vs_ctl.c, ip_vs_set_timeout).
	seconds := func(d time.Duration) uint32 { return uint32(d / time.Second) } //nolint:gosec // checked when it was given
	body := attrs{byte(setTimeouts), 1, 0, 0}.uint32(attrTCPTimeout, seconds(tcp)).
		uint32(attrTCPFin, seconds(tcpFin)).uint32(attrUDPTimeout, seconds(udp))
	answers, err := k.transact([]message{{typ: k.family, body: body}})
	if err == nil {
		err = answers[0]
	}
	if err != nil {
		return fmt.Errorf("set the timeouts of connections: %w", err)
	}
	return nil
}

func number16(b []byte, order binary.ByteOrder) uint16 {
	if len(b) < 2 {
		return 0
	}
	return order.Uint16(b)
}

func number32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}
