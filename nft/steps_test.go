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
	// fail is asked before each commit what is to become of it.
	fail func(commit int) fault
}

type fault int

const (
	none   fault = iota
	reject       // the kernel refuses what the commit says
	refuse       // the kernel refuses the commit as such
	lose         // the kernel takes it, but nobody hears of that
)

var errLost = errors.New("the answer was lost")

// observe makes the Dataplane commit little at a time, before the eyes of an
// observer.
func observe(t *testing.T, d *Dataplane, ns *nettest.Namespace) *observer {
	t.Helper()
	o := &observer{t: t, reader: openIn(t, ns, translatorOf(d)), fail: func(int) fault { return none }}
	d.editSize = 6
	d.flush = func() error {
		before := generation(t, o.reader)
		f := o.fail(o.commits)
		switch f {
		case reject:
			_ = d.conn.SetDeleteElements(d.tables[0].services, []element{{Key: []byte{1, 2, 3, 4}}})
		case refuse:
			d.conn.DelChain(d.branchOfNobody())
		case none, lose:
		}
		err := d.conn.Flush()
		if f == lose && err == nil {
			err = errLost
		}
		if generation(t, o.reader) != before {
			o.commits++
			o.look()
		}
		return err
	}
	return o
}

// branchOfNobody is a chain that is not there.
func (d *Dataplane) branchOfNobody() *nftables.Chain {
	return &nftables.Chain{Name: "nobody", Table: d.tables[0].nf}
}

// look checks that each Service is as it was, as it is to be, or of the same
// number of endpoints with some old and some new, and that none is missing that
// was there and is to stay.
func (o *observer) look() {
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
			if err := o.check(got, f); err != nil {
				o.t.Errorf("commit %d: %s: %v", o.commits, f, err)
			}
		}
	}
}

func (o *observer) check(got dataplane.State, f dataplane.Frontend) error {
	g, there := got[f]
	was, before := o.old[f]
	is, after := o.new[f]
	switch {
	case !there && before && after:
		return errors.New("is missing, and was to stay")
	case !there, before && g.Equal(was), after && g.Equal(is), o.shares(g, was, is):
		return nil
	case !before:
		return fmt.Errorf("is seen before it is complete: %s, want %s", g.Treatment, is.Treatment)
	case !after:
		return fmt.Errorf("is seen while it goes: %s, had %s", g.Treatment, was.Treatment)
	}
	for _, like := range []dataplane.Treatment{was.Treatment, is.Treatment} {
		if bare(g.Treatment).Equal(bare(like)) && len(g.Endpoints) == len(like.Endpoints) &&
			len(g.LocalEndpoints) == len(like.LocalEndpoints) &&
			among(g.Endpoints, was.Endpoints, is.Endpoints) && among(g.LocalEndpoints, was.LocalEndpoints, is.LocalEndpoints) &&
			!slices.ContainsFunc(like.SourceRanges, func(p netip.Prefix) bool {
				return slices.Contains(was.SourceRanges, p) && slices.Contains(is.SourceRanges, p) && !slices.Contains(g.SourceRanges, p)
			}) {
			return nil
		}
	}
	return fmt.Errorf("is %s, neither like %s nor like %s", g.Treatment, was.Treatment, is.Treatment)
}

// shares reports whether a frontend is one of several of its Service, and has lists of
// endpoints that others have before or after: each list changes for all frontends that
// share it at once, while each has the rest of its Treatment by itself.
func (o *observer) shares(got, was, is dataplane.Binding) bool {
	var all []dataplane.Treatment
	for _, state := range []dataplane.State{o.old, o.new} {
		var same []dataplane.Treatment
		for _, b := range state {
			if b.Service == got.Service {
				same = append(same, b.Treatment)
			}
		}
		if len(same) > 1 {
			all = append(all, same[0])
		}
	}
	rest := []dataplane.Treatment{was.Treatment, is.Treatment}
	like := func(list func(dataplane.Treatment) []dataplane.Endpoint) bool {
		endpoints, known := list(got.Treatment), slices.Concat(list(was.Treatment), list(is.Treatment))
		for _, t := range all {
			known = append(known, list(t)...)
		}
		return slices.ContainsFunc(all, func(t dataplane.Treatment) bool {
			return len(endpoints) == len(list(t)) && among(endpoints, known)
		})
	}
	return slices.ContainsFunc(rest, func(t dataplane.Treatment) bool { return bare(got.Treatment).Equal(bare(t)) }) &&
		like(func(t dataplane.Treatment) []dataplane.Endpoint { return t.Endpoints }) &&
		(!got.ExternalLocal || like(func(t dataplane.Treatment) []dataplane.Endpoint { return t.LocalEndpoints }))
}

// bare returns what of a Treatment changes all at once.
func bare(t dataplane.Treatment) dataplane.Treatment {
	t.Endpoints, t.LocalEndpoints, t.SourceRanges = nil, nil, nil
	return t
}

// among reports whether all endpoints are in one or the other list.
func among(endpoints []dataplane.Endpoint, lists ...[]dataplane.Endpoint) bool {
	addrs := map[netip.AddrPort]bool{}
	for _, e := range slices.Concat(lists...) {
		addrs[e.Addr] = true
	}
	return !slices.ContainsFunc(endpoints, func(e dataplane.Endpoint) bool { return !addrs[e.Addr] })
}

// wantClean fails the test unless the kernel holds these Services and no garbage,
// and a restart changes nothing.
func wantClean(t *testing.T, d *Dataplane, ns *nettest.Namespace, node dataplane.Node, services []*dataplane.Service) {
	t.Helper()
	wantState(t, d, services...)
	for _, table := range d.tables {
		c, err := d.readRows(t.Context(), table)
		if err != nil {
			t.Fatal(err)
		}
		for f, r := range c.rows {
			if !r.inServices {
				t.Errorf("table %s has garbage of %s: %+v", table, f, r)
			}
		}
		for n, l := range c.lists {
			used := func(f dataplane.Frontend) bool { return c.rows[f].list == n }
			if !slices.ContainsFunc(slices.Collect(maps.Keys(c.rows)), used) {
				t.Errorf("table %s has garbage of list %d: %+v", table, n, l)
			}
		}
	}
	before := generation(t, d)
	again := openIn(t, ns, translatorOf(d))
	again.now, again.shareFrom = d.now, d.shareFrom
	replace(t, again, node, services...)
	if generation(t, d) != before {
		t.Error("a Replace by the same Services changed the ruleset")
	}
}

// TestStepsAreSeenInOrder has Services that are too large for one commit appear,
// change in every way, and go, by Apply and by Replace.
func TestStepsAreSeenInOrder(t *testing.T) {
	t.Parallel()
	for name, translator := range translators() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testSteps(t, translator)
		})
	}
}

func testSteps(t *testing.T, translator Translator) {
	t.Helper()
	d, ns := newDataplane(t, translator)
	replace(t, d, podNode())
	o := observe(t, d, ns)
	var have []*dataplane.Service
	for seed := range uint64(8) {
		random := rand.New(rand.NewPCG(seed, 8))
		want := randomServices(t, random, 8)
		if seed%4 == 3 {
			want = nil
		}
		o.old, o.new = stateOf(d, have), stateOf(d, want)
		if seed%2 == 0 {
			replace(t, d, podNode(), want...)
		} else {
			apply(t, d, changesBetween(have, want)...)
		}
		have = want
		wantClean(t, d, ns, podNode(), have)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	if o.commits < 50 {
		t.Errorf("%d commits: they are not small", o.commits)
	}
}

// TestInterrupted has commits fail in the midst of large changes. Services are
// complete or not there all the same, those that a call does not name have taken,
// and the next Replace leaves nothing but what is wanted.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	replace(t, d, podNode())
	var have []*dataplane.Service
	failures := 0
	for seed := range uint64(10) {
		random := rand.New(rand.NewPCG(seed, 9))
		want := randomServices(t, random, 6)
		o := observe(t, d, ns)
		o.old, o.new = dataplane.StateOf(slices.Values(have)), dataplane.StateOf(slices.Values(want))
		at, what := random.IntN(30), []fault{reject, refuse, lose}[random.IntN(3)]
		failed := false
		o.fail = func(commit int) fault {
			if failed || commit < at {
				return none
			}
			failed = true
			return what
		}
		call := func(services []*dataplane.Service) error {
			if seed%2 == 0 {
				return d.Replace(t.Context(), podNode(), slices.Values(services), nil)
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
					if b := got[f]; keys.Failed[s.Key] == nil && !b.Treatment.Equal(s.Treatment) {
						t.Errorf("%s has taken, and %s is %s, want %s", s.Key, f, b.Treatment, s.Treatment)
					}
				}
			}
		}
		// What was to stay may be either now, so it is not looked at on the way.
		d = openIn(t, ns)
		replace(t, d, podNode(), want...)
		wantClean(t, d, ns, podNode(), want)
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
	replace(t, d, podNode(), other)
	before := generation(t, d)
	full := largest(list)
	apply(t, d, dataplane.Change{New: full})
	if commits := generation(t, d) - before; int(commits) < len(list)/editSize {
		t.Errorf("%d endpoints took %d commits", len(list), commits)
	}
	wantState(t, d, other, full)
	half := largest(list[:len(list)/2])
	apply(t, d, dataplane.Change{Old: full, New: half})
	wantState(t, d, other, half)
	rest := largest(list[len(list)/2:])
	replace(t, d, podNode(), other, rest)
	wantClean(t, d, ns, podNode(), []*dataplane.Service{other, rest})
	apply(t, d, dataplane.Change{Old: rest})
	wantClean(t, d, ns, podNode(), []*dataplane.Service{other})
}

// TestProgress: Replace tells after each commit how many Services are complete,
// those that were before among them, and none that has failed.
func TestProgress(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	var services []*dataplane.Service
	for i := range 40 {
		services = append(services, service(t, fmt.Sprintf("s-%d", i), []dataplane.Frontend{frontend(i)}, endpoints(1, 2, 3)))
	}
	with := func(more ...*dataplane.Service) []*dataplane.Service { return slices.Concat(services, more) }
	tooMany := make([]dataplane.Endpoint, maxIDs+1)
	unsupported := service(t, "unsupported", []dataplane.Frontend{frontend(98)}, nil)
	unsupported.Affinity, unsupported.Endpoints = 3600e9, tooMany
	for _, step := range []struct {
		name     string
		services []*dataplane.Service
		failed   int
		steps    int // at least
	}{
		{"none", nil, 0, 0},
		{"some fail", with(poison("poison", frontend(99)), unsupported), 2, 5},
		{"all are there", services, 0, 5},
		{"one is new", with(service(t, "new", []dataplane.Frontend{frontend(97)}, endpoints(1))), 0, 5},
	} {
		d.editSize = 20
		o := openIn(t, ns)
		var told []int
		err := d.Replace(t.Context(), podNode(), slices.Values(step.services), func(complete int) {
			told = append(told, complete)
			got, err := o.Read(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range step.services[:min(complete, len(services))] {
				if !got[s.Frontends[0]].Treatment.Equal(s.Treatment) {
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

// TestFaultsAreWhatTheySay keeps the tests above honest.
func TestFaultsAreWhatTheySay(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	replace(t, d, podNode())
	for what, want := range map[fault]error{reject: unix.EINVAL, refuse: unix.ENOENT, lose: errLost} {
		o := observe(t, d, ns)
		o.new = dataplane.StateOf(slices.Values([]*dataplane.Service{service(t, "s", []dataplane.Frontend{frontend(1)}, endpoints(1))}))
		o.fail = func(int) fault { return what }
		err := d.Apply(t.Context(), []dataplane.Change{{New: service(t, "s", []dataplane.Frontend{frontend(1)}, endpoints(1))}})
		if !errors.Is(err, want) {
			t.Errorf("fault %d: error %v, want %v", what, err, want)
		}
		d.flush = d.conn.Flush
		replace(t, d, podNode())
	}
}

// TestStepsAreBounded takes apart what no Service has much of as a rule: frontends,
// and endpoints that have a port each. No step is much larger than it should be, the
// classes of a frontend are all in one, and together the steps are the whole.
func TestStepsAreBounded(t *testing.T) {
	t.Parallel()
	const many = 2000
	var frontends []dataplane.Frontend
	var list []dataplane.Endpoint
	for i := range many {
		addr := netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)})
		frontends = append(frontends, dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(addr, 80)})
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, uint16(1+i))})
	}
	of := func(frontends []dataplane.Frontend, treatment dataplane.Treatment) *dataplane.Service {
		key := dataplane.Key{Namespace: "default", Name: "much", Family: dataplane.IPv4, Kind: dataplane.ExternalIP}
		s, err := dataplane.NewService(key, slices.Clone(frontends), treatment)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	full := dataplane.Treatment{Endpoints: endpoints(1), ExternalLocal: true, LocalEndpoints: endpoints(1), Affinity: time.Hour}
	for name, s := range map[string]*dataplane.Service{
		"frontends": of(frontends, full),
		"ports":     of(frontends[:1], dataplane.Treatment{Endpoints: list}),
	} {
		r := render(s, arrangeService(arrangement{}, s), fullNode())
		for what, rows := range map[string][2]*row{"come": {nil, r}, "go": {r, nil}} {
			whole := &batch{}
			for i, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
				whole.tables[i].table = newTable(family)
			}
			for _, f := range s.Frontends {
				whole.change(f, rows[0], rows[1])
			}
			const size = 100
			together := &tableEdit{addrs: newAddrCounts(), branches: map[branch]int{}, edit: edit{ports: portCounts{}}}
			in := map[string]int{} // classes are in which step
			n := 0
			for step := range whole.steps(size) {
				if got := step.elements(); got > size+classSets {
					t.Errorf("%s %s: step %d has %d elements, want some %d", name, what, n, got, size)
				}
				e := &step.tables[0]
				if len(e.ports) > size {
					t.Errorf("%s %s: step %d has %d ports, want at most %d", name, what, n, len(e.ports), size)
				}
				for set := range classSets {
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
				for b, n := range e.branches {
					together.branches[b] += n
				}
				n++
			}
			want := &whole.tables[0]
			if together.elements != want.elements || !maps.Equal(together.ports, want.ports) || !maps.Equal(together.branches, want.branches) {
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

// TestPortsAreMendedInPieces removes what endpoint-ports holds, adds others, and
// looks at how much each commit of the Replace that mends it changes.
func TestPortsAreMendedInPieces(t *testing.T) {
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
	replace(t, d, podNode(), s)
	for name, script := range map[string]string{
		"missing": "flush set ip fairlead endpoint-ports",
		"more":    "add element ip fairlead endpoint-ports { " + strings.Join(others, ", ") + " }",
	} {
		nft(t, ns, nftBinaries(t)["1.1.3"], script)
		d.editSize = 20
		o := openIn(t, ns)
		before, largest := len(portSet(t, o)), 0
		d.flush = func() error {
			err := d.conn.Flush()
			now := len(portSet(t, o))
			largest, before = max(largest, now-before, before-now), now
			return err
		}
		replace(t, d, podNode(), s)
		if largest > d.editSize || before != many {
			t.Errorf("%s: %d ports in the end, want %d; up to %d in one commit, want %d", name, before, many, largest, d.editSize)
		}
		d.flush, d.editSize = d.conn.Flush, editSize
		wantClean(t, d, ns, podNode(), []*dataplane.Service{s})
	}
}

// portSet returns the elements of endpoint-ports for IPv4.
func portSet(t *testing.T, d *Dataplane) []element {
	t.Helper()
	var all []element
	if err := d.dump.elements(t.Context(), d.tables[0].endpointPorts, func(e element, _ bool) { all = append(all, e) }); err != nil {
		t.Fatal(err)
	}
	return all
}
