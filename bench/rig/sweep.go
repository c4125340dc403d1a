package rig

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// sampled is how many Services Answers looks at all the time.
const sampled = 256

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
	left, err := p.pass(services)
	if err != nil || len(left) == 0 {
		return after, err
	}
	return p.allAnswer(ctx, event, left)
}

// allAnswer makes passes over Services until all have answered.
func (p *Probe) allAnswer(ctx context.Context, event time.Time, services []netip.AddrPort) (time.Duration, error) {
	left := services
	for {
		begin := time.Now()
		var err error
		if left, err = p.pass(left); err != nil {
			return 0, err
		}
		if len(left) == 0 {
			return time.Since(event), nil
		}
		if err := ctx.Err(); err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				err = ErrNotSeen
			}
			return 0, fmt.Errorf("wait until %d Services answer, among them %s: %w", len(left), left[0], err)
		}
		p.wait(begin, event)
	}
}

// pass sends a packet to each Service and returns those that have not answered.
func (p *Probe) pass(services []netip.AddrPort) ([]netip.AddrPort, error) {
	if err := p.discard(); err != nil {
		return nil, err
	}
	first := p.number + 1
	answered := make([]bool, len(services))
	note := func(number uint32, _ netip.Addr) {
		if i := int(number - first); i >= 0 && i < len(answered) {
			answered[i] = true
		}
	}
	for _, s := range services {
		if err := p.send(s); err != nil {
			return nil, err
		}
		if err := p.receive(note); err != nil {
			return nil, err
		}
	}
	// What the kernel has put off is there a little later.
	time.Sleep(100 * time.Microsecond)
	if err := p.receive(note); err != nil {
		return nil, err
	}
	var left []netip.AddrPort
	for i, s := range services {
		if !answered[i] {
			left = append(left, s)
		}
	}
	return left, nil
}

// Spread makes n connections to a Service and returns how many of them arrived at
// which endpoint.
func (p *Probe) Spread(ctx context.Context, service netip.AddrPort, n int) (map[netip.Addr]int, error) {
	if err := p.discard(); err != nil {
		return nil, err
	}
	first := p.number + 1
	counts := map[netip.Addr]int{}
	note := func(number uint32, addr netip.Addr) {
		if number >= first {
			counts[addr]++
		}
	}
	for i := range n {
		if err := p.send(service); err != nil {
			return nil, err
		}
		if err := p.receive(note); err != nil {
			return nil, err
		}
		if i%64 == 0 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	time.Sleep(time.Millisecond)
	return counts, p.receive(note)
}
