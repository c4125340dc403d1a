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

// Probe measures with packets when a change of a Service takes effect. It sends initial packets of
// connections (TCP SYN), each from an unused source address and port, so that the node translates
// each packet as a new connection and connection tracking has no entry for it. It observes which
// packets arrive at watched endpoints.
//
// At first the probe sends as fast as it can, a few microseconds apart. It slows down as time
// passes: it observes an effect after the time t at most t/256 late for each packet that it needs,
// and takes little processor time from slow systems.
//
// A Probe must not be used concurrently. The caller must close it.
type Probe struct {
	// MinInterval is the minimum time between two packets. With 0, the probe sends as fast as it can
	// and occupies a processor.
	MinInterval time.Duration

	sendFD, receiveFD int // file descriptors
	packet            [ipHeader + tcpHeader]byte
	sourcesUsed       uint32 // number of sources used so far
	lastSeq           uint32 // sequence number of the last packet
	buf               [256]byte
	throttleUntil     <-chan struct{}
}

const (
	ipHeader  = 20
	tcpHeader = 20
)

// NewProbe returns a Probe that sends from the client and receives at the endpoints.
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
		const buffer = 4 << 20 // bytes; holds the packets that arrive while the probe is not scheduled
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

// ThrottleUntil makes the next measurement send packets at least 100 µs apart until the channel is
// closed, so that other programs get the processor time to cause the event. It affects one
// measurement only.
func (p *Probe) ThrottleUntil(done <-chan struct{}) { p.throttleUntil = done }

// ErrNotObserved is wrapped by the error of a Probe that has waited too long.
var ErrNotObserved = errors.New("packets did not show the change in time")

// defaultTimeout is the time that a Probe waits if its context has no deadline.
const defaultTimeout = time.Minute

// Observation is the result of a measurement of a Probe.
type Observation struct {
	// After is the time from the event until packets showed its effect.
	After time.Duration
	// Packets is the number of packets sent, and Interval the time between the last two of them.
	Packets  int
	Interval time.Duration
}

// ToEndpoint returns a filter for packets that arrive at addr, for the methods of [Probe].
func ToEndpoint(addr netip.Addr) func(netip.Addr) bool {
	return func(a netip.Addr) bool { return a == addr }
}

// ToAnyEndpoint is a filter for packets that arrive at any watched endpoint.
func ToAnyEndpoint(netip.Addr) bool { return true }

// FirstArrival sends packets to a Service until a packet arrives at an endpoint for which at
// returns true. Observation.After counts from event. FirstArrival blocks, so the caller must start
// the change before the call or concurrently. If no packet arrives within a minute, or by the
// context's deadline, FirstArrival returns an error that wraps [ErrNotObserved].
func (p *Probe) FirstArrival(ctx context.Context, event time.Time, service netip.AddrPort, at func(netip.Addr) bool) (Observation, error) {
	arrived := false
	s, err := p.sendUntil(ctx, event, service, func(_ uint32, addr netip.Addr) { arrived = arrived || at(addr) },
		func([]time.Time) bool { return arrived })
	if err != nil {
		return Observation{}, fmt.Errorf("wait until a packet to %s arrives: %w", service, err)
	}
	s.After = time.Since(event)
	return s, nil
}

// LastArrival sends packets to a Service until misses consecutive packets have not arrived at an
// endpoint for which at returns true. Observation.After ends when the first of these packets was
// sent. misses must be many times the number of endpoints that the Service selects from. Timeouts
// are the same as in FirstArrival.
func (p *Probe) LastArrival(
	ctx context.Context, event time.Time, service netip.AddrPort, at func(netip.Addr) bool, misses int,
) (Observation, error) {
	first := p.lastSeq + 1
	last := p.lastSeq // the last sequence number that has arrived
	var after time.Time
	record := func(seq uint32, addr netip.Addr) {
		if at(addr) && seq >= first {
			last = max(last, seq)
		}
	}
	var drainErr error
	s, err := p.sendUntil(ctx, event, service, record, func(sent []time.Time) bool {
		gone := func() bool { return int(p.lastSeq-last) >= misses }
		if !gone() {
			return false
		}
		if drainErr = p.drain(record); drainErr == nil && !gone() {
			return false
		}
		after = sent[last+1-first]
		return true
	})
	if err = errors.Join(err, drainErr); err != nil {
		return Observation{}, fmt.Errorf("wait until packets to %s no longer arrive: %w", service, err)
	}
	s.After = after.Sub(event)
	return s, nil
}

// backoffDivisor divides the time since the event to get the time between packets.
const backoffDivisor = 256

// sendUntil sends packets and calls arrived for each packet that arrives, until done returns true.
// It passes to done the times at which packets were sent.
func (p *Probe) sendUntil(
	ctx context.Context, event time.Time, service netip.AddrPort, arrived func(seq uint32, addr netip.Addr), done func([]time.Time) bool,
) (Observation, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultTimeout)
		defer cancel()
	}
	defer p.ThrottleUntil(nil)
	runtime.LockOSThread() // keeps the processor's caches warm
	defer runtime.UnlockOSThread()
	defer sleepExactly()()
	if err := p.discardReceived(); err != nil {
		return Observation{}, err
	}
	var sent []time.Time
	for {
		sent = append(sent, time.Now())
		if err := p.send(service); err != nil {
			return Observation{}, err
		}
		// The kernel forwards packets between namespaces synchronously, within sendto.
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

// sleepExactly makes the thread's sleeps end on time, until the returned function is called. By
// default they end 50 µs late, see PR_SET_TIMERSLACK in prctl(2).
func sleepExactly() (undo func()) {
	setTimerSlack := func(nanoseconds uintptr) { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, nanoseconds, 0, 0, 0) } // without it, sleeps are longer
	setTimerSlack(1)
	return func() { setTimerSlack(0) } // the default
}

// waitForNext waits until the next packet is due.
func (p *Probe) waitForNext(last, event time.Time) {
	next := last.Add(max(p.MinInterval, last.Sub(event)/backoffDivisor))
	if p.throttleUntil != nil {
		select {
		case <-p.throttleUntil:
			p.throttleUntil = nil
		default:
			const minInterval = 100 * time.Microsecond
			next = last.Add(max(minInterval, next.Sub(last)))
		}
	}
	const minSleep = 50 * time.Microsecond
	for {
		left := time.Until(next)
		switch {
		case left <= 0:
			return
		case left > minSleep:
			ts := unix.NsecToTimespec(int64(left))
			_ = unix.Nanosleep(&ts, nil) // a signal may interrupt the sleep
		}
	}
}

// send sends the next packet.
func (p *Probe) send(service netip.AddrPort) error {
	p.lastSeq++
	p.sourcesUsed++
	const ports = 60000 // per source address, from port 1024
	source := AddrPlus(clientCIDR.Addr(), int(1+p.sourcesUsed/ports))
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
	// ENOBUFS and EPERM mean that the client's namespace dropped the packet.
	if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("send a packet to %s: %w", service, os.NewSyscallError("sendto", err))
	}
	return nil
}

// tcpChecksum returns the checksum of a TCP segment between the addresses, which are the source
// and destination in network byte order.
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
	return ^uint16(sum) //nolint:gosec // the sum has 16 bits
}

// receive calls arrived for each packet of the probe that has arrived. It does not block.
func (p *Probe) receive(arrived func(seq uint32, addr netip.Addr)) error {
	for {
		n, _, err := unix.Recvfrom(p.receiveFD, p.buf[:], 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("receive probe packets: %w", os.NewSyscallError("recvfrom", err))
		}
		b := p.buf[:n]
		if len(b) < ipHeader+tcpHeader {
			continue
		}
		if from := netip.AddrFrom4([4]byte(b[12:16])); !clientCIDR.Contains(from) {
			continue // not from a probe
		}
		tcp := b[int(b[0]&0xf)*4:]
		arrived(binary.BigEndian.Uint32(tcp[4:]), netip.AddrFrom4([4]byte(b[16:20])))
	}
}

// drain receives until all sent packets have had time to arrive: on a busy machine the kernel may
// defer forwarding.
func (p *Probe) drain(arrived func(seq uint32, addr netip.Addr)) error {
	const grace, period = 3 * time.Millisecond, 200 * time.Microsecond
	for begin := time.Now(); time.Since(begin) < grace; time.Sleep(period) {
		if err := p.receive(arrived); err != nil {
			return err
		}
	}
	return p.receive(arrived)
}

// discardReceived drops the packets that have arrived so far.
func (p *Probe) discardReceived() error { return p.receive(func(uint32, netip.Addr) {}) }

// AddrPlus returns the IPv4 address n after addr.
func AddrPlus(addr netip.Addr, n int) netip.Addr {
	b := addr.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n)) //nolint:gosec // n is the index of an address
	return netip.AddrFrom4(b)
}
