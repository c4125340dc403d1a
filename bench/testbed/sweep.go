package testbed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// sampleSize is the number of Services that WaitAllAnswer checks first.
const sampleSize = 64

// WaitAllAnswer waits until every Service answers: a Service answers when a packet to it arrives
// at an endpoint. It returns the time from event until the last Service answered. First it
// repeatedly sends packets to a sample of the Services, spread over the list and including both
// ends. When the whole sample has answered, it sends a packet to every Service, and then
// repeatedly to the Services that have not answered. All endpoints must be reachable, see
// [Testbed.SetBackgroundReachable].
func (p *Probe) WaitAllAnswer(ctx context.Context, event time.Time, services []netip.AddrPort) (time.Duration, error) {
	if len(services) == 0 {
		return 0, errors.New("no Services to wait for")
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 10*defaultTimeout)
		defer cancel()
	}
	sample := services
	if len(services) > sampleSize {
		sample = make([]netip.AddrPort, sampleSize)
		for i := range sample {
			sample[i] = services[i*(len(services)-1)/(sampleSize-1)]
		}
	}
	after, err := p.sweepUntilAllAnswer(ctx, event, sample)
	if err != nil || len(sample) == len(services) {
		return after, err
	}
	rest := p.newSweep(services)
	if err := cmp.Or(rest.pass(ctx), p.drain(rest.record)); err != nil {
		return 0, err
	}
	if unanswered := rest.unanswered(); len(unanswered) > 0 {
		return p.sweepUntilAllAnswer(ctx, event, unanswered)
	}
	return after, nil
}

// sweepUntilAllAnswer makes passes over the Services until all have answered.
func (p *Probe) sweepUntilAllAnswer(ctx context.Context, event time.Time, services []netip.AddrPort) (time.Duration, error) {
	s := p.newSweep(services)
	for {
		begin := time.Now()
		if err := s.pass(ctx); err != nil {
			return 0, err
		}
		unanswered := s.unanswered()
		if len(unanswered) == 0 {
			return s.lastAnswer.Sub(event), nil
		}
		if err := ctx.Err(); err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				err = ErrNotObserved
			}
			return 0, fmt.Errorf("wait until %d Services answer, among them %s: %w", len(unanswered), unanswered[0], err)
		}
		// Leave most of the processor time to the system under test.
		const sleepFactor = 9
		time.Sleep(sleepFactor * time.Since(begin))
		p.waitForNext(begin, event)
	}
}

// sweep sends packets to many Services and records which of them answer.
type sweep struct {
	probe    *Probe
	services []netip.AddrPort
	answered []bool
	// firstSeq is the sequence number of the first packet. targets has the index of the Service of
	// each packet since then, so that late packets count as well.
	firstSeq   uint32
	targets    []int
	lastAnswer time.Time // when the last Service answered
}

func (p *Probe) newSweep(services []netip.AddrPort) *sweep {
	return &sweep{probe: p, services: services, answered: make([]bool, len(services)), firstSeq: p.lastSeq + 1}
}

func (s *sweep) record(seq uint32, _ netip.Addr) {
	if i := int(seq - s.firstSeq); seq >= s.firstSeq && i < len(s.targets) && !s.answered[s.targets[i]] {
		s.answered[s.targets[i]] = true
		s.lastAnswer = time.Now()
	}
}

// unanswered returns the Services that have not answered.
func (s *sweep) unanswered() []netip.AddrPort {
	var services []netip.AddrPort
	for i, service := range s.services {
		if !s.answered[i] {
			services = append(services, service)
		}
	}
	return services
}

// drainInterval is the number of packets after which the probe waits for packets that have not
// arrived immediately.
const drainInterval = 256

// pass sends a packet to each Service that has not answered.
func (s *sweep) pass(ctx context.Context) error {
	inFlight := 0 // packets that may still arrive
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
			inFlight++
		}
		if inFlight < drainInterval {
			continue
		}
		if err := cmp.Or(ctx.Err(), s.probe.drain(s.record)); err != nil {
			return err
		}
		inFlight = 0
	}
	return nil
}

// CountArrivals makes n connections to a Service and returns the number of connections that
// arrived at each endpoint.
func (p *Probe) CountArrivals(ctx context.Context, service netip.AddrPort, n int) (map[netip.Addr]int, error) {
	if err := p.discardReceived(); err != nil {
		return nil, err
	}
	first := p.lastSeq + 1
	counts, arrived := map[netip.Addr]int{}, 0
	record := func(seq uint32, addr netip.Addr) {
		if seq >= first {
			counts[addr]++
			arrived++
		}
	}
	for i := range n {
		if err := p.send(service); err != nil {
			return nil, err
		}
		if err := p.receive(record); err != nil {
			return nil, err
		}
		if i%drainInterval != 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if arrived <= i {
			if err := p.drain(record); err != nil {
				return nil, err
			}
		}
	}
	return counts, p.drain(record)
}
