package nettest

import (
	"encoding/binary"
	"fmt"
	"iter"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// SpoofUDP sends a one-byte UDP datagram to an address from each of the source addresses. The
// sources must have the same family as to, and need not be addresses of the host.
func (h *Host) SpoofUDP(to netip.AddrPort, sources iter.Seq[netip.Addr]) error {
	err := h.Do(func() error {
		fd, err := unix.Socket(socketDomain(to.Addr()), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("create socket: %w", err)
		}
		defer unix.Close(fd) //nolint:errcheck // nothing is buffered
		address := socketAddress(netip.AddrPortFrom(to.Addr(), 0))
		for source := range sources {
			if err := unix.Sendto(fd, spoofedDatagram(source, to), 0, address); err != nil {
				return fmt.Errorf("send from %s: %w", source, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("spoof UDP on %s: %w", h.Name, err)
	}
	return nil
}

// spoofedDatagram returns a one-byte UDP datagram with its IP header.
func spoofedDatagram(source netip.Addr, to netip.AddrPort) []byte {
	const sourcePort = 4321
	udp := binary.BigEndian.AppendUint16(nil, sourcePort)
	udp = binary.BigEndian.AppendUint16(udp, to.Port())
	udp = append(udp, 0, 9, 0, 0, 0)
	if source.Is4() { // no UDP checksum; the kernel fills in the IP header checksum
		b := []byte{0x45, 0, 0, 29, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
		return slices.Concat(b, source.AsSlice(), to.Addr().AsSlice(), udp)
	}
	b := slices.Concat([]byte{0x60, 0, 0, 0, 0, 9, unix.IPPROTO_UDP, 64}, source.AsSlice(), to.Addr().AsSlice())
	sum := uint32(9 + unix.IPPROTO_UDP)
	for _, part := range [][]byte{b[8:], udp[:8]} { // the data byte is 0
		for j := 0; j < len(part); j += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[j:]))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(udp[6:], ^uint16(sum)) //nolint:gosec // folded
	return append(b, udp...)
}
