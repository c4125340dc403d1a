package rig

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// sampled is how many Services Answers looks at all the time.
const sampled = 64

// Answers waits until the last of the Services answers, that is until of each a
// packet has arrived at an endpoint, and returns the time from event. It looks at
// some Services all the time, spread over the list with its ends, and at
// the others once these answer; those that do not yet then are looked at until they
// do. All endpoints must be seen: see [Rig.Answer].
func (p *Probe) Answers(ctx context.Context, event time.Time, services []netip.AddrPort) (time.Duration, error) {
	if len(services) == 0 {
		return 0, errors.New("no Services to wait for")
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 10*patience)
		defer cancel()
	}
	some := services
	if len(services) > sampled {
		some = make([]netip.AddrPort, sampled)
		for i := range some {
			some[i] = services[i*(len(services)-1)/(sampled-1)]
		}
	}
	after, err := p.allAnswer(ctx, event, some)
	if err != nil || len(some) == len(services) {
		return after, err
	}
	rest := p.sweep(services)
	if err := cmp.Or(rest.pass(ctx), p.drain(rest.note)); err != nil {
		return 0, err
	}
	if left := rest.left(); len(left) > 0 {
		return p.allAnswer(ctx, event, left)
	}
	return after, nil
}

// allAnswer makes passes over Services until all have answered.
func (p *Probe) allAnswer(ctx context.Context, event time.Time, services []netip.AddrPort) (time.Duration, error) {
	s := p.sweep(services)
	for {
		begin := time.Now()
		if err := s.pass(ctx); err != nil {
			return 0, err
		}
		left := s.left()
		if len(left) == 0 {
			return s.last.Sub(event), nil
		}
		if err := ctx.Err(); err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				err = ErrNotSeen
			}
			return 0, fmt.Errorf("wait until %d Services answer, among them %s: %w", len(left), left[0], err)
		}
		// Leave most of the processor to those who are at work.
		const part = 9
		time.Sleep(part * time.Since(begin))
		p.wait(begin, event)
	}
}

// sweep is the sending of packets to many Services.
type sweep struct {
	probe    *Probe
	services []netip.AddrPort
	answered []bool
	// first is the number of the first packet, and to has which Service each was sent
	// to: what arrives late counts as well.
	first uint32
	to    []int
	last  time.Time // when the last was seen that has answered
}

func (p *Probe) sweep(services []netip.AddrPort) *sweep {
	return &sweep{probe: p, services: services, answered: make([]bool, len(services)), first: p.number + 1}
}

func (s *sweep) note(number uint32, _ netip.Addr) {
	if i := int(number - s.first); number >= s.first && i < len(s.to) && !s.answered[s.to[i]] {
		s.answered[s.to[i]] = true
		s.last = time.Now()
	}
}

// left returns the Services that have not answered.
func (s *sweep) left() []netip.AddrPort {
	var left []netip.AddrPort
	for i, service := range s.services {
		if !s.answered[i] {
			left = append(left, service)
		}
	}
	return left
}

// chunk is how many packets are sent before what was sent gets time to arrive, if
// it has not arrived at once.
const chunk = 256

// pass sends a packet to each Service that has not answered.
func (s *sweep) pass(ctx context.Context) error {
	behind := 0 // packets of this chunk that may be on their way
	for i, service := range s.services {
		if s.answered[i] {
			continue
		}
		s.to = append(s.to, i)
		if err := s.probe.send(service); err != nil {
			return err
		}
		if err := s.probe.receive(s.note); err != nil {
			return err
		}
		if !s.answered[i] {
			behind++
		}
		if behind < chunk {
			continue
		}
		if err := cmp.Or(ctx.Err(), s.probe.drain(s.note)); err != nil {
			return err
		}
		behind = 0
	}
	return nil
}

// Spread makes n connections to a Service and returns how many of them arrived at
// which endpoint.
func (p *Probe) Spread(ctx context.Context, service netip.AddrPort, n int) (map[netip.Addr]int, error) {
	if err := p.discard(); err != nil {
		return nil, err
	}
	first := p.number + 1
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
		if i%chunk != 0 {
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
