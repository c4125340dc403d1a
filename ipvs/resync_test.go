package ipvs

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"

	"golang.org/x/sys/unix"
)

// countingIPVS counts the requests of a resync, and the most between two pauses.
type countingIPVS struct {
	fakeIPVS

	lists, requests, burst, longestBurst, pauses int
	read                                         map[serverKey]int
}

func (c *countingIPVS) readServers(f dataplane.Family, visit func(serverKey, serverState)) (complete bool, count int, err error) {
	c.lists++
	return c.fakeIPVS.readServers(f, visit)
}

func (c *countingIPVS) readDestinations(s serverKey, expected int) ([]addressedDestination, error) {
	c.requests++
	c.burst++
	c.longestBurst = max(c.longestBurst, c.burst)
	c.read[s]++
	return c.fakeIPVS.readDestinations(s, expected)
}

func (c *countingIPVS) pause() { c.pauses, c.burst = c.pauses+1, 0 }

// verifyServersWith runs the part of a resync that reads virtual servers.
func verifyServersWith(t *testing.T, d *Dataplane, c *countingIPVS, round int) (intact bool) {
	t.Helper()
	c.lists, c.requests, c.burst, c.longestBurst, c.pauses = 0, 0, 0, 0, 0
	v := verification{Dataplane: d, conn: c, pause: c.pause, round: round, rounds: roundsFor(len(d.servers))}
	defer v.endReads()
	err := v.finishDrains()
	if err == nil {
		intact, err = v.verifyServers()
	}
	if err == nil && intact {
		intact, err = v.verifySelected()
	}
	if err != nil {
		t.Fatal(err)
	}
	return intact
}

func webServices(t *testing.T, n int) []*dataplane.Service {
	t.Helper()
	all := make([]*dataplane.Service, n)
	for i := range all {
		all[i] = service(t, dataplane.ClusterIP, fmt.Sprintf("web-%d", i), fmt.Sprintf("10.%d.%d.%d:80/TCP", 96+i>>16, i>>8&0xff, i&0xff),
			dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80", "10.0.0.2:80")})
	}
	return all
}

// TestResyncCost checks that a resync lists virtual servers once, the first one twice, reads the destinations of a
// bounded number of virtual servers in short bursts, and pauses for less than its period, and that
// successive resyncs read the destinations of all virtual servers.
func TestResyncCost(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ services, rounds, requests, burst int }{
		{10, 1, 10, 16},
		{1_000, 4, 300, 16},
		{20_000, 12, 2_000, 80},
		{120_000, 15, 9_000, 360},
	} {
		t.Run(fmt.Sprintf("services=%d", tt.services), func(t *testing.T) {
			t.Parallel()
			d, f := newFakeNode(t)
			f.skipOrderChecks = true // the checks are slow
			if err := d.Replace(t.Context(), dataplane.Node{}, sequence(webServices(t, tt.services)...), nil); err != nil {
				t.Fatal(err)
			}
			c := &countingIPVS{fakeIPVS: fakeIPVS{f}, read: map[serverKey]int{}}
			rounds := roundsFor(tt.services)
			if rounds != tt.rounds {
				t.Errorf("%d resyncs read all destinations, want %d", rounds, tt.rounds)
			}
			for round := range rounds {
				if !verifyServersWith(t, d, c, round) {
					t.Error("drift")
				}
				wantLists := 1
				if round == 0 {
					wantLists = 2 // looks for IPv6 virtual servers of an earlier process once
				}
				if c.lists != wantLists || c.requests > tt.requests || c.longestBurst > tt.burst {
					t.Errorf("resync %d: %d lists, %d requests in bursts of up to %d, want %d, at most %d and %d",
						round, c.lists, c.requests, c.longestBurst, wantLists, tt.requests, tt.burst)
				}
				if pause := time.Duration(c.pauses) * burstPause; pause > resyncPeriod*3/5 {
					t.Errorf("resync %d: pauses for %v of %v", round, pause, resyncPeriod)
				}
			}
			for s := range d.servers {
				if c.read[s] != 1 {
					t.Errorf("%s: its destinations were read %d times in %d resyncs, want once", s, c.read[s], rounds)
				}
			}
		})
	}
	if pauses := (drainBursts + destinationBursts + 2*dumpBursts) * burstPause; pauses >= resyncPeriod {
		t.Errorf("a resync can pause for %v, want less than %v", pauses, resyncPeriod)
	}
}

// TestResyncFindsDrift checks after how many resyncs each kind of drift is found among many virtual
// servers.
func TestResyncFindsDrift(t *testing.T) {
	t.Parallel()
	const services = 5_000
	at := tcpServer("10.96.3.7:80")
	one, other := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.9:80")
	for _, tt := range []struct {
		name   string
		do     func(f *fakeNode)
		rounds int // 0 means that it is no drift
	}{
		{"nothing changes", func(*fakeNode) {}, 0},
		{"another program adds a virtual server", func(f *fakeNode) { f.servers[tcpServer("192.0.2.1:80")] = &fakeServer{} }, 0},
		{"a virtual server is deleted", func(f *fakeNode) { delete(f.servers, at) }, 1},
		{"a virtual server is added at a Service's address", func(f *fakeNode) { f.servers[tcpServer("10.96.3.7:81")] = &fakeServer{} }, 1},
		{"a virtual server is added at an internal address", func(f *fakeNode) { f.servers[tcpServer("250.29.0.1:81")] = &fakeServer{} }, 1},
		{"one is deleted and another program adds one", func(f *fakeNode) {
			delete(f.servers, at)
			f.servers[tcpServer("192.0.2.1:80")] = &fakeServer{}
		}, 1},
		{"a scheduler changes", func(f *fakeNode) { f.servers[at].scheduler = "lc" }, 1},
		{"persistence is added", func(f *fakeNode) { f.servers[at].flags, f.servers[at].timeout = flagPersistent, 60 }, 1},
		{"a destination is deleted", func(f *fakeNode) { delete(f.servers[at].dests, one) }, 1},
		{"a destination is added", func(f *fakeNode) { f.servers[at].dests[other] = &destination{weight: 1, nat: true} }, 1},
		{"a destination gets weight 0", func(f *fakeNode) { f.servers[at].dests[one].weight = 0 }, resyncRounds},
		{"a destination gets another weight", func(f *fakeNode) { f.servers[at].dests[one].weight = 5 }, resyncRounds},
		{"a destination is reached by a tunnel", func(f *fakeNode) { f.servers[at].dests[one].nat = false }, resyncRounds},
		{"a destination is replaced", func(f *fakeNode) {
			f.servers[at].dests[other] = f.servers[at].dests[one]
			delete(f.servers[at].dests, one)
		}, resyncRounds},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d, f := newFakeNode(t)
			f.skipOrderChecks = true // the checks are slow
			if err := d.Replace(t.Context(), dataplane.Node{}, sequence(webServices(t, services)...), nil); err != nil {
				t.Fatal(err)
			}
			tt.do(f)
			c := &countingIPVS{fakeIPVS: fakeIPVS{f}, read: map[serverKey]int{}}
			found := 0
			for round := range 2 * resyncRounds {
				if !verifyServersWith(t, d, c, round) {
					found = round + 1
					break
				}
			}
			if (tt.rounds == 0) != (found == 0) || found > tt.rounds {
				t.Errorf("found in resync %d, want at the latest in resync %d", found, tt.rounds)
			}
		})
	}
}

// TestLeftoverIPv6 checks that an IPv6 virtual server that an earlier process left at an internal
// address is deleted, although no IPv6 Service exists any more.
func TestLeftoverIPv6(t *testing.T) {
	t.Parallel()
	d, f := newFakeNode(t)
	left := tcpServer(netip.AddrPortFrom(internalNets()[1].Addr().Next(), 80).String())
	f.servers[left] = &fakeServer{}
	c := &countingIPVS{fakeIPVS: fakeIPVS{f}, read: map[serverKey]int{}}
	for round, intact := range []bool{false, true} {
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(webServices(t, 2)...), nil); err != nil {
			t.Fatal(err)
		}
		if verifyServersWith(t, d, c, round) != intact {
			t.Errorf("resync %d: intact %t, want %t", round, !intact, intact)
		}
	}
	if _, ok := f.servers[left]; ok {
		t.Errorf("%s remains", left)
	}
}

// TestVerifyBindings checks that missing and unexpected addresses are drift, except while routes or
// the Service change.
func TestVerifyBindings(t *testing.T) {
	t.Parallel()
	gone, other := netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("10.96.9.9")
	for _, tt := range []struct {
		name          string
		do            func(bound map[netip.Addr]bool)
		change        bool // the Service at the address changes meanwhile
		interruptions int
		want          bool
	}{
		{"all are bound", func(map[netip.Addr]bool) {}, false, 0, true},
		{"one is not bound", func(b map[netip.Addr]bool) { delete(b, gone) }, false, 0, false},
		{"one is not bound and the first dump was interrupted", func(b map[netip.Addr]bool) { delete(b, gone) }, false, 1, false},
		{"one is not bound and all dumps were interrupted", func(b map[netip.Addr]bool) { delete(b, gone) }, false, 2, true},
		{"one is not bound and its Service changes", func(b map[netip.Addr]bool) { delete(b, gone) }, true, 0, true},
		{"another one is bound", func(b map[netip.Addr]bool) { b[other] = true }, false, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d, f := newFakeNode(t)
			services := webServices(t, 300)
			if err := d.Replace(t.Context(), dataplane.Node{}, sequence(services...), nil); err != nil {
				t.Fatal(err)
			}
			tt.do(f.addrs)
			v := verification{Dataplane: d, pause: func() {}}
			defer v.endReads()
			reads := 0
			intact, err := v.verifyBindings(func(visit func(netip.Addr)) (bool, error) {
				for addr := range f.addrs {
					visit(addr)
				}
				if tt.change {
					d.mu.Lock()
					d.markDirty(serverKey{dataplane.TCP, services[1].Frontends[0].Addr})
					d.mu.Unlock()
				}
				reads++
				return reads <= tt.interruptions, nil
			})
			if err != nil || intact != tt.want {
				t.Errorf("intact %t, error %v, want %t", intact, err, tt.want)
			}
		})
	}
	d, _ := newFakeNode(t)
	v := verification{Dataplane: d, pause: func() {}}
	if _, err := v.verifyBindings(func(func(netip.Addr)) (bool, error) { return false, unix.ENOMEM }); err == nil {
		t.Error("no error although the routes cannot be read")
	}
}
