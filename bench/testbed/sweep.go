package testbed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// sampleSize is how many Services Answers looks at all the time.
const sampleSize = 64

// WaitAllAnswer waits until the last of the Services answers, that is until of each a
// packet has arrived at an endpoint, and returns the time from event. It looks at
// some Services all the time, spread over the list with its ends, and at
// the others once these answer; those that do not yet then are looked at until they
// do. All endpoints must be seen: see [Testbed.SetBackgroundReachable].
func (p *Probe) WaitAllAnswer(ctx context.Context, event time.Time, services []netip.AddrPort) (time.Duration, error) {
	if len(services) == 0 {
		return 0, errors.New("no Services to wait for")
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 10*defaultTimeout)
		defer cancel()
	}
	some := services
	if len(services) > sampleSize {
		some = make([]netip.AddrPort, sampleSize)
		for i := range some {
			some[i] = services[i*(len(services)-1)/(sampleSize-1)]
		}
	}
	after, err := p.sweepUntilAllAnswer(ctx, event, some)
	if err != nil || len(some) == len(services) {
		return after, err
	}
	rest := p.newSweep(services)
	if err := cmp.Or(rest.pass(ctx), p.drain(rest.record)); err != nil {
		return 0, err
	}
	if left := rest.unanswered(); len(left) > 0 {
		return p.sweepUntilAllAnswer(ctx, event, left)
	}
	return after, nil
}

// sweepUntilAllAnswer makes passes over Services until all have answered.
func (p *Probe) sweepUntilAllAnswer(ctx context.Context, event time.Time, services []netip.AddrPort) (time.Duration, error) {
	s := p.newSweep(services)
	for {
		begin := time.Now()
		if err := s.pass(ctx); err != nil {
			return 0, err
		}
		left := s.unanswered()
		if len(left) == 0 {
			return s.lastAnswer.Sub(event), nil
		}
		if err := ctx.Err(); err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				err = ErrNotObserved
			}
			return 0, fmt.Errorf("wait until %d Services answer, among them %s: %w", len(left), left[0], err)
		}
		// Leave most of the processor to those who are at work.
		const part = 9
		time.Sleep(part * time.Since(begin))
		p.waitForNext(begin, event)
	}
}

// sweep is the sending of packets to many Services.
type sweep struct {
	probe    *Probe
	services []netip.AddrPort
	answered []bool
	// firstSeq is the number of the first packet, and to has which Service each was sent
	// to: what arrives late counts as well.
	firstSeq   uint32
	targets    []int
	lastAnswer time.Time // when the last was seen that has answered
}

func (p *Probe) newSweep(services []netip.AddrPort) *sweep {
	return &sweep{probe: p, services: services, answered: make([]bool, len(services)), firstSeq: p.lastSeq + 1}
}

func (s *sweep) record(number uint32, _ netip.Addr) {
	if i := int(number - s.firstSeq); number >= s.firstSeq && i < len(s.targets) && !s.answered[s.targets[i]] {
		s.answered[s.targets[i]] = true
		s.lastAnswer = time.Now()
	}
}

// unanswered returns the Services that have not answered.
func (s *sweep) unanswered() []netip.AddrPort {
	var left []netip.AddrPort
	for i, service := range s.services {
		if !s.answered[i] {
			left = append(left, service)
		}
	}
	return left
}

// drainInterval is how many packets are sent before what was sent gets time to arrive, if
// it has not arrived at once.
const drainInterval = 256

// pass sends a packet to each Service that has not answered.
func (s *sweep) pass(ctx context.Context) error {
	behind := 0 // packets of this chunk that may be on their way
	for i, service := range s.services {
		if s.answered[i] {
			continue
		}
		s.targets = append(s.targets, i)
		if err := s.probe.send(service); err != nil {
			return err
		}
		if err := s.probe.receive(s.record); err != nil {
			return err
		}
		if !s.answered[i] {
			behind++
		}
		if behind < drainInterval {
			continue
		}
		if err := cmp.Or(ctx.Err(), s.probe.drain(s.record)); err != nil {
			return err
		}
		behind = 0
	}
	return nil
}

// CountArrivals makes n connections to a Service and returns how many of them arrived at
// which endpoint.
func (p *Probe) CountArrivals(ctx context.Context, service netip.AddrPort, n int) (map[netip.Addr]int, error) {
	if err := p.discardReceived(); err != nil {
		return nil, err
	}
	first := p.lastSeq + 1
	counts, arrived := map[netip.Addr]int{}, 0
	note := func(number uint32, addr netip.Addr) {
		if number >= first {
			counts[addr]++
			arrived++
		}
	}
	for i := range n {
		if err := p.send(service); err != nil {
			return nil, err
		}
		if err := p.receive(note); err != nil {
			return nil, err
		}
		if i%drainInterval != 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if arrived <= i {
			if err := p.drain(note); err != nil {
				return nil, err
			}
		}
	}
	return counts, p.drain(note)
}
