package dataplanetest

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// SoakVariable is the environment variable that has the suite open a million
// connections while endpoints come and go, where it is not empty. Without it
// some thousands have to do.
const SoakVariable = "FAIRLEAD_SOAK"

// The pods of a storm serve each Service on a port of its own. With one port for
// both, two connections from the same port of the client to the two Services may
// meet at one pod, and where they do so at the same moment, the kernel drops one of
// the packets (__nf_conntrack_confirm in nf_conntrack_core.c).
const (
	plainPort  = 9000
	stickyPort = 9001
)

// Connections are opened as fast as the machine can, while the endpoints of the
// Services change as fast as the kernel takes it: one by one, all at once, from
// one to all and back, and with them which clients are masqueraded and what they
// get from outside. None is refused, and each reaches an endpoint that the Service
// had at some time while it was being opened.
//
// Hardly any needs a second SYN, either. A few may: a port that a client uses again
// can meet what the pod's kernel remembers of the last connection from it, and a
// machine that is busy can be late by itself. What the changes lose would be far
// more, as a thousand of them are made a second.
//
// Affinity is there or not and stays so: a packet that comes while it is switched
// on or off may be dropped.
func (s suite) testChurn(t *testing.T) {
	t.Parallel()
	connections := int64(50_000)
	switch {
	case os.Getenv(SoakVariable) != "":
		connections = 1_000_000
	case testing.Short():
		connections = 5_000
	}
	const pods = 6
	w := newTopology(t, s, pods)
	st := &churn{topology: w, t: t, remaining: connections}
	for i := range pods {
		for _, family := range families() {
			st.serve(i, family, plainPort)
			st.serve(i, family, stickyPort)
		}
	}
	now := membership{dataplane.IPv4: 1<<pods - 1, dataplane.IPv6: 1<<pods - 1}
	st.history.record(now)
	w.replace(st.services(now)...)
	st.shortenConntrackTimeouts() // now that connection tracking is there

	var running sync.WaitGroup
	var done atomic.Bool
	begin := time.Now()
	for _, s := range st.services(now) {
		running.Go(func() {
			if err := w.client.Do(func() error { return st.connectAll(s.Key.Family, s.Frontends[0].Addr) }); err != nil {
				t.Error(err)
			}
		})
	}
	go func() {
		running.Wait()
		done.Store(true)
	}()
	changes := 0
	for !done.Load() {
		next := membership{}
		for _, family := range families() {
			next[family] = now[family].mutate(pods)
		}
		var list []dataplane.Change
		for _, s := range st.services(next) {
			list = append(list, dataplane.Change{Old: w.programmed[s.Key], New: s})
		}
		st.history.record(membership{
			dataplane.IPv4: now[dataplane.IPv4] | next[dataplane.IPv4],
			dataplane.IPv6: now[dataplane.IPv6] | next[dataplane.IPv6],
		})
		w.applyUnchecked(list)
		st.history.record(next)
		now = next
		changes++
	}
	took := time.Since(begin)
	t.Logf("%d connections in %v (%.0f a second) during %d changes", connections, took.Round(time.Millisecond),
		float64(connections)/took.Seconds(), changes)
	if again := st.resent.Load(); again > allowedResends(connections) {
		t.Errorf("%d of %d connections needed a second SYN", again, connections)
	} else if again > 0 {
		t.Logf("%d connections needed a second SYN", again)
	}
	if changes < 10 {
		t.Errorf("only %d changes during %d connections", changes, connections)
	}
	w.checkState("the storm")
}

// podSet is a set of pods, a bit each.
type podSet uint32

// mutate returns another set that is not empty: with one pod more or less or
// another one, or all of it anew, or a single one, or all.
func (s podSet) mutate(pods int) podSet {
	all, one := podSet(1)<<pods-1, podSet(1)<<rand.IntN(pods) //nolint:gosec // no secret
	var next podSet
	switch rand.IntN(8) { //nolint:gosec // no secret
	case 0:
		next = one
	case 1:
		next = all
	case 2:
		next = podSet(rand.Uint32()) & all //nolint:gosec // no secret
	case 3:
		next = s&^(s&-s) | one // the lowest is replaced
	default:
		next = s ^ one
	}
	if next == 0 {
		return one
	}
	return next
}

// membership says which pods are endpoints.
type membership map[dataplane.Family]podSet

// history is which pods were endpoints, or could be, at which time.
type history struct {
	version atomic.Uint64
	sets    [1 << 20]atomic.Uint64 // by time, which is counted in changes
}

// record starts a new time.
func (h *history) record(m membership) {
	next := h.version.Load() + 1
	h.sets[next%uint64(len(h.sets))].Store(uint64(m[dataplane.IPv4]) | uint64(m[dataplane.IPv6])<<32)
	h.version.Store(next)
}

// between returns the pods that could be endpoints at some time from one to the
// other.
func (h *history) between(from, to uint64, family dataplane.Family) podSet {
	if to-from >= uint64(len(h.sets)) {
		return ^podSet(0) // nobody knows any more
	}
	var all podSet
	for ; from <= to; from++ {
		v := h.sets[from%uint64(len(h.sets))].Load()
		if family == dataplane.IPv6 {
			v >>= 32
		}
		all |= podSet(v) //nolint:gosec // the lower half
	}
	return all
}

// churn is many connections.
type churn struct {
	*topology
	t         *testing.T
	history   history
	remaining int64 // connections, atomic
	failed    atomic.Int64
	resent    atomic.Int64 // connections that needed a second SYN
}

// allowedResends returns how many of the connections may need a second SYN.
func allowedResends(connections int64) int64 { return 1 + connections/20_000 }

// shortenConntrackTimeouts has connection tracking forget connections a second after their end.
// A client uses its ports again sooner than the kernel does so by itself, and then
// it depends on the order of the last packets of the old connection whether a SYN is
// taken for a new one (tcp_packet in nf_conntrack_proto_tcp.c): if it is not, it
// goes to where the old connection went.
func (st *churn) shortenConntrackTimeouts() {
	st.t.Helper()
	err := st.net.Node.Do(func() error {
		for _, state := range []string{"fin_wait", "close_wait", "last_ack", "time_wait", "close"} {
			file := "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_" + state
			if err := os.WriteFile(file, []byte("1"), 0); err != nil {
				return fmt.Errorf("set a sysctl: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		st.t.Fatal(err)
	}
}

// services returns two Services of each family, one with affinity and one without,
// that have these pods as endpoints, and else are what chance decides.
func (st *churn) services(pods membership) []*dataplane.Service {
	st.t.Helper()
	var services []*dataplane.Service
	for _, family := range families() {
		var addrs []netip.Addr
		for i, pod := range st.pods {
			if pods[family]&(1<<i) != 0 {
				addrs = append(addrs, addrOf(pod, family))
			}
		}
		masquerade := dataplane.Masquerade(rand.IntN(3)) //nolint:gosec // no secret
		local := rand.IntN(3) == 0                       //nolint:gosec // no secret
		to := func(port uint16) dataplane.ServiceSpec {
			var endpoints []netip.AddrPort
			for _, addr := range addrs {
				endpoints = append(endpoints, netip.AddrPortFrom(addr, port))
			}
			t := dataplane.ServiceSpec{Endpoints: localEndpoints(endpoints), Masquerade: masquerade}
			if local {
				t.ExternalTrafficPolicyLocal, t.LocalEndpoints = true, localEndpoints(endpoints[:1])
			}
			return t
		}
		sticky := to(stickyPort)
		sticky.Affinity = time.Second
		services = append(services,
			st.serviceOfKind(dataplane.ClusterIP, "storm", dataplane.TCP, vip(family, 200, 80), to(plainPort)),
			st.serviceOfKind(dataplane.ClusterIP, "sticky-storm", dataplane.TCP, vip(family, 201, 80), sticky))
	}
	return services
}

// serve has a pod accept connections and write its number to each.
func (st *churn) serve(i int, family dataplane.Family, port uint16) {
	st.t.Helper()
	server, err := st.pods[i].ServeIdentity(nettest.TCP, netip.AddrPortFrom(addrOf(st.pods[i], family), port), byte(i)) //nolint:gosec // fits
	if err != nil {
		st.t.Fatal(err)
	}
	st.t.Cleanup(func() {
		if err := server.Close(); err != nil {
			st.t.Error(err)
		}
	})
}

// connectAll opens connections until enough have been, in the namespace that the
// thread is in. The server ends each, and then the client resets it, so that neither
// has anything left of it.
func (st *churn) connectAll(family dataplane.Family, addr netip.AddrPort) error {
	client := &nettest.IdentityClient{Timeout: 10 * time.Second}
	for atomic.AddInt64(&st.remaining, -1) >= 0 {
		from := st.history.version.Load()
		pod, again, err := client.Connect(addr)
		allowed := st.history.between(from, st.history.version.Load(), family)
		if again > 0 {
			st.resent.Add(1)
		}
		switch {
		case err != nil:
			err = fmt.Errorf("connection to %s: %w", addr, err)
		case allowed&(1<<pod) == 0:
			err = fmt.Errorf("connection to %s reached pod %d; the endpoints were among %0*b", addr, pod, bits.Len32(uint32(allowed)), allowed)
		default:
			continue
		}
		if st.failed.Add(1) == 10 {
			return fmt.Errorf("too many failures, the last one: %w", err)
		}
		st.t.Error(err)
	}
	return nil
}
