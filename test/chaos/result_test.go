package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

// A connection counts as disturbed only if it overlaps the disturbance or the time
// to settle after it.
func TestIntervalOverlaps(t *testing.T) {
	begin := time.Unix(1000, 0)
	i := interval{begin: begin, end: begin.Add(time.Second)}
	for name, test := range map[string]struct {
		interval   interval
		begin, end time.Duration
		want       bool
	}{
		"before":           {i, -2 * time.Second, -time.Second, false},
		"across":           {i, -time.Second, 3 * time.Second, true},
		"within":           {i, 100 * time.Millisecond, 200 * time.Millisecond, true},
		"while it settles": {i, time.Second + repairTime/2, 5 * time.Second, true},
		"after":            {i, time.Second + repairTime + time.Millisecond, 5 * time.Second, false},
		"it lasts":         {interval{begin: begin}, time.Hour, time.Hour, true},
		"before it lasts":  {interval{begin: begin}, -time.Hour, -time.Second, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := test.interval.overlaps(begin.Add(test.begin), begin.Add(test.end)); got != test.want {
				t.Errorf("overlaps is %t, want %t", got, test.want)
			}
		})
	}
}

// Every kind of loss is noticed.
func TestViolations(t *testing.T) {
	now := time.Now().Add(time.Second)
	failure := errors.New("refused")
	for name, test := range map[string]struct {
		fault fault
		do    func(*recorder)
		want  string // part of the problem; empty if there is none
	}{
		"all is well":       {fault{}, func(*recorder) {}, ""},
		"a failure":         {fault{}, func(r *recorder) { r.recordFailed(now, now, failure) }, "1 of 2 connections failed"},
		"a broken one":      {fault{}, func(r *recorder) { r.recordOpened(1); r.recordBroken(now, now, failure) }, "1 of 1 open connections broke"},
		"a crash":           {fault{}, (*recorder).recordCrash, "ended by itself"},
		"an expected crash": {fault{crashesFairlead: true}, (*recorder).recordCrash, ""},
		"stale": {fault{maxStaleness: time.Second}, func(r *recorder) {
			r.recordConnected(target{from: &nettest.Host{}, service: &service{}}, time.Now(), 0, 2*time.Second)
		}, "1s is allowed"},
		"stale as allowed": {fault{maxStaleness: time.Second}, func(r *recorder) {
			r.recordConnected(target{from: &nettest.Host{}, service: &service{}}, time.Now(), 0, time.Second)
		}, ""},
		"disturbed": {fault{disturbs: true}, func(r *recorder) {
			_ = r.disturb(func() error { r.recordFailed(time.Now(), time.Now(), failure); return nil })
		}, ""},
		"an open one breaks in a disturbance that keeps them": {fault{disturbs: true, keepsOpen: true}, func(r *recorder) {
			_ = r.disturb(func() error { r.recordBroken(time.Now(), time.Now(), failure); return nil })
		}, "1 of 0 open connections broke by the disturbance"},
		"disturbed by what does not disturb": {fault{}, func(r *recorder) {
			_ = r.disturb(func() error { r.recordFailed(time.Now(), time.Now(), failure); return nil })
		}, "disturbs none"},
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{}
			record := r.beginFault()
			r.recordConnected(target{from: &nettest.Host{}, service: &service{}}, time.Now(), 0, 0)
			r.recordChange()
			test.do(r)
			got := strings.Join(test.fault.violations(r.snapshot(record)), "; ")
			if (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
				t.Errorf("exceeded is %q, want %q", got, test.want)
			}
		})
	}
	if got := (fault{}).violations(result{}); len(got) != 2 {
		t.Errorf("a result without connections and changes exceeds %q, want two problems", got)
	}
}

func TestStaleness(t *testing.T) {
	e := newEndpoints(2)
	if err := e.change(0b01, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(time.Minute)
	if got := e.staleness(0, later); got != 0 {
		t.Errorf("an endpoint is stale by %s", got)
	}
	if got := e.staleness(1, later); got < 50*time.Second || got > 2*time.Minute {
		t.Errorf("a removed endpoint is stale by %s, want about a minute", got)
	}
	// As long as it is not known what was written, both sets are valid.
	if err := e.change(0b10, func() error { return errors.New("the API server is away") }); err == nil {
		t.Fatal("the error is lost")
	}
	if e.pods() != 0b11 || e.staleness(0, later) != 0 || e.staleness(1, later) != 0 {
		t.Errorf("the endpoints are %b", e.pods())
	}
}

// A connection that fails late counts for the fault during which it began.
func TestFailureCountsForItsFault(t *testing.T) {
	r := &recorder{}
	first := r.beginFault()
	begin := time.Now()
	second := r.beginFault()
	r.recordFailed(begin, time.Now(), errors.New("no answer"))
	if got := r.snapshot(first); got.failed != 1 || len(got.examples) != 1 {
		t.Errorf("the first fault has %d failures", got.failed)
	}
	if got := r.snapshot(second); got.connections != 0 {
		t.Errorf("the second fault has %d connections", got.connections)
	}
}

// An open connection that a disturbance broke counts for the fault of the disturbance,
// whenever it was used last and found broken.
func TestBrokenConnectionCountsForItsDisturbance(t *testing.T) {
	r := &recorder{}
	before := r.beginFault()
	used := time.Now()
	disturbing := r.beginFault()
	_ = r.disturb(func() error { return nil })
	after := r.beginFault()
	r.recordBroken(used, time.Now(), errors.New("no answer"))
	for name, record := range map[string]*record{"before": before, "after": after} {
		if got := r.snapshot(record); got.broken+got.disturbedOpen != 0 {
			t.Errorf("the fault %s it has %d broken connections, %d by a disturbance", name, got.broken, got.disturbedOpen)
		}
	}
	if got := r.snapshot(disturbing); got.disturbedOpen != 1 || got.broken != 0 {
		t.Errorf("the fault has %d broken connections, %d by a disturbance; want 0 and 1", got.broken, got.disturbedOpen)
	}
}
