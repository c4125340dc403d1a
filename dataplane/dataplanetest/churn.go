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

// SoakVariable names the environment variable that, if not empty, makes the suite open a
// million connections while endpoints change. The default is some thousands.
const SoakVariable = "FAIRLEAD_SOAK"

// The pods serve each Service on its own port. With one port for both Services, two
// connections from the same client port to the two Services may reach one pod. If they do so
// at the same moment, the kernel drops one of the packets (__nf_conntrack_confirm in
// nf_conntrack_core.c).
const (
	plainPort  = 9000
	stickyPort = 9001
)

// minChanges is the number of changes during which clients at least open connections. An emulated
// machine makes few changes in the time of some thousand connections.
const minChanges = 10

// testChurn opens connections as fast as the machine can while the endpoints change as fast
// as the kernel accepts it: one by one, all at once, from one to all and back. The masquerade
// policy and the external traffic policy change with them. No connection is refused, and each
// reaches an endpoint that the Service had at some time while the connection was being
// opened.
//
// Very few connections may need a second SYN. A reused client port can hit what the pod's
// kernel remembers of the previous connection, and a busy machine can be late. About a
// thousand changes are made per second: if each lost packets, far more SYNs would be
// retransmitted.
//
// Session affinity is never switched on or off, because a packet that arrives during that
// change may be dropped.
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
	topo := newTopology(t, s, pods)
	st := &churn{topology: topo, t: t, minConnections: connections}
	for i := range pods {
		for _, family := range families() {
			st.serve(i, family, plainPort)
			st.serve(i, family, stickyPort)
		}
	}
	now := membership{dataplane.IPv4: 1<<pods - 1, dataplane.IPv6: 1<<pods - 1}
	st.history.record(now)
	topo.replace(st.services(now)...)
	st.shortenConntrackTimeouts() // Replace has loaded connection tracking

	var running sync.WaitGroup
	var done atomic.Bool
	begin := time.Now()
	for _, s := range st.services(now) {
		running.Go(func() {
			if err := topo.client.Do(func() error { return st.connectAll(s.Key.Family, s.Frontends[0].Addr) }); err != nil {
				t.Error(err)
			}
		})
	}
	go func() {
		running.Wait()
		done.Store(true)
	}()
	for !done.Load() {
		next := membership{}
		for _, family := range families() {
			next[family] = now[family].mutate(pods)
		}
		var list []dataplane.Change
		for _, s := range st.services(next) {
			list = append(list, dataplane.Change{Old: topo.programmed[s.Key], New: s})
		}
		st.history.record(membership{
			dataplane.IPv4: now[dataplane.IPv4] | next[dataplane.IPv4],
			dataplane.IPv6: now[dataplane.IPv6] | next[dataplane.IPv6],
		})
		topo.applyUnchecked(list)
		st.history.record(next)
		now = next
		st.changes.Add(1)
	}
	took := time.Since(begin)
	connections = st.opened.Load()
	t.Logf("%d connections in %v (%.0f per second) during %d changes", connections, took.Round(time.Millisecond),
		float64(connections)/took.Seconds(), st.changes.Load())
	if resent := st.resent.Load(); resent > allowedResends(connections) {
		t.Errorf("%d of %d connections needed a second SYN", resent, connections)
	} else if resent > 0 {
		t.Logf("%d connections needed a second SYN", resent)
	}
	topo.checkState("the churn")
}

// podSet is a set of pods with one bit per pod.
type podSet uint32

// mutate returns a random nonempty set: usually s with one pod added or removed, otherwise s
// with one pod replaced, a random set, one pod, or all pods.
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
		next = s&^(s&-s) | one // replace the lowest
	default:
		next = s ^ one
	}
	if next == 0 {
		return one
	}
	return next
}

// membership records which pods are endpoints in each family.
type membership map[dataplane.Family]podSet

// history records which pods were, or may have been, endpoints at each version of the desired
// state.
type history struct {
	version atomic.Uint64
	sets    [1 << 20]atomic.Uint64 // by version, modulo the length
}

// record starts a new version.
func (h *history) record(m membership) {
	next := h.version.Load() + 1
	h.sets[next%uint64(len(h.sets))].Store(uint64(m[dataplane.IPv4]) | uint64(m[dataplane.IPv6])<<32)
	h.version.Store(next)
}

// between returns the pods that may have been endpoints in any version in the range [from,
// to].
func (h *history) between(from, to uint64, family dataplane.Family) podSet {
	if to-from >= uint64(len(h.sets)) {
		return ^podSet(0) // overwritten: unknown
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

// churn is the state of one testChurn run.
type churn struct {
	*topology
	t              *testing.T
	history        history
	minConnections int64
	changes        atomic.Int64
	opened, failed atomic.Int64 // connections
	resent         atomic.Int64 // connections that needed a second SYN
}

// allowedResends returns how many connections may need a second SYN.
func allowedResends(connections int64) int64 { return 1 + connections/20_000 }

// shortenConntrackTimeouts makes connection tracking forget connections one second after they
// end. With the default timeouts, a client reuses its ports before the kernel forgets the old
// connection. The order of the old connection's last packets then decides whether a SYN
// counts as new (tcp_packet in nf_conntrack_proto_tcp.c); if not, it goes to the old
// connection's endpoint.
func (st *churn) shortenConntrackTimeouts() {
	st.t.Helper()
	err := st.net.Node.Do(func() error {
		for _, state := range []string{"fin_wait", "close_wait", "last_ack", "time_wait", "close"} {
			file := "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_" + state
			if err := os.WriteFile(file, []byte("1"), 0); err != nil {
				return fmt.Errorf("write sysctl: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		st.t.Fatal(err)
	}
}

// services returns two Services per family, one with and one without session affinity, that
// have these pods as endpoints and random policies.
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
		specFor := func(port uint16) dataplane.ServiceSpec {
			var endpoints []netip.AddrPort
			for _, addr := range addrs {
				endpoints = append(endpoints, netip.AddrPortFrom(addr, port))
			}
			spec := dataplane.ServiceSpec{Endpoints: localEndpoints(endpoints), Masquerade: masquerade}
			if local {
				spec.ExternalTrafficPolicyLocal, spec.LocalEndpoints = true, localEndpoints(endpoints[:1])
			}
			return spec
		}
		sticky := specFor(stickyPort)
		sticky.Affinity = time.Second
		services = append(services,
			st.serviceOfKind(dataplane.ClusterIP, "churn", dataplane.TCP, vip(family, 200, 80), specFor(plainPort)),
			st.serviceOfKind(dataplane.ClusterIP, "sticky-churn", dataplane.TCP, vip(family, 201, 80), sticky))
	}
	return services
}

// serve makes a pod accept connections and write its index to each.
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

// connectAll opens connections until all clients together have opened enough during enough
// changes. It runs in the namespace of the current thread. The server closes each connection and
// the client then resets it, so that neither side keeps state.
func (st *churn) connectAll(family dataplane.Family, addr netip.AddrPort) error {
	client := &nettest.IdentityClient{Timeout: 10 * time.Second}
	for st.opened.Load() < st.minConnections || st.changes.Load() < minChanges {
		st.opened.Add(1)
		from := st.history.version.Load()
		pod, resent, err := client.Connect(addr)
		allowed := st.history.between(from, st.history.version.Load(), family)
		if resent > 0 {
			st.resent.Add(1)
		}
		switch {
		case err != nil:
			err = fmt.Errorf("connection to %s: %w", addr, err)
		case allowed&(1<<pod) == 0:
			err = fmt.Errorf("connection to %s reached pod %d, want one of the set %0*b", addr, pod, bits.Len32(uint32(allowed)), allowed)
		default:
			continue
		}
		if st.failed.Add(1) == 10 {
			return fmt.Errorf("too many failures, the last is: %w", err)
		}
		st.t.Error(err)
	}
	return nil
}
