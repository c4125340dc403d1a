package ipvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"fairlead.io/fairlead/dataplane"

	"golang.org/x/sys/unix"
)

// optionReader reads IPv4 virtual servers through socket options of an IP socket (linux/ip_vs.h,
// IP_VS_SO_GET_*), which IPVS had before its netlink family. It must not be used concurrently.
//
// One system call returns all virtual servers, or all destinations of a virtual server. The kernel
// holds its lock meanwhile, so the result is complete. A dump over netlink takes three system
// calls for each virtual server. The options know neither IPv6 virtual servers nor destinations
// of another family than their virtual server.
type optionReader struct {
	fd     int
	buffer []byte // for destinations
}

// Socket options (linux/ip_vs.h).
const (
	optionBase            = 64 + 1024 + 64 // IP_VS_BASE_CTL
	optionGetInfo         = optionBase + 1
	optionGetServices     = optionBase + 2
	optionGetDestinations = optionBase + 4
)

// Sizes of structs (linux/ip_vs.h) on 64-bit processors.
const (
	infoSize               = 12  // struct ip_vs_getinfo
	servicesHeaderSize     = 8   // struct ip_vs_get_services without its table
	serviceEntrySize       = 104 // struct ip_vs_service_entry
	destinationsHeaderSize = 24  // struct ip_vs_get_dests without its table
	destinationEntrySize   = 96  // struct ip_vs_dest_entry
)

func openOptions(netns int) (*optionReader, error) {
	o := &optionReader{}
	err := inNamespace(netns, func() (err error) {
		o.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open socket for IPVS: %w", err)
	}
	return o, nil
}

func (o *optionReader) close() error { return unix.Close(o.fd) }

// isUnsupported reports whether the kernel has no socket options of IPVS, or not at the moment
// because the module is reloaded.
func isUnsupported(err error) bool {
	return errors.Is(err, unix.ENOPROTOOPT) || errors.Is(err, unix.EOPNOTSUPP)
}

// countServers returns the number of IPv4 virtual servers, including the ones identified by a
// firewall mark.
func (o *optionReader) countServers() (int, error) {
	var info [infoSize]byte
	if err := o.get(optionGetInfo, info[:]); err != nil {
		return 0, fmt.Errorf("count virtual servers: %w", err)
	}
	return int(binary.NativeEndian.Uint32(info[8:])), nil
}

// readServers calls visit for each IPv4 virtual server that is identified by protocol and address.
// It returns the number of IPv4 virtual servers, including the ones identified by a firewall mark.
func (o *optionReader) readServers(visit func(serverKey, serverState)) (count int, err error) {
	n, err := o.countServers()
	if err != nil {
		return 0, err
	}
	for n++; ; n *= 2 {
		// The kernel does not report how many entries it has written, so the buffer must be zero.
		buffer := make([]byte, servicesHeaderSize+n*serviceEntrySize)
		binary.NativeEndian.PutUint32(buffer, uint32(n)) //nolint:gosec // fits
		if err := o.get(optionGetServices, buffer); err != nil {
			return 0, fmt.Errorf("read virtual servers: %w", err)
		}
		entries := buffer[servicesHeaderSize:]
		if hasEntry(entries[len(entries)-serviceEntrySize:]) {
			continue // some may be missing
		}
		for ; hasEntry(entries); entries = entries[serviceEntrySize:] {
			count++
			if s, state, ok := parseServiceEntry(entries); ok {
				visit(s, state)
			}
		}
		return count, nil
	}
}

// hasEntry reports whether the kernel has written a struct ip_vs_service_entry. Its protocol is not
// 0, unless the virtual server is identified by a firewall mark.
func hasEntry(b []byte) bool {
	const protocol, fwmark = 0, 12
	return binary.NativeEndian.Uint16(b[protocol:]) != 0 || binary.NativeEndian.Uint32(b[fwmark:]) != 0
}

// parseServiceEntry decodes a struct ip_vs_service_entry. It reports false for a virtual server
// identified by a firewall mark.
func parseServiceEntry(b []byte) (serverKey, serverState, bool) {
	const protocol, addr, port, fwmark, scheduler, flags, timeout, destinations = 0, 4, 8, 12, 16, 32, 36, 44
	s := serverKey{
		dataplane.Protocol(binary.NativeEndian.Uint16(b[protocol:])), //nolint:gosec // the kernel has 8 bits
		netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[addr:])), binary.BigEndian.Uint16(b[port:])),
	}
	state := serverState{settings: settings{flags: binary.NativeEndian.Uint32(b[flags:]) & flagMask}}
	switch name := b[scheduler:flags]; {
	case name[0] == 'r' && name[1] == 'r' && name[2] == 0:
		state.scheduler = DefaultScheduler // without an allocation
	default:
		state.scheduler = unix.ByteSliceToString(name)
	}
	if state.flags&flagPersistent != 0 {
		state.timeout = binary.NativeEndian.Uint32(b[timeout:])
	}
	state.destinations = int(binary.NativeEndian.Uint32(b[destinations:]))
	return s, state, binary.NativeEndian.Uint32(b[fwmark:]) == 0
}

// readDestinations appends the IPv4 destinations of an IPv4 virtual server to list, and none if the
// virtual server does not exist. expected is their likely number, or unknownNumber.
func (o *optionReader) readDestinations(s serverKey, expected int, list []addressedDestination) ([]addressedDestination, error) {
	const likely = 31
	if expected == unknownNumber {
		expected = likely
	}
	for n := expected + 1; ; n *= 2 {
		size := destinationsHeaderSize + n*destinationEntrySize
		if cap(o.buffer) < size {
			o.buffer = make([]byte, size)
		}
		// The kernel does not report how many entries it has written, so the buffer must be zero.
		b := o.buffer[:size]
		clear(b)
		const protocol, addr, port, number = 0, 4, 8, 16
		v4 := s.addr.Addr().As4()
		binary.NativeEndian.PutUint16(b[protocol:], uint16(s.protocol))
		copy(b[addr:], v4[:])
		binary.BigEndian.PutUint16(b[port:], s.addr.Port())
		binary.NativeEndian.PutUint32(b[number:], uint32(n)) //nolint:gosec // fits
		err := o.get(optionGetDestinations, b)
		if isNotFound(err) {
			return list, nil
		}
		if err != nil {
			return list, fmt.Errorf("read destinations of %s: %w", s, err)
		}
		entries := b[destinationsHeaderSize:]
		if at, _ := parseDestinationEntry(entries[len(entries)-destinationEntrySize:]); at.Addr() != netip.IPv4Unspecified() {
			continue // some may be missing
		}
		for ; ; entries = entries[destinationEntrySize:] {
			at, d := parseDestinationEntry(entries)
			if at.Addr() == netip.IPv4Unspecified() { // never the address of a destination (ip_vs_new_dest)
				return list, nil
			}
			list = append(list, addressedDestination{at, d})
		}
	}
}

// parseDestinationEntry decodes a struct ip_vs_dest_entry.
func parseDestinationEntry(b []byte) (netip.AddrPort, destination) {
	const addr, port, connFlags, weight, active, inactive = 0, 4, 8, 12, 24, 28
	d := destination{
		weight: binary.NativeEndian.Uint32(b[weight:]),
		active: binary.NativeEndian.Uint32(b[active:]),
		nat:    isNAT(binary.NativeEndian.Uint32(b[connFlags:])),
	}
	d.connections = d.active + binary.NativeEndian.Uint32(b[inactive:])
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[addr:])), binary.BigEndian.Uint16(b[port:])), d
}

// get calls getsockopt(2) with an argument that the kernel reads and fills.
func (o *optionReader) get(option int, value []byte) error {
	length := uint32(len(value)) //nolint:gosec // fits
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(o.fd), unix.IPPROTO_IP, uintptr(option),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(unsafe.Pointer(&length)), 0) //nolint:gosec // arguments of a system call
	if errno != 0 {
		return errno
	}
	return nil
}
