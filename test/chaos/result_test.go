package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

// TestIntervalOverlaps checks that a connection is disturbed only if it overlaps the
// disturbance or the repairTime after it.
func TestIntervalOverlaps(t *testing.T) {
	begin := time.Unix(1000, 0)
	i := interval{begin: begin, end: begin.Add(time.Second)}
	for name, test := range map[string]struct {
		interval   interval
		begin, end time.Duration
		want       bool
	}{
		"before":             {i, -2 * time.Second, -time.Second, false},
		"across":             {i, -time.Second, 3 * time.Second, true},
		"within":             {i, 100 * time.Millisecond, 200 * time.Millisecond, true},
		"in the repair time": {i, time.Second + repairTime/2, 5 * time.Second, true},
		"after":              {i, time.Second + repairTime + time.Millisecond, 5 * time.Second, false},
		"not ended":          {interval{begin: begin}, time.Hour, time.Hour, true},
		"before, not ended":  {interval{begin: begin}, -time.Hour, -time.Second, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := test.interval.overlaps(begin.Add(test.begin), begin.Add(test.end)); got != test.want {
				t.Errorf("overlaps is %t, want %t", got, test.want)
			}
		})
	}
}

// TestViolations checks that every kind of loss is detected.
func TestViolations(t *testing.T) {
	now := time.Now().Add(time.Second)
	failure := errors.New("refused")
	for name, test := range map[string]struct {
		fault fault
		do    func(*recorder)
		want  string // part of the violation; empty for none
	}{
		"no loss":           {fault{}, func(*recorder) {}, ""},
		"failed connection": {fault{}, func(r *recorder) { r.recordFailed(now, now, failure) }, "1 of 2 connections failed"},
		"broken connection": {fault{}, func(r *recorder) { r.recordOpened(1); r.recordBroken(now, now, failure) }, "1 of 1 open connections broke"},
		"crash":             {fault{}, (*recorder).recordCrash, "exited unexpectedly"},
		"expected crash":    {fault{crashesFairlead: true}, (*recorder).recordCrash, ""},
		"too stale": {fault{maxStaleness: time.Second}, func(r *recorder) {
			r.recordConnected(target{from: &nettest.Host{}, service: &service{}}, time.Now(), 0, 2*time.Second)
		}, "1s is allowed"},
		"stale as allowed": {fault{maxStaleness: time.Second}, func(r *recorder) {
			r.recordConnected(target{from: &nettest.Host{}, service: &service{}}, time.Now(), 0, time.Second)
		}, ""},
		"disturbed": {fault{disturbs: true}, func(r *recorder) {
			_ = r.disturb(func() error { r.recordFailed(time.Now(), time.Now(), failure); return nil })
		}, ""},
		"outage too long": {fault{disturbs: true, maxOutage: time.Second}, func(r *recorder) {
			_ = r.disturb(func() error {
				r.recordFailed(now, now, failure)
				r.recordFailed(now.Add(2*time.Second), now.Add(2*time.Second), failure)
				return nil
			})
		}, "2s because of one disturbance"},
		"outage as allowed": {fault{disturbs: true, maxOutage: time.Second}, func(r *recorder) {
			for range 2 { // two disturbances
				_ = r.disturb(func() error { r.recordFailed(time.Now(), time.Now(), failure); return nil })
			}
		}, ""},
		"broken by a disturbance that keeps open connections": {fault{disturbs: true, keepsOpen: true}, func(r *recorder) {
			_ = r.disturb(func() error { r.recordBroken(time.Now(), time.Now(), failure); return nil })
		}, "the disturbance broke 1 of 0 open connections"},
		"disturbed by a fault without disturbances": {fault{}, func(r *recorder) {
			_ = r.disturb(func() error { r.recordFailed(time.Now(), time.Now(), failure); return nil })
		}, "must disturb none"},
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{}
			record := r.beginFault()
			r.recordConnected(target{from: &nettest.Host{}, service: &service{}}, time.Now(), 0, 0)
			r.recordChange()
			test.do(r)
			got := strings.Join(test.fault.violations(r.snapshot(record)), "; ")
			if (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
				t.Errorf("violations %q, want %q", got, test.want)
			}
		})
	}
	if got := (fault{}).violations(result{}); len(got) != 2 {
		t.Errorf("a result without connections and changes has the violations %q, want two", got)
	}
}

// TestStaleness checks how long a removed endpoint has been stale.
func TestStaleness(t *testing.T) {
	e := newEndpoints(2)
	if err := e.change(0b01, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(time.Minute)
	if got := e.staleness(0, later); got != 0 {
		t.Errorf("a current endpoint has staleness %s", got)
	}
	if got := e.staleness(1, later); got < 50*time.Second || got > 2*time.Minute {
		t.Errorf("a removed endpoint has staleness %s, want about a minute", got)
	}
	// While it is unknown whether the API stored the change, both sets are valid.
	if err := e.change(0b10, func() error { return errors.New("the API server is down") }); err == nil {
		t.Fatal("change returned no error")
	}
	if e.pods() != 0b11 || e.staleness(0, later) != 0 || e.staleness(1, later) != 0 {
		t.Errorf("endpoints %b, want both valid", e.pods())
	}
}

// TestFailureCountsForItsFault checks that a connection that fails late counts for the fault
// during which it began.
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

// TestBrokenConnectionCountsForItsDisturbance checks that an open connection that a
// disturbance broke counts for the fault with the disturbance, no matter when the connection
// was last used and found broken.
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
