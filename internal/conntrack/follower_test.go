package conntrack

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	stdsync "sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/sync"
)

// fakeEvents are events in memory.
type fakeEvents struct {
	mu                stdsync.Mutex
	listeners, closed int
	flows             []flow // since the last call of receive
	err               error
}

func (e *fakeEvents) receive(visit func(flow)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, f := range e.flows {
		visit(f)
	}
	e.flows = nil
	return e.err
}

func (e *fakeEvents) close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed++
	return nil
}

// addFlow adds an entry, with an event if the follower listens.
func (t *fakeTable) addFlow(f flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.flows = append(t.flows, f)
	t.events.mu.Lock()
	defer t.events.mu.Unlock()
	if t.events.listeners > t.events.closed {
		t.events.flows = append(t.events.flows, f)
	}
}

func udpFlow(text string) flow {
	f := parseAddrPorts(text)
	return flow{protocol: dataplane.UDP, destination: f[0], endpoint: f[1]}
}

// followingCleaner is a Cleaner whose follower listens and is complete for UDP over IPv4.
func followingCleaner(t *testing.T, services ...string) *testCleaner {
	t.Helper()
	r := startCleaner(t)
	r.table.events = &fakeEvents{}
	var pairs []string
	for _, text := range services {
		pairs = append(pairs, "", text)
	}
	r.OnCommit(replaceCommit(pairs...))
	r.expectFlows(t, "no flows")
	r.changeIdleServiceOften(t)
	if n := r.countDumps(func() { r.changeIdleService(t) }); n != 0 {
		t.Errorf("%d dumps for a Service without flows, want none", n)
	}
	return r
}

// changeIdleService removes and adds an endpoint of a Service without flows.
func (r *testCleaner) changeIdleService(t *testing.T) {
	t.Helper()
	const one, two = "idle 10.96.9.9:9 -> 10.0.9.1:9", "idle 10.96.9.9:9 -> 10.0.9.1:9 10.0.9.2:9"
	r.OnCommit(applyCommit(two, one))
	r.OnCommit(applyCommit(one, two))
	synctest.Wait()
}

// changeIdleServiceOften changes a Service without flows until the follower listens and is complete.
func (r *testCleaner) changeIdleServiceOften(t *testing.T) {
	t.Helper()
	for range 2 * followAfter {
		r.changeIdleService(t)
		time.Sleep(200 * time.Millisecond)
	}
	time.Sleep(verifyDelay + rescanDelay)
}

// countDumps returns the number of dumps during fn and the rescan.
func (r *testCleaner) countDumps(fn func()) int {
	count := func() int {
		synctest.Wait()
		r.table.mu.Lock()
		defer r.table.mu.Unlock()
		return r.table.dumpCount
	}
	before := count()
	fn()
	time.Sleep(2 * rescanDelay)
	return count() - before
}

// TestFollow checks that frequent changes cause dumps only for frontends and endpoints with flows.
func TestFollow(t *testing.T) {
	t.Parallel()
	const (
		dns  = "dns 10.96.0.10:53 -> 10.0.0.1:53"
		dns2 = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53"
		node = "node 0.0.0.0:30053 -> 10.0.0.1:53 10.0.0.2:53"
	)
	for _, tt := range []struct {
		name    string
		flows   []string
		changes []string
		dumps   int // including the rescan
		left    []string
	}{
		{name: "endpoint removed, without flows", changes: []string{dns2, dns}},
		{
			name: "endpoint removed, with a flow", changes: []string{dns2, dns}, dumps: 2,
			flows: []string{"10.96.0.10:53 10.0.0.2:53", "10.96.0.10:53 10.0.0.1:53"}, left: []string{"10.96.0.10:53 10.0.0.1:53"},
		},
		{
			name: "endpoint removed, with flows to other endpoints and frontends", changes: []string{dns2, dns},
			flows: []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.11:53 10.0.0.2:53", "10.96.0.10:54 10.0.0.2:53", "10.96.0.10:53 10.96.0.10:53"},
			left:  []string{"10.96.0.10:53 10.0.0.1:53", "10.96.0.11:53 10.0.0.2:53", "10.96.0.10:54 10.0.0.2:53", "10.96.0.10:53 10.96.0.10:53"},
		},
		{name: "Service added, without flows", changes: []string{"", "new 10.96.0.12:53 -> 10.0.0.1:53"}},
		{
			name: "Service added, with an untranslated flow", changes: []string{"", "new 10.96.0.12:53 -> 10.0.0.1:53"}, dumps: 2,
			flows: []string{"10.96.0.12:53 10.96.0.12:53"},
		},
		{name: "Service deleted, with a flow", changes: []string{dns2, ""}, dumps: 2, flows: []string{"10.96.0.10:53 10.0.0.2:53"}},
		{
			name: "node port's endpoint removed, with a flow", changes: []string{node, "node 0.0.0.0:30053 -> 10.0.0.1:53"}, dumps: 2,
			flows: []string{"192.0.2.1:30053 10.0.0.2:53", "192.0.2.1:30053 10.0.0.1:53"}, left: []string{"192.0.2.1:30053 10.0.0.1:53"},
		},
		{
			name: "node port added, with an untranslated flow", changes: []string{"", "other 0.0.0.0:30054 -> 10.0.0.1:53"}, dumps: 2,
			flows: []string{"192.0.2.1:30054 192.0.2.1:30054", "192.0.2.1:30055 192.0.2.1:30055"}, left: []string{"192.0.2.1:30055 192.0.2.1:30055"},
		},
		{
			name: "endpoint with the frontend's own address removed, with a flow", dumps: 2,
			changes: []string{"host 192.0.2.9:53 -> 10.0.0.1:53 192.0.2.9:53", "host 192.0.2.9:53 -> 10.0.0.1:53"},
			flows:   []string{"192.0.2.9:53 192.0.2.9:53"},
		},
		{
			name: "IPv6 Service, the first change of IPv6", dumps: 2,
			changes: []string{"dns6 [fd00:96::10]:53 -> [fd01::1]:53", ""}, flows: []string{"[fd00:96::10]:53 [fd01::1]:53"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, listening := range []bool{true, false} {
				synctest.Test(t, func(t *testing.T) {
					r := followingCleaner(t, dns2, node, "host 192.0.2.9:53 -> 10.0.0.1:53 192.0.2.9:53", "dns6 [fd00:96::10]:53 -> [fd01::1]:53")
					r.SetNode(dataplane.Node{NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
					if !listening { // the follower learns the flows from a dump
						time.Sleep(2 * followIdle)
					}
					for _, text := range tt.flows {
						r.table.addFlow(udpFlow(text))
					}
					if !listening {
						r.changeIdleServiceOften(t)
					}
					n := r.countDumps(func() {
						r.OnCommit(applyCommit(tt.changes...))
						r.expectFlows(t, "immediately", tt.left...)
					})
					if n != tt.dumps {
						t.Errorf("listening %t when the flows begin: %d dumps, want %d", listening, n, tt.dumps)
					}
				})
			}
		})
	}
}

// TestFollowDuration checks when the follower listens, and that a stale flow without an event lives
// for verifyDelay at most.
func TestFollowDuration(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const dns, dns2 = "dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53"
		r := startCleaner(t)
		events := &fakeEvents{}
		r.table.events = events
		expect := func(what string, listeners, closed int) {
			t.Helper()
			synctest.Wait()
			events.mu.Lock()
			defer events.mu.Unlock()
			if events.listeners != listeners || events.closed != closed {
				t.Errorf("%s: listened %d times and stopped %d times, want %d and %d", what, events.listeners, events.closed, listeners, closed)
			}
		}
		r.OnCommit(replaceCommit("", dns2))
		for range 100 { // less often than followAfter in followWithin
			time.Sleep(1200 * time.Millisecond)
			r.OnCommit(applyCommit(dns2, dns))
			r.OnCommit(applyCommit(dns, dns2))
		}
		expect("rare changes", 0, 0)
		r.changeIdleServiceOften(t)
		expect("frequent changes", 1, 0)

		// The kernel made no event.
		r.table.setFlows("10.96.0.10:53 10.0.0.2:53")
		r.OnCommit(applyCommit(dns2, dns))
		time.Sleep(verifyDelay - time.Nanosecond)
		r.expectFlows(t, "before verifyDelay", "10.96.0.10:53 10.0.0.2:53")
		time.Sleep(time.Nanosecond)
		r.expectFlows(t, "after verifyDelay")

		time.Sleep(followIdle)
		expect("no changes", 1, 1)
		scans := len(r.scans)
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(r.scans) != scans {
			t.Error("scan without a change")
		}
		r.table.setFlows("10.96.0.10:53 10.0.0.2:53")
		r.OnCommit(applyCommit(dns2, dns))
		r.expectFlows(t, "not listening")
		expect("one change", 1, 1)
	})
}

// TestFollowFailures checks that each change causes a scan again after events were lost, and that the
// follower listens again later.
func TestFollowFailures(t *testing.T) {
	t.Parallel()
	flood := func(n, destinations int) (flows []flow) {
		for i := range n {
			d := i % destinations
			flows = append(flows, udpFlow(fmt.Sprintf("198.51.100.1:%d 10.0.%d.%d:53", 1+d%1000, d/1000%256, d/256000)))
		}
		return flows
	}
	for name, fail := range map[string]func(*fakeEvents){
		"lost events":           func(e *fakeEvents) { e.err = unix.ENOBUFS },
		"events turned off":     func(e *fakeEvents) { e.err = ErrEventsOff },
		"too many events":       func(e *fakeEvents) { e.flows = flood(3*maxEventRate, 10) },
		"too many destinations": func(e *fakeEvents) { e.flows = flood(maxFlowKeys, maxFlowKeys) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				const dns, dns2 = "dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53"
				r := followingCleaner(t, dns2)
				events := r.table.events
				events.mu.Lock()
				fail(events)
				events.mu.Unlock()
				time.Sleep(2 * receiveInterval)
				r.table.setFlows("10.96.0.10:53 10.0.0.2:53")
				r.OnCommit(applyCommit(dns2, dns))
				r.expectFlows(t, "after the failure")
				events.mu.Lock()
				if events.listeners != 1 || events.closed != 1 {
					t.Errorf("listened %d times and stopped %d times, want once", events.listeners, events.closed)
				}
				events.err, events.flows = nil, nil
				events.mu.Unlock()
				for range 30 {
					r.changeIdleService(t)
					time.Sleep(time.Second)
				}
				events.mu.Lock()
				if events.listeners != 1 {
					t.Error("listened again before followRetry")
				}
				events.mu.Unlock()
				time.Sleep(followRetry)
				for range 30 {
					r.changeIdleService(t)
					time.Sleep(time.Second)
				}
				events.mu.Lock()
				if events.listeners != 2 {
					t.Errorf("listened %d times, want again", events.listeners)
				}
				events.mu.Unlock()
			})
		})
	}
}

// TestFollowBeforeComplete checks a packet that precedes the listener, and whose entry becomes visible
// without an event after a dump.
func TestFollowBeforeComplete(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const dns, dns2 = "dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53"
		r := startCleaner(t)
		r.table.events = &fakeEvents{}
		r.OnCommit(replaceCommit("", dns2))
		time.Sleep(time.Hour)
		for range followAfter {
			r.changeIdleService(t)
		}
		time.Sleep(rescanDelay - time.Nanosecond)
		r.changeIdleService(t)
		r.table.setFlows("10.96.0.10:53 10.0.0.2:53")
		time.Sleep(3 * rescanDelay)
		r.changeIdleService(t)
		r.OnCommit(applyCommit(dns2, dns))
		r.expectFlows(t, "endpoint removed")
	})
}

// TestNoStaleFlowSurvives changes Services at random while clients open flows. Some packets wait
// between the translation and the entry. No stale flow survives, and hardly any change causes a dump.
func TestNoStaleFlowSurvives(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { checkNoStaleFlowSurvives(t, rand.New(rand.NewPCG(seed, 0))) })
		})
	}
}

func checkNoStaleFlowSurvives(t *testing.T, random *rand.Rand) {
	t.Helper()
	r := startCleaner(t)
	r.table.events = &fakeEvents{}
	r.SetNode(dataplane.Node{NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
	const services, endpoints = 12, 6
	frontendOf := func(i int) (dataplane.Protocol, string, string) {
		protocol := dataplane.UDP
		if i%4 == 3 {
			protocol = dataplane.SCTP
		}
		frontend := fmt.Sprintf("10.96.0.%d:53", i)
		destination := frontend
		if i%4 == 1 {
			frontend, destination = fmt.Sprintf("0.0.0.0:%d", 30000+i), fmt.Sprintf("192.0.2.1:%d", 30000+i)
		}
		return protocol, frontend, destination
	}
	current := make([]*dataplane.Service, services)
	change := func(i int) dataplane.Change {
		protocol, frontend, _ := frontendOf(i)
		text := fmt.Sprintf("s%d %s ->", i, frontend)
		for e := range endpoints {
			if random.IntN(2) == 0 {
				text += fmt.Sprintf(" 10.0.%d.%d:53", i, e)
			}
		}
		if random.IntN(8) == 0 {
			text = ""
		}
		c := dataplane.Change{Old: current[i], New: serviceWithProtocol(protocol, text)}
		current[i] = c.New
		return c
	}
	// translate returns the flow that the current rules create, as a backend does.
	translate := func(i int) (flow, bool) {
		protocol, _, destination := frontendOf(i)
		f := flow{protocol: protocol, replied: random.IntN(2) == 0, destination: netip.MustParseAddrPort(destination)}
		switch s := current[i]; {
		case s == nil:
			f.endpoint = f.destination
		case len(s.Endpoints) == 0:
			return flow{}, false // rejected
		default:
			f.endpoint = s.Endpoints[random.IntN(len(s.Endpoints))].Addr
		}
		return f, true
	}
	stale := func() (list []flow) {
		r.table.mu.Lock()
		defer r.table.mu.Unlock()
		for _, f := range r.table.flows {
			i := int(f.destination.Port()) - 30000
			if i < 0 {
				b := f.destination.Addr().As4()
				i = int(b[3])
			}
			switch s := current[i]; {
			case s == nil && !f.translated():
			case s == nil || !serves(s, f):
				list = append(list, f)
			}
		}
		return list
	}
	r.OnCommit(replaceCommit())
	changes, lastLate := 0, time.Now()
	for range 600 {
		for range random.IntN(3) {
			// Most Services have no clients.
			f, ok := translate(random.IntN(3))
			switch {
			case !ok:
			case random.IntN(20) == 0:
				wait := time.Duration(random.Int64N(int64(rescanDelay)))
				time.AfterFunc(wait, func() { r.table.addFlow(f) })
				lastLate = time.Now().Add(wait)
			default:
				r.table.addFlow(f)
			}
		}
		if random.IntN(3) > 0 {
			commit := sync.Commit{Op: sync.OpApply}
			for _, i := range random.Perm(services)[:1+random.IntN(2)] {
				commit.Changes = append(commit.Changes, change(i))
			}
			changes += len(commit.Changes)
			r.OnCommit(commit)
			synctest.Wait()
			if list := stale(); len(list) > 0 && time.Since(lastLate) > 2*rescanDelay {
				t.Fatalf("stale flows %v after %+v", list, commit)
			}
		}
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
		if random.IntN(50) == 0 {
			time.Sleep(time.Until(lastLate) + 2*rescanDelay)
			synctest.Wait()
			if list := stale(); len(list) > 0 {
				t.Fatalf("stale flows %v after the rescan", list)
			}
		}
	}
	r.table.mu.Lock()
	defer r.table.mu.Unlock()
	if r.table.events.listeners == 0 {
		t.Error("the follower did not listen")
	}
	if n := len(r.table.dumps); n >= changes {
		t.Errorf("%d dumps for %d changes", n, changes)
	}
}
