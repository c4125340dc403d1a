package nft

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// observer looks, after each commit of a Dataplane, at what another one reads.
type observer struct {
	t        *testing.T
	reader   *Dataplane
	old, new dataplane.State
	commits  int
	// faultAt is asked before each commit what is to become of it.
	faultAt func(commit int) fault
}

type fault int

const (
	noFault       fault = iota
	rejectElement       // the kernel refuses what the commit says
	rejectCommit        // the kernel refuses the commit as such
	loseAck             // the kernel takes it, but nobody hears of that
)

var errAckLost = errors.New("the answer was lost")

// observeCommits makes the Dataplane commit little at a time, before the eyes of an
// observer.
func observeCommits(t *testing.T, d *Dataplane, ns *nettest.Namespace) *observer {
	t.Helper()
	o := &observer{t: t, reader: openInNamespace(t, ns, translatorOf(d)), faultAt: func(int) fault { return noFault }}
	d.transactionSize = 6
	d.flush = func() error {
		before := generation(t, o.reader)
		f := o.faultAt(o.commits)
		switch f {
		case rejectElement:
			_ = d.conn.SetDeleteElements(d.tables[0].services, []element{{Key: []byte{1, 2, 3, 4}}})
		case rejectCommit:
			d.conn.DelChain(d.missingChain())
		case noFault, loseAck:
		}
		err := d.conn.Flush()
		if f == loseAck && err == nil {
			err = errAckLost
		}
		if generation(t, o.reader) != before {
			o.commits++
			o.checkState()
		}
		return err
	}
	return o
}

// missingChain is a chain that is not there.
func (d *Dataplane) missingChain() *nftables.Chain {
	return &nftables.Chain{Name: "nobody", Table: d.tables[0].nf}
}

// checkState checks that each Service is as it was, as it is to be, or of the same
// number of endpoints with some old and some new, and that none is missing that
// was there and is to stay.
func (o *observer) checkState() {
	o.t.Helper()
	got, err := o.reader.Read(o.t.Context())
	if err != nil {
		o.t.Fatal(err)
	}
	for f := range got {
		if _, was := o.old[f]; !was {
			if _, willBe := o.new[f]; !willBe {
				o.t.Errorf("commit %d: %s is nobody's", o.commits, f)
			}
		}
	}
	for _, state := range []dataplane.State{o.old, o.new} {
		for f := range state {
			if err := o.checkFrontend(got, f); err != nil {
				o.t.Errorf("commit %d: %s: %v", o.commits, f, err)
			}
		}
	}
}

func (o *observer) checkFrontend(got dataplane.State, f dataplane.Frontend) error {
	g, there := got[f]
	was, before := o.old[f]
	is, after := o.new[f]
	switch {
	case !there && before && after:
		return errors.New("is missing, and was to stay")
	case !there, before && g.Equal(was), after && g.Equal(is), o.matchesSharedLists(g, was, is):
		return nil
	case !before:
		return fmt.Errorf("is seen before it is complete: %s, want %s", g.ServiceSpec, is.ServiceSpec)
	case !after:
		return fmt.Errorf("is seen while it goes: %s, had %s", g.ServiceSpec, was.ServiceSpec)
	}
	for _, like := range []dataplane.ServiceSpec{was.ServiceSpec, is.ServiceSpec} {
		if stripLists(g.ServiceSpec).Equal(stripLists(like)) && len(g.Endpoints) == len(like.Endpoints) &&
			len(g.LocalEndpoints) == len(like.LocalEndpoints) &&
			containsAll(g.Endpoints, was.Endpoints, is.Endpoints) && containsAll(g.LocalEndpoints, was.LocalEndpoints, is.LocalEndpoints) &&
			!slices.ContainsFunc(like.SourceRanges, func(p netip.Prefix) bool {
				return slices.Contains(was.SourceRanges, p) && slices.Contains(is.SourceRanges, p) && !slices.Contains(g.SourceRanges, p)
			}) {
			return nil
		}
	}
	return fmt.Errorf("is %s, neither like %s nor like %s", g.ServiceSpec, was.ServiceSpec, is.ServiceSpec)
}

// matchesSharedLists reports whether a frontend is one of several of its Service, and has lists of
// endpoints that others have before or after: each list changes for all frontends that
// share it at once, while each has the rest of its Treatment by itself.
func (o *observer) matchesSharedLists(got, was, is dataplane.Binding) bool {
	var all []dataplane.ServiceSpec
	for _, state := range []dataplane.State{o.old, o.new} {
		var same []dataplane.ServiceSpec
		for _, b := range state {
			if b.Service == got.Service {
				same = append(same, b.ServiceSpec)
			}
		}
		if len(same) > 1 {
			all = append(all, same[0])
		}
	}
	rest := []dataplane.ServiceSpec{was.ServiceSpec, is.ServiceSpec}
	like := func(list func(dataplane.ServiceSpec) []dataplane.Endpoint) bool {
		endpoints, known := list(got.ServiceSpec), slices.Concat(list(was.ServiceSpec), list(is.ServiceSpec))
		for _, t := range all {
			known = append(known, list(t)...)
		}
		return slices.ContainsFunc(all, func(t dataplane.ServiceSpec) bool {
			return len(endpoints) == len(list(t)) && containsAll(endpoints, known)
		})
	}
	return slices.ContainsFunc(rest, func(t dataplane.ServiceSpec) bool { return stripLists(got.ServiceSpec).Equal(stripLists(t)) }) &&
		like(func(t dataplane.ServiceSpec) []dataplane.Endpoint { return t.Endpoints }) &&
		(!got.ExternalTrafficPolicyLocal || like(func(t dataplane.ServiceSpec) []dataplane.Endpoint { return t.LocalEndpoints }))
}

// stripLists returns what of a Treatment changes all at once.
func stripLists(t dataplane.ServiceSpec) dataplane.ServiceSpec {
	t.Endpoints, t.LocalEndpoints, t.SourceRanges = nil, nil, nil
	return t
}

// containsAll reports whether all endpoints are in one or the other list.
func containsAll(endpoints []dataplane.Endpoint, lists ...[]dataplane.Endpoint) bool {
	addrs := map[netip.AddrPort]bool{}
	for _, e := range slices.Concat(lists...) {
		addrs[e.Addr] = true
	}
	return !slices.ContainsFunc(endpoints, func(e dataplane.Endpoint) bool { return !addrs[e.Addr] })
}

// wantNoGarbage fails the test unless the kernel holds these Services and no garbage,
// and a restart changes nothing.
func wantNoGarbage(t *testing.T, d *Dataplane, ns *nettest.Namespace, node dataplane.Node, services []*dataplane.Service) {
	t.Helper()
	wantState(t, d, services...)
	for _, table := range d.tables {
		c, err := d.readSets(t.Context(), table)
		if err != nil {
			t.Fatal(err)
		}
		for f, r := range c.frontends {
			if !r.inServices {
				t.Errorf("table %s has garbage of %s: %+v", table, f, r)
			}
		}
		for n, l := range c.sharedLists {
			used := func(f dataplane.Frontend) bool { return c.frontends[f].listID == n }
			if !slices.ContainsFunc(slices.Collect(maps.Keys(c.frontends)), used) {
				t.Errorf("table %s has garbage of list %d: %+v", table, n, l)
			}
		}
	}
	before := generation(t, d)
	again := openInNamespace(t, ns, translatorOf(d))
	again.now, again.minSharedFrontends = d.now, d.minSharedFrontends
	mustReplace(t, again, node, services...)
	if generation(t, d) != before {
		t.Error("a Replace by the same Services changed the ruleset")
	}
}

// TestStepOrder has Services that are too large for one commit appear,
// change in every way, and go, by Apply and by Replace.
func TestStepOrder(t *testing.T) {
	t.Parallel()
	for name, translator := range testTranslators() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testStepOrder(t, translator)
		})
	}
}

func testStepOrder(t *testing.T, translator Translator) {
	t.Helper()
	d, ns := newDataplane(t, translator)
	mustReplace(t, d, nodeWithPodCIDRs())
	o := observeCommits(t, d, ns)
	var have []*dataplane.Service
	for seed := range uint64(8) {
		random := rand.New(rand.NewPCG(seed, 8))
		want := randomServices(t, random, 8)
		if seed%4 == 3 {
			want = nil
		}
		o.old, o.new = expectedState(d, have), expectedState(d, want)
		if seed%2 == 0 {
			mustReplace(t, d, nodeWithPodCIDRs(), want...)
		} else {
			mustApply(t, d, changesBetween(have, want)...)
		}
		have = want
		wantNoGarbage(t, d, ns, nodeWithPodCIDRs(), have)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	if o.commits < 50 {
		t.Errorf("%d commits: they are not small", o.commits)
	}
}

// TestInterruptedCommits has commits fail in the midst of large changes. Services are
// complete or not there all the same, those that a call does not name have taken,
// and the next Replace leaves nothing but what is wanted.
func TestInterruptedCommits(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	mustReplace(t, d, nodeWithPodCIDRs())
	var have []*dataplane.Service
	failures := 0
	for seed := range uint64(10) {
		random := rand.New(rand.NewPCG(seed, 9))
		want := randomServices(t, random, 6)
		o := observeCommits(t, d, ns)
		o.old, o.new = dataplane.StateOf(slices.Values(have)), dataplane.StateOf(slices.Values(want))
		at, what := random.IntN(30), []fault{rejectElement, rejectCommit, loseAck}[random.IntN(3)]
		failed := false
		o.faultAt = func(commit int) fault {
			if failed || commit < at {
				return noFault
			}
			failed = true
			return what
		}
		call := func(services []*dataplane.Service) error {
			if seed%2 == 0 {
				return d.Replace(t.Context(), nodeWithPodCIDRs(), slices.Values(services), nil)
			}
			return d.Apply(t.Context(), changesBetween(have, services))
		}
		err := call(want)
		if failed {
			failures++
		} else if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if keys, ok := errors.AsType[*dataplane.Error](err); ok {
			got, err := o.reader.Read(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range want {
				for _, f := range s.Frontends {
					if b := got[f]; keys.Failed[s.Key] == nil && !b.ServiceSpec.Equal(s.ServiceSpec) {
						t.Errorf("%s has taken, and %s is %s, want %s", s.Key, f, b.ServiceSpec, s.ServiceSpec)
					}
				}
			}
		}
		// What was to stay may be either now, so it is not looked at on the way.
		d = openInNamespace(t, ns)
		mustReplace(t, d, nodeWithPodCIDRs(), want...)
		wantNoGarbage(t, d, ns, nodeWithPodCIDRs(), want)
		have = want
		if t.Failed() {
			t.Fatalf("seed %d: %d at commit %d, error %v", seed, what, at, err)
		}
	}
	if failures < 5 {
		t.Errorf("only %d calls failed", failures)
	}
}

// TestLargestService has the Service with the most endpoints there can be come,
// change, shrink and go, beside another, in commits of the ordinary size.
func TestLargestService(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	list := make([]dataplane.Endpoint, dataplane.MaxEndpoints)
	for i := range list {
		list[i] = dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 8080), Local: i%100 == 0}
	}
	other := service(t, "other", []dataplane.Frontend{frontend(1)}, endpoints(1, 2))
	largest := func(list []dataplane.Endpoint) *dataplane.Service {
		return service(t, "largest", []dataplane.Frontend{frontend(2)}, slices.Clone(list))
	}
	mustReplace(t, d, nodeWithPodCIDRs(), other)
	before := generation(t, d)
	full := largest(list)
	mustApply(t, d, dataplane.Change{New: full})
	if commits := generation(t, d) - before; int(commits) < len(list)/transactionSize {
		t.Errorf("%d endpoints took %d commits", len(list), commits)
	}
	wantState(t, d, other, full)
	half := largest(list[:len(list)/2])
	mustApply(t, d, dataplane.Change{Old: full, New: half})
	wantState(t, d, other, half)
	rest := largest(list[len(list)/2:])
	mustReplace(t, d, nodeWithPodCIDRs(), other, rest)
	wantNoGarbage(t, d, ns, nodeWithPodCIDRs(), []*dataplane.Service{other, rest})
	mustApply(t, d, dataplane.Change{Old: rest})
	wantNoGarbage(t, d, ns, nodeWithPodCIDRs(), []*dataplane.Service{other})
}

// TestReplaceProgress: Replace tells after each commit how many Services are complete,
// those that were before among them, and none that has failed.
func TestReplaceProgress(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	var services []*dataplane.Service
	for i := range 40 {
		services = append(services, service(t, fmt.Sprintf("s-%d", i), []dataplane.Frontend{frontend(i)}, endpoints(1, 2, 3)))
	}
	with := func(more ...*dataplane.Service) []*dataplane.Service { return slices.Concat(services, more) }
	tooMany := make([]dataplane.Endpoint, maxEndpointIDs+1)
	unsupported := service(t, "unsupported", []dataplane.Frontend{frontend(98)}, nil)
	unsupported.Affinity, unsupported.Endpoints = 3600e9, tooMany
	for _, step := range []struct {
		name     string
		services []*dataplane.Service
		failed   int
		steps    int // at least
	}{
		{"none", nil, 0, 0},
		{"some fail", with(rejectedService("poison", frontend(99)), unsupported), 2, 5},
		{"all are there", services, 0, 5},
		{"one is new", with(service(t, "new", []dataplane.Frontend{frontend(97)}, endpoints(1))), 0, 5},
	} {
		d.transactionSize = 20
		o := openInNamespace(t, ns)
		var told []int
		err := d.Replace(t.Context(), nodeWithPodCIDRs(), slices.Values(step.services), func(complete int) {
			told = append(told, complete)
			got, err := o.Read(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range step.services[:min(complete, len(services))] {
				if !got[s.Frontends[0]].ServiceSpec.Equal(s.ServiceSpec) {
					t.Errorf("%s: %d are said to be complete, and %s is not", step.name, complete, s.Key)
				}
			}
		})
		var failure *dataplane.Error
		if errors.As(err, &failure) != (step.failed > 0) || failure != nil && len(failure.Failed) != step.failed {
			t.Fatalf("%s: error %v, want %d failed", step.name, err, step.failed)
		}
		if !slices.IsSorted(told) || len(told) < step.steps {
			t.Errorf("%s: told %v, want at least %d steps, none backwards", step.name, told, step.steps)
		}
		if want := len(step.services) - step.failed; want > 0 && (len(told) == 0 || told[len(told)-1] != want) {
			t.Errorf("%s: told %v, want %d at the end", step.name, told, want)
		}
	}
}

// TestFaultInjection keeps the tests above honest.
func TestFaultInjection(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	mustReplace(t, d, nodeWithPodCIDRs())
	for what, want := range map[fault]error{rejectElement: unix.EINVAL, rejectCommit: unix.ENOENT, loseAck: errAckLost} {
		o := observeCommits(t, d, ns)
		o.new = dataplane.StateOf(slices.Values([]*dataplane.Service{service(t, "s", []dataplane.Frontend{frontend(1)}, endpoints(1))}))
		o.faultAt = func(int) fault { return what }
		err := d.Apply(t.Context(), []dataplane.Change{{New: service(t, "s", []dataplane.Frontend{frontend(1)}, endpoints(1))}})
		if !errors.Is(err, want) {
			t.Errorf("fault %d: error %v, want %v", what, err, want)
		}
		d.flush = d.conn.Flush
		mustReplace(t, d, nodeWithPodCIDRs())
	}
}

// TestStepSize takes apart what no Service has much of as a rule: frontends,
// and endpoints that have a port each. No step is much larger than it should be, the
// classes of a frontend are all in one, and together the steps are the whole.
func TestStepSize(t *testing.T) {
	t.Parallel()
	const many = 2000
	var frontends []dataplane.Frontend
	var list []dataplane.Endpoint
	for i := range many {
		addr := netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)})
		frontends = append(frontends, dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(addr, 80)})
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, uint16(1+i))})
	}
	of := func(frontends []dataplane.Frontend, treatment dataplane.ServiceSpec) *dataplane.Service {
		key := dataplane.Key{Namespace: "default", Name: "much", Family: dataplane.IPv4, Kind: dataplane.ExternalIP}
		s, err := dataplane.NewService(key, slices.Clone(frontends), treatment)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	full := dataplane.ServiceSpec{Endpoints: endpoints(1), ExternalTrafficPolicyLocal: true, LocalEndpoints: endpoints(1), Affinity: time.Hour}
	for name, s := range map[string]*dataplane.Service{
		"frontends": of(frontends, full),
		"ports":     of(frontends[:1], dataplane.ServiceSpec{Endpoints: list}),
	} {
		r := render(s, assignServiceSlots(slotAssignment{}, s), nodeWithAllSettings())
		for what, rows := range map[string][2]*frontendElements{"come": {nil, r}, "go": {r, nil}} {
			whole := &batch{}
			for i, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
				whole.tables[i].table = newTable(family)
			}
			for _, f := range s.Frontends {
				whole.diffFrontend(f, rows[0], rows[1])
			}
			const size = 100
			together := &tableDiff{addrs: newAddrCounts(), verdictElements: map[verdictElement]int{}, elementDiff: elementDiff{ports: portCounts{}}}
			in := map[string]int{} // classes are in which step
			n := 0
			for step := range whole.steps(size) {
				if got := step.elements(); got > size+numClassSets {
					t.Errorf("%s %s: step %d has %d elements, want some %d", name, what, n, got, size)
				}
				e := &step.tables[0]
				if len(e.ports) > size {
					t.Errorf("%s %s: step %d has %d ports, want at most %d", name, what, n, len(e.ports), size)
				}
				for set := range numClassSets {
					for _, el := range slices.Concat(e.del[set], e.add[set]) {
						if other, ok := in[string(el.Key)]; ok && other != n {
							t.Errorf("%s %s: the classes of a frontend are in steps %d and %d", name, what, other, n)
						}
						in[string(el.Key)] = n
					}
				}
				together.elements += e.elements
				for set, counts := range e.addrs {
					for addr, n := range counts {
						together.addrs[set][addr] += n
					}
				}
				for port, n := range e.ports {
					together.ports[port] += n
				}
				for b, n := range e.verdictElements {
					together.verdictElements[b] += n
				}
				n++
			}
			want := &whole.tables[0]
			if together.elements != want.elements || !maps.Equal(together.ports, want.ports) || !maps.Equal(together.verdictElements, want.verdictElements) {
				t.Errorf("%s %s: the steps are not the whole", name, what)
			}
			for set := range want.addrs {
				if !maps.Equal(together.addrs[set], want.addrs[set]) {
					t.Errorf("%s %s: the steps do not have all addresses of %s", name, what, addrSet(set))
				}
			}
		}
	}
}

// TestPortRepairSplitsCommits removes what endpoint-ports holds, adds others, and
// looks at how much each commit of the Replace that mends it changes.
func TestPortRepairSplitsCommits(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	const many = 300
	var list []dataplane.Endpoint
	var others []string
	for i := range many {
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), uint16(1+i))})
		others = append(others, fmt.Sprint(1000+i))
	}
	s := service(t, "ports", []dataplane.Frontend{frontend(1)}, list)
	mustReplace(t, d, nodeWithPodCIDRs(), s)
	for name, script := range map[string]string{
		"missing": "flush set ip fairlead endpoint-ports",
		"more":    "add element ip fairlead endpoint-ports { " + strings.Join(others, ", ") + " }",
	} {
		runNFT(t, ns, nftBinaries(t)["1.1.3"], script)
		d.transactionSize = 20
		o := openInNamespace(t, ns)
		before, largest := len(endpointPortElements(t, o)), 0
		d.flush = func() error {
			err := d.conn.Flush()
			now := len(endpointPortElements(t, o))
			largest, before = max(largest, now-before, before-now), now
			return err
		}
		mustReplace(t, d, nodeWithPodCIDRs(), s)
		if largest > d.transactionSize || before != many {
			t.Errorf("%s: %d ports in the end, want %d; up to %d in one commit, want %d", name, before, many, largest, d.transactionSize)
		}
		d.flush, d.transactionSize = d.conn.Flush, transactionSize
		wantNoGarbage(t, d, ns, nodeWithPodCIDRs(), []*dataplane.Service{s})
	}
}

// endpointPortElements returns the elements of endpoint-ports for IPv4.
func endpointPortElements(t *testing.T, d *Dataplane) []element {
	t.Helper()
	var all []element
	if err := d.dump.dumpElements(t.Context(), d.tables[0].endpointPorts, func(e element, _ bool) { all = append(all, e) }); err != nil {
		t.Fatal(err)
	}
	return all
}
