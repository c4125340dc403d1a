package ipvs

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/nft"

	"golang.org/x/sys/unix"
)

// fakeNode is a node in memory. Its kernel answers like IPVS and routing, and can inject
// faults. It checks that its Dataplane keeps the order of changes.
type fakeNode struct {
	t *testing.T
	// fault returns the error to inject into an operation, or nil.
	fault func(what string) error

	servers map[serverKey]*fakeServer
	addrs   map[netip.Addr]bool
	// rules holds the nftables rules by frontend. droppedAddrs holds the addresses with a drop
	// rule.
	rules        map[dataplane.Frontend]fakeRule
	droppedAddrs map[netip.Addr]bool
	// translator returns the virtual servers of a Service.
	translator nft.Translator
	// requests records all requests. serverLists counts the reads of all virtual servers, and
	// destinationDumps the reads of the destinations of one virtual server.
	requests         []request
	serverLists      int
	destinationDumps int
	// bindings counts addresses that were bound or unbound, and ruleChanges the changes of Services
	// and addresses in the rules.
	bindings, ruleChanges int
	// loadedModules records the modules loaded. The kernel has their schedulers, rr and lc.
	loadedModules []string
	// skipOrderChecks disables checkOrder after a fault.
	skipOrderChecks bool
}

type fakeServer struct {
	settings

	dests map[netip.AddrPort]*destination
}

// fakeRule is the nftables rule of one frontend.
type fakeRule struct {
	*dataplane.Service

	cluster, local serverKey
}

// newFakeNode returns a fake node and its Dataplane, which does not resync.
func newFakeNode(t *testing.T) (*Dataplane, *fakeNode) {
	t.Helper()
	f := &fakeNode{
		t: t, fault: func(string) error { return nil },
		servers: map[serverKey]*fakeServer{}, addrs: map[netip.Addr]bool{}, rules: map[dataplane.Frontend]fakeRule{},
		droppedAddrs: map[netip.Addr]bool{},
	}
	return f.openDataplane(), f
}

// openDataplane returns a new Dataplane that has not read the node's state.
func (f *fakeNode) openDataplane() *Dataplane {
	d, err := newDataplane(Options{})
	if err != nil {
		f.t.Fatal(err)
	}
	f.translator = d
	d.ipvs, d.host, d.rules = fakeIPVS{f}, fakeHost{f}, fakeRules{f}
	d.loadModules = func(modules ...string) error {
		f.loadedModules = append(f.loadedModules, modules...)
		return f.fault("load modules")
	}
	return d
}

type fakeIPVS struct{ *fakeNode }

func (k fakeIPVS) run(requests []request) ([]error, error) {
	if err := k.fault("all requests"); err != nil {
		// Execute some of them.
		for _, r := range requests[:rand.IntN(len(requests))] {
			_ = k.executeOne(r)
		}
		return nil, err
	}
	answers := make([]error, len(requests))
	for i, r := range requests {
		k.requests = append(k.requests, r)
		if answers[i] = k.fault(r.String()); answers[i] == nil {
			answers[i] = k.executeOne(r)
		}
		k.checkOrder(r.String())
	}
	return answers, nil
}

// executeOne follows ip_vs_genl_set_cmd in net/netfilter/ipvs/ip_vs_ctl.c.
func (k fakeIPVS) executeOne(r request) error {
	s, exists := k.servers[r.serverKey]
	if !exists && r.command != newService {
		return unix.ESRCH
	}
	if r.scheduler != "" && r.scheduler != "rr" && r.scheduler != "lc" && !slices.Contains(k.loadedModules, "ip_vs_"+r.scheduler) {
		return unix.ENOENT
	}
	switch r.command {
	case newService:
		if exists {
			return unix.EEXIST
		}
		k.servers[r.serverKey] = &fakeServer{r.settings, map[netip.AddrPort]*destination{}}
	case setService:
		s.settings = r.settings
	case delService:
		delete(k.servers, r.serverKey)
	case newDest:
		if s.dests[r.dest] != nil {
			return unix.EEXIST
		}
		s.dests[r.dest] = &destination{weight: r.weight, nat: true}
	case setDest:
		if s.dests[r.dest] == nil {
			return unix.ENOENT
		}
		s.dests[r.dest].weight, s.dests[r.dest].nat = r.weight, true
	case delDest:
		if s.dests[r.dest] == nil {
			return unix.ENOENT
		}
		delete(s.dests, r.dest)
	case getService, getDest, setTimeouts:
		return unix.EINVAL
	}
	return nil
}

func (k fakeIPVS) countServers() (int, error) {
	count := 0
	for s := range k.servers {
		if s.family() == dataplane.IPv4 {
			count++
		}
	}
	return count, k.fault("count virtual servers")
}

func (k fakeIPVS) readServers(family dataplane.Family, visit func(serverKey, serverState)) (complete bool, count int, err error) {
	k.serverLists++
	if err := k.fault("read virtual servers"); err != nil {
		return false, 0, err
	}
	for s, h := range k.servers {
		if s.family() == family {
			visit(s, serverState{h.settings, len(h.dests)})
			count++
		}
	}
	return true, count, nil
}

func (k fakeIPVS) readDestinations(s serverKey, _ int) ([]addressedDestination, error) {
	found, err := k.dumpDestinations(s)
	var list []addressedDestination
	for addr, d := range found {
		list = append(list, addressedDestination{addr, d})
	}
	return list, err
}

// addMissing does nothing, because dumps are complete.
func (fakeIPVS) addMissing(map[serverKey]settings, iter.Seq[serverKey]) error { return nil }

func (k fakeIPVS) dumpServers() (map[serverKey]settings, error) {
	found := map[serverKey]settings{}
	for s, h := range k.servers {
		found[s] = h.settings
	}
	return found, k.fault("dump virtual servers")
}

func (k fakeIPVS) getServer(s serverKey) (settings, bool, error) {
	h, exists := k.servers[s]
	if !exists {
		return settings{}, false, k.fault("get a virtual server")
	}
	return h.settings, true, k.fault("get a virtual server")
}

func (k fakeIPVS) dumpDestinations(s serverKey) (map[netip.AddrPort]destination, error) {
	k.destinationDumps++
	found := map[netip.AddrPort]destination{}
	if h := k.servers[s]; h != nil {
		for addr, d := range h.dests {
			found[addr] = *d
		}
	}
	return found, k.fault("dump destinations")
}

func (k fakeIPVS) setTimeouts(_, _, _ time.Duration) error { return nil }
func (k fakeIPVS) close() error                            { return nil }

type fakeHost struct{ *fakeNode }

func (h fakeHost) setUp() error                       { return h.fault("set up") }
func (h fakeHost) setSysctls(map[string]string) error { return nil }
func (h fakeHost) linkIndex() int                     { return 1 }
func (h fakeHost) close() error                       { return nil }

func (h fakeHost) changeBindings(typ uint16, addrs []netip.Addr) ([]error, error) {
	h.bindings += len(addrs)
	answers := make([]error, len(addrs))
	for i, a := range addrs {
		if answers[i] = h.fault(fmt.Sprintf("bind %s", a)); answers[i] != nil {
			continue
		}
		if typ == unix.RTM_NEWROUTE {
			h.addrs[a] = true
		} else {
			delete(h.addrs, a)
		}
	}
	h.checkOrder("addresses")
	return answers, nil
}

func (h fakeHost) boundAddrs() (map[netip.Addr]bool, error) {
	return maps.Clone(h.addrs), h.fault("dump routes")
}

type fakeRules struct{ *fakeNode }

func (r fakeRules) Apply(_ context.Context, changes []dataplane.Change) error {
	r.ruleChanges += len(changes)
	failed := map[dataplane.Key]error{}
	// As in package nft, a failed Service makes the Services fail whose frontends it takes.
	previous := map[dataplane.Frontend]dataplane.Key{}
	for _, c := range changes {
		if c.Old == nil {
			continue
		}
		for _, f := range c.Old.Frontends {
			previous[f] = c.Key()
		}
	}
	for _, c := range changes {
		if err := r.fault("rules of " + c.Key().String()); err != nil {
			failed[c.Key()] = err
			if c.New != nil {
				for _, f := range c.New.Frontends {
					if k, ok := previous[f]; ok {
						failed[k] = err
					}
				}
			}
		}
	}
	for _, c := range changes {
		if failed[c.Key()] == nil && c.Old != nil {
			if addr, ok := nft.BoundAddressOf(c.Key()); ok {
				delete(r.droppedAddrs, addr)
				continue
			}
			for _, f := range c.Old.Frontends {
				delete(r.rules, f)
			}
		}
	}
	for _, c := range changes {
		if failed[c.Key()] != nil || c.New == nil {
			continue
		}
		for _, f := range c.New.Frontends {
			if _, exists := r.rules[f]; exists {
				failed[c.Key()] = fmt.Errorf("element of %s: %w", f, unix.EEXIST)
			}
		}
		if failed[c.Key()] == nil {
			r.add(c.New)
		}
	}
	r.checkOrder("changing the rules")
	if len(failed) > 0 {
		return &dataplane.Error{Op: "apply", Failed: failed}
	}
	return nil
}

func (r fakeRules) add(s *dataplane.Service) {
	if addr, ok := nft.BoundAddressOf(s.Key); ok {
		r.droppedAddrs[addr] = true
		return
	}
	cluster, local := r.translator.VirtualServers(s)
	for _, f := range s.Frontends {
		rule := fakeRule{s, serverKey{f.Protocol, cluster}, serverKey{f.Protocol, local}}
		if !cluster.IsValid() {
			rule.cluster.addr = f.Addr
		}
		r.rules[f] = rule
	}
}

func (r fakeRules) Replace(_ context.Context, _ dataplane.Node, services iter.Seq[*dataplane.Service], _ func(int)) error {
	if err := r.fault("all rules"); err != nil {
		return err
	}
	clear(r.rules)
	clear(r.droppedAddrs)
	for s := range services {
		r.add(s)
	}
	r.checkOrder("replacing the rules")
	return nil
}

func (r fakeRules) ReadVirtualBindings(context.Context) (map[dataplane.Frontend]nft.VirtualBinding, error) {
	return nil, errors.New("not supported by the fake")
}
func (r fakeRules) Drift() <-chan struct{}      { return nil }
func (r fakeRules) Lost() <-chan struct{}       { return nil }
func (r fakeRules) GiveWay(time.Duration) error { return nil }
func (r fakeRules) OwnsTables() bool            { return false }
func (r fakeRules) Close() error                { return nil }

// checkOrder fails the test if the rules send connections to a virtual server without
// destinations, or if an address lacks its drop rule.
func (f *fakeNode) checkOrder(after string) {
	if f.skipOrderChecks {
		return
	}
	isServed := func(s serverKey) bool {
		h := f.servers[s]
		if h == nil || !isInternal(s.addr.Addr()) && !f.addrs[s.addr.Addr()] {
			return false
		}
		for _, d := range h.dests {
			if d.weight > 0 {
				return true
			}
		}
		return false
	}
	for at, rule := range f.rules {
		if len(rule.Endpoints) > 0 && !isServed(rule.cluster) || len(rule.LocalEndpoints) > 0 && !isServed(rule.local) {
			f.t.Errorf("after %s connections to %s reach no endpoint", after, at)
		}
	}
	for s := range f.servers {
		if addr := s.addr.Addr(); !f.droppedAddrs[addr] && !isInternal(addr) {
			f.t.Errorf("after %s the virtual server %s has no drop rule for its address", after, s)
		}
	}
	for addr := range f.addrs {
		if !f.droppedAddrs[addr] {
			f.t.Errorf("after %s the address %s is bound without a drop rule", after, addr)
		}
	}
}

// expect fails the test unless exactly these Services are programmed. It ignores failed
// Services. Other virtual servers must be draining.
func (f *fakeNode) expect(when string, services map[dataplane.Key]*dataplane.Service, failed map[dataplane.Key]error) {
	f.t.Helper()
	var want, got []string
	for k, s := range services {
		if failed[k] != nil {
			continue
		}
		for _, at := range s.Frontends {
			text := at.String() + " " + s.Key.String() + " " + s.String() + " ->"
			for _, e := range s.Endpoints {
				text += " " + e.Addr.String()
			}
			text += " ->"
			for _, e := range s.LocalEndpoints {
				text += " " + e.Addr.String()
			}
			want = append(want, text)
		}
	}
	used, bound := map[serverKey]bool{}, map[netip.Addr]bool{}
	activeDests := func(s serverKey) string {
		used[s] = true
		h := f.servers[s]
		if h == nil {
			return " no virtual server " + s.String()
		}
		if !isInternal(s.addr.Addr()) {
			bound[s.addr.Addr()] = true
		}
		text := ""
		for _, addr := range slices.SortedFunc(maps.Keys(h.dests), netip.AddrPort.Compare) {
			if d := h.dests[addr]; d.weight == 1 && d.nat {
				text += " " + addr.String()
			} else if d.weight != 0 {
				text += fmt.Sprintf(" %s=%d", addr, d.weight)
			}
		}
		return text
	}
	for at, rule := range f.rules {
		if failed[rule.Key] != nil {
			continue
		}
		text := at.String() + " " + rule.Key.String() + " " + rule.String() + " ->" + activeDests(rule.cluster) + " ->"
		if rule.ExternalTrafficPolicyLocal {
			text += activeDests(rule.local)
		}
		got = append(got, text)
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(want, got) {
		f.t.Errorf("%s the kernel has\n%s\nwant\n%s", when, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if len(failed) > 0 {
		return
	}
	for s, h := range f.servers {
		if used[s] {
			continue
		}
		if len(h.dests) == 0 {
			f.t.Errorf("%s the virtual server %s was not deleted", when, s)
		}
		if text := activeDests(s); text != "" {
			f.t.Errorf("%s the virtual server %s was not deleted and has%s", when, s, text)
		}
	}
	if !maps.Equal(bound, f.addrs) {
		f.t.Errorf("%s the addresses %v are bound, want %v", when, f.addrs, bound)
	}
	if !maps.Equal(bound, f.droppedAddrs) {
		f.t.Errorf("%s the addresses %v have drop rules, want %v", when, f.droppedAddrs, bound)
	}
}
