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

// fake is a node in memory, whose kernel answers as IPVS and routing do, and which
// can be made to fail. It holds its Dataplane to the order of a change.
type fake struct {
	t *testing.T
	// fault returns the error of something that is asked of it, or nil.
	fault func(what string) error

	held  map[server]*heldServer
	addrs map[netip.Addr]bool
	// open are the rules, by frontend, and guarded the addresses whose other
	// connections they drop.
	open    map[dataplane.Frontend]openRule
	guarded map[netip.Addr]bool
	// translator is asked where connections go.
	translator nft.Translator
	// asked are all requests, and read the lists of destinations that were asked for.
	asked []request
	read  int
	// loaded are the modules that it was told to load. It has the schedulers of these,
	// rr and lc.
	loaded []string
	// wild is set while the order of things does not count, as something has failed.
	wild bool
}

type heldServer struct {
	settings

	dests map[netip.AddrPort]*destination
}

// openRule is what the rules do with the connections to a frontend.
type openRule struct {
	*dataplane.Service

	cluster, local server
}

// inMemory returns a Dataplane of a node in memory. It does not patrol.
func inMemory(t *testing.T) (*Dataplane, *fake) {
	t.Helper()
	f := &fake{
		t: t, fault: func(string) error { return nil },
		held: map[server]*heldServer{}, addrs: map[netip.Addr]bool{}, open: map[dataplane.Frontend]openRule{},
		guarded: map[netip.Addr]bool{},
	}
	return f.start(), f
}

// start returns a Dataplane that knows nothing of the node yet.
func (f *fake) start() *Dataplane {
	d, err := newDataplane(Options{})
	if err != nil {
		f.t.Fatal(err)
	}
	f.translator = d
	d.kernel, d.host, d.rules = fakeKernel{f}, fakeHost{f}, fakeRules{f}
	d.load = func(modules ...string) error {
		f.loaded = append(f.loaded, modules...)
		return f.fault("load modules")
	}
	return d
}

type fakeKernel struct{ *fake }

func (k fakeKernel) run(requests []request) ([]error, error) {
	if err := k.fault("all requests"); err != nil {
		// Some have been carried out.
		for _, r := range requests[:rand.IntN(len(requests))] {
			_ = k.carryOut(r)
		}
		return nil, err
	}
	answers := make([]error, len(requests))
	for i, r := range requests {
		k.asked = append(k.asked, r)
		if answers[i] = k.fault(r.String()); answers[i] == nil {
			answers[i] = k.carryOut(r)
		}
		k.checkOrder(r.String())
	}
	return answers, nil
}

// carryOut is net/netfilter/ipvs/ip_vs_ctl.c, ip_vs_genl_set_cmd.
func (k fakeKernel) carryOut(r request) error {
	s, there := k.held[r.server]
	if !there && r.command != newService {
		return unix.ESRCH
	}
	if r.scheduler != "" && r.scheduler != "rr" && r.scheduler != "lc" && !slices.Contains(k.loaded, "ip_vs_"+r.scheduler) {
		return unix.ENOENT
	}
	switch r.command {
	case newService:
		if there {
			return unix.EEXIST
		}
		k.held[r.server] = &heldServer{r.settings, map[netip.AddrPort]*destination{}}
	case setService:
		s.settings = r.settings
	case delService:
		delete(k.held, r.server)
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

// complete finds nothing more: all that there are have been listed.
func (fakeKernel) complete(map[server]settings, iter.Seq[server]) error { return nil }

func (k fakeKernel) servers() (map[server]settings, error) {
	found := map[server]settings{}
	for s, h := range k.held {
		found[s] = h.settings
	}
	return found, k.fault("list the virtual servers")
}

func (k fakeKernel) destinations(s server) (map[netip.AddrPort]destination, error) {
	k.read++
	found := map[netip.AddrPort]destination{}
	if h := k.held[s]; h != nil {
		for addr, d := range h.dests {
			found[addr] = *d
		}
	}
	return found, k.fault("list the destinations")
}

func (k fakeKernel) setTimeouts(_, _, _ time.Duration) error { return nil }
func (k fakeKernel) close() error                            { return nil }

type fakeHost struct{ *fake }

func (h fakeHost) setUp() error                   { return h.fault("set up") }
func (h fakeHost) sysctl(map[string]string) error { return nil }
func (h fakeHost) linkIndex() int                 { return 1 }
func (h fakeHost) close() error                   { return nil }

func (h fakeHost) bind(typ uint16, addrs []netip.Addr) ([]error, error) {
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

func (h fakeHost) bound() (map[netip.Addr]bool, error) {
	return maps.Clone(h.addrs), h.fault("list the routes")
}

type fakeRules struct{ *fake }

func (r fakeRules) Apply(_ context.Context, changes []dataplane.Change) error {
	failed := map[dataplane.Key]error{}
	// As with nftables, a Service fails with those that it takes frontends from.
	losers := map[dataplane.Frontend]dataplane.Key{}
	for _, c := range changes {
		if c.Old == nil {
			continue
		}
		for _, f := range c.Old.Frontends {
			losers[f] = c.Key()
		}
	}
	for _, c := range changes {
		if err := r.fault("rules of " + c.Key().String()); err != nil {
			failed[c.Key()] = err
			if c.New != nil {
				for _, f := range c.New.Frontends {
					if k, ok := losers[f]; ok {
						failed[k] = err
					}
				}
			}
		}
	}
	for _, c := range changes {
		if failed[c.Key()] == nil && c.Old != nil {
			if addr, ok := nft.BoundAddressOf(c.Key()); ok {
				delete(r.guarded, addr)
				continue
			}
			for _, f := range c.Old.Frontends {
				delete(r.open, f)
			}
		}
	}
	for _, c := range changes {
		if failed[c.Key()] != nil || c.New == nil {
			continue
		}
		for _, f := range c.New.Frontends {
			if _, there := r.open[f]; there {
				failed[c.Key()] = fmt.Errorf("the element of %s: %w", f, unix.EEXIST)
			}
		}
		if failed[c.Key()] == nil {
			r.put(c.New)
		}
	}
	r.checkOrder("the rules")
	if len(failed) > 0 {
		return &dataplane.Error{Op: "apply", Failed: failed}
	}
	return nil
}

func (r fakeRules) put(s *dataplane.Service) {
	if addr, ok := nft.BoundAddressOf(s.Key); ok {
		r.guarded[addr] = true
		return
	}
	cluster, local := r.translator.VirtualServers(s)
	for _, f := range s.Frontends {
		rule := openRule{s, server{f.Protocol, cluster}, server{f.Protocol, local}}
		if !cluster.IsValid() {
			rule.cluster.addr = f.Addr
		}
		r.open[f] = rule
	}
}

func (r fakeRules) Replace(_ context.Context, _ dataplane.Node, services iter.Seq[*dataplane.Service], _ func(int)) error {
	if err := r.fault("all rules"); err != nil {
		return err
	}
	clear(r.open)
	clear(r.guarded)
	for s := range services {
		r.put(s)
	}
	r.checkOrder("all rules")
	return nil
}

func (r fakeRules) ReadRules(context.Context) (map[dataplane.Frontend]nft.Rule, error) {
	return nil, errors.New("not in memory")
}
func (r fakeRules) Drift() <-chan struct{}      { return nil }
func (r fakeRules) Lost() <-chan struct{}       { return nil }
func (r fakeRules) GiveWay(time.Duration) error { return nil }
func (r fakeRules) OwnsTables() bool            { return false }
func (r fakeRules) Close() error                { return nil }

// checkOrder fails the test if connections are led to where nobody takes them, or
// to an address without rules.
func (f *fake) checkOrder(after string) {
	if f.wild {
		return
	}
	taken := func(s server) bool {
		h := f.held[s]
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
	for at, rule := range f.open {
		if len(rule.Endpoints) > 0 && !taken(rule.cluster) || len(rule.LocalEndpoints) > 0 && !taken(rule.local) {
			f.t.Errorf("after %s connections to %s reach no endpoint", after, at)
		}
	}
	for s := range f.held {
		if addr := s.addr.Addr(); !f.guarded[addr] && !isInternal(addr) {
			f.t.Errorf("after %s the virtual server %s is there without a drop rule for its address", after, s)
		}
	}
	for addr := range f.addrs {
		if !f.guarded[addr] {
			f.t.Errorf("after %s %s is bound without a drop rule", after, addr)
		}
	}
}

// expect fails the test unless exactly these Services are served, but for those that
// have failed, of which it knows nothing. Other virtual servers must be leaving.
func (f *fake) expect(when string, services map[dataplane.Key]*dataplane.Service, failed map[dataplane.Key]error) {
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
	used, bound := map[server]bool{}, map[netip.Addr]bool{}
	takers := func(s server) string {
		used[s] = true
		h := f.held[s]
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
	for at, rule := range f.open {
		if failed[rule.Key] != nil {
			continue
		}
		text := at.String() + " " + rule.Key.String() + " " + rule.String() + " ->" + takers(rule.cluster) + " ->"
		if rule.ExternalLocal {
			text += takers(rule.local)
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
	for s, h := range f.held {
		if used[s] {
			continue
		}
		if len(h.dests) == 0 {
			f.t.Errorf("%s the virtual server %s is left", when, s)
		}
		if text := takers(s); text != "" {
			f.t.Errorf("%s the virtual server %s is left with%s", when, s, text)
		}
	}
	if !maps.Equal(bound, f.addrs) {
		f.t.Errorf("%s the addresses %v are bound, want %v", when, f.addrs, bound)
	}
	if !maps.Equal(bound, f.guarded) {
		f.t.Errorf("%s the addresses %v have drop rules, want %v", when, f.guarded, bound)
	}
}
