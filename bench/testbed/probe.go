package testbed

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Probe finds out by packets when something happens to a Service. It sends first
// packets of connections (TCP SYN), each from an address and port that was not used
// before, so that each is translated anew and connection tracking has nothing to
// say, and sees which of them arrive at Watched endpoints.
//
// It sends as fast as it can at first, some microseconds apart, and the later the
// more rarely: what has lasted for a time t is found out t/256 late at most, for
// each packet that it takes, and the probe takes little of the machine from slow
// systems.
//
// A Probe is for one goroutine. The caller closes it.
type Probe struct {
	sendFD, receiveFD int // file descriptors
	packet            [ipHeader + tcpHeader]byte
	sourcesUsed       uint32 // sources so far
	lastSeq           uint32 // of the last packet
	buf               [256]byte
	throttleUntil     <-chan struct{}
}

const (
	ipHeader  = 20
	tcpHeader = 20
)

// NewProbe returns a Probe of the testbed's client and endpoints.
func (r *Testbed) NewProbe() (*Probe, error) {
	p := &Probe{sendFD: -1, receiveFD: -1}
	err := r.Client.Do(func() (err error) {
		p.sendFD, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return os.NewSyscallError("socket", err)
	})
	if err == nil {
		err = r.Endpoints.Do(func() (err error) {
			p.receiveFD, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
			return os.NewSyscallError("socket", err)
		})
	}
	if err == nil {
		const buffer = 4 << 20 // for all that arrives while the probe does not run
		err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(p.receiveFD, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the probe's sockets: %w", err), p.Close())
	}
	return p, nil
}

// Close closes the Probe's sockets.
func (p *Probe) Close() error {
	var errs []error
	for _, fd := range []*int{&p.sendFD, &p.receiveFD} {
		if *fd >= 0 {
			errs = append(errs, os.NewSyscallError("close", unix.Close(*fd)))
			*fd = -1
		}
	}
	return errors.Join(errs...)
}

// ThrottleUntil has the Probe keep packets apart by 100 µs until the channel is closed, for an
// event that takes others a processor to bring about. It holds for the next time that
// packets are sent only.
func (p *Probe) ThrottleUntil(until <-chan struct{}) { p.throttleUntil = until }

// ErrNotObserved is wrapped by the error of a Probe that has waited for too long.
var ErrNotObserved = errors.New("the packets do not show it in time")

// defaultTimeout is how long a Probe waits when its context has no deadline.
const defaultTimeout = time.Minute

// Observation is what a Probe has seen.
type Observation struct {
	// After is the time from the event until packets showed it.
	After time.Duration
	// Packets is how many were sent, and Interval the time between the last two.
	Packets  int
	Interval time.Duration
}

// ToEndpoint returns a function for one address, as the methods of [Probe] want it.
func ToEndpoint(addr netip.Addr) func(netip.Addr) bool {
	return func(a netip.Addr) bool { return a == addr }
}

// ToAnyEndpoint is true of every address.
func ToAnyEndpoint(netip.Addr) bool { return true }

// FirstArrival sends packets to a Service until the first arrives at an endpoint
// that at says yes to. event is the time from which the Sighting counts: what
// happens then must be under way, as FirstArrival blocks. Not to see it in a minute,
// or until the context's deadline, is an error that wraps [ErrNotObserved].
func (p *Probe) FirstArrival(ctx context.Context, event time.Time, service netip.AddrPort, at func(netip.Addr) bool) (Observation, error) {
	arrived := false
	s, err := p.sendUntil(ctx, event, service, func(_ uint32, addr netip.Addr) { arrived = arrived || at(addr) },
		func([]time.Time) bool { return arrived })
	if err != nil {
		return Observation{}, fmt.Errorf("wait for a packet to %s to arrive: %w", service, err)
	}
	s.After = time.Since(event)
	return s, nil
}

// LastArrival sends packets to a Service until quiet of them in a row have not
// arrived at an endpoint that at says yes to. The Sighting's time is when the first of
// these was sent. It is otherwise as FirstArrival; quiet must be many times the
// number of endpoints that one is chosen from.
func (p *Probe) LastArrival(
	ctx context.Context, event time.Time, service netip.AddrPort, at func(netip.Addr) bool, quiet int,
) (Observation, error) {
	first := p.lastSeq + 1
	last := p.lastSeq // the last that has arrived
	var after time.Time
	note := func(number uint32, addr netip.Addr) {
		if at(addr) && number >= first {
			last = max(last, number)
		}
	}
	var late error
	s, err := p.sendUntil(ctx, event, service, note, func(sent []time.Time) bool {
		missing := func() bool { return int(p.lastSeq-last) >= quiet }
		if !missing() {
			return false
		}
		if late = p.drain(note); late == nil && !missing() {
			return false
		}
		after = sent[last+1-first]
		return true
	})
	if err = errors.Join(err, late); err != nil {
		return Observation{}, fmt.Errorf("wait until packets to %s no longer arrive: %w", service, err)
	}
	s.After = after.Sub(event)
	return s, nil
}

// backoffDivisor is the part of the time passed that is waited between packets.
const backoffDivisor = 256

// sendUntil sends packets, and calls arrived for each that does, until done says that it
// is. done is given when packets were sent.
func (p *Probe) sendUntil(
	ctx context.Context, event time.Time, service netip.AddrPort, arrived func(number uint32, addr netip.Addr), done func([]time.Time) bool,
) (Observation, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultTimeout)
		defer cancel()
	}
	defer p.ThrottleUntil(nil)
	runtime.LockOSThread() // what the processor has of it stays near
	defer runtime.UnlockOSThread()
	if err := p.discardReceived(); err != nil {
		return Observation{}, err
	}
	var sent []time.Time
	for {
		sent = append(sent, time.Now())
		if err := p.send(service); err != nil {
			return Observation{}, err
		}
		// Between the namespaces packets go at once, within the system call.
		if err := p.receive(arrived); err != nil {
			return Observation{}, err
		}
		if done(sent) {
			s := Observation{Packets: len(sent)}
			if n := len(sent); n > 1 {
				s.Interval = sent[n-1].Sub(sent[n-2])
			}
			return s, nil
		}
		if len(sent)%64 == 0 || time.Since(event) > time.Millisecond {
			if err := ctx.Err(); err != nil {
				if errors.Is(err, context.DeadlineExceeded) {
					err = fmt.Errorf("%w: %d packets in %s", ErrNotObserved, len(sent), time.Since(event))
				}
				return Observation{}, err
			}
		}
		p.waitForNext(sent[len(sent)-1], event)
	}
}

// waitForNext waits until it is time for the next packet.
func (p *Probe) waitForNext(last, event time.Time) {
	next := last.Add(last.Sub(event) / backoffDivisor)
	if p.throttleUntil != nil {
		select {
		case <-p.throttleUntil:
			p.throttleUntil = nil
		default:
			const gentle = 100 * time.Microsecond
			next = last.Add(max(gentle, next.Sub(last)))
		}
	}
	const shortest = 50 * time.Microsecond // to sleep
	for {
		left := time.Until(next)
		switch {
		case left <= 0:
			return
		case left > shortest:
			ts := unix.NsecToTimespec(int64(left))
			_ = unix.Nanosleep(&ts, nil) // a signal may end it early
		}
	}
}

// send sends the next packet.
func (p *Probe) send(service netip.AddrPort) error {
	p.lastSeq++
	p.sourcesUsed++
	const ports = 60000 // from 1024
	source := addrPlus(clientCIDR.Addr(), 1+p.sourcesUsed/ports)
	b := p.packet[:]
	clear(b)
	ip, tcp := b[:ipHeader], b[ipHeader:]
	ip[0], ip[8], ip[9] = 4<<4|ipHeader/4, 64, unix.IPPROTO_TCP
	from, to := source.As4(), service.Addr().As4()
	copy(ip[12:], from[:])
	copy(ip[16:], to[:])
	binary.BigEndian.PutUint16(ip[2:], uint16(len(b)))
	binary.BigEndian.PutUint16(tcp, uint16(1024+p.sourcesUsed%ports))
	binary.BigEndian.PutUint16(tcp[2:], service.Port())
	binary.BigEndian.PutUint32(tcp[4:], p.lastSeq)
	const syn, window = 2, 1024
	tcp[12], tcp[13] = tcpHeader/4<<4, syn
	binary.BigEndian.PutUint16(tcp[14:], window)
	binary.BigEndian.PutUint16(tcp[16:], tcpChecksum(ip[12:20], tcp))
	err := unix.Sendto(p.sendFD, b, 0, &unix.SockaddrInet4{Addr: to})
	// ENOBUFS and EPERM are packets that the client's own side has dropped.
	if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("send a packet to %s: %w", service, os.NewSyscallError("sendto", err))
	}
	return nil
}

// tcpChecksum is that of a segment of TCP between the addresses.
func tcpChecksum(addrs, segment []byte) uint16 {
	sum := uint32(unix.IPPROTO_TCP + len(segment)) //nolint:gosec // a small number
	for _, b := range [][]byte{addrs, segment} {
		for ; len(b) > 1; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum) //nolint:gosec // 16 bits are left
}

// receive calls arrived for each packet of the probe that has arrived.
func (p *Probe) receive(arrived func(number uint32, addr netip.Addr)) error {
	for {
		n, _, err := unix.Recvfrom(p.receiveFD, p.buf[:], 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("see what arrives: %w", os.NewSyscallError("recvfrom", err))
		}
		b := p.buf[:n]
		if len(b) < ipHeader+tcpHeader {
			continue
		}
		if from := netip.AddrFrom4([4]byte(b[12:16])); !clientCIDR.Contains(from) {
			continue // another connection's
		}
		tcp := b[int(b[0]&0xf)*4:]
		arrived(binary.BigEndian.Uint32(tcp[4:]), netip.AddrFrom4([4]byte(b[16:20])))
	}
}

// drain is receive until what was sent has had the time to arrive: on a busy machine the kernel
// puts off what it does at once otherwise.
func (p *Probe) drain(arrived func(number uint32, addr netip.Addr)) error {
	const grace, period = 3 * time.Millisecond, 200 * time.Microsecond
	for begin := time.Now(); time.Since(begin) < grace; time.Sleep(period) {
		if err := p.receive(arrived); err != nil {
			return err
		}
	}
	return p.receive(arrived)
}

// discardReceived drops what has arrived so far.
func (p *Probe) discardReceived() error { return p.receive(func(uint32, netip.Addr) {}) }

// addrPlus returns the address n after another.
func addrPlus(addr netip.Addr, n uint32) netip.Addr {
	b := addr.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+n)
	return netip.AddrFrom4(b)
}
