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

// observer checks the state that a second Dataplane reads after each commit of the first one.
type observer struct {
	t        *testing.T
	reader   *Dataplane
	old, new dataplane.State
	commits  int
	// faultAt returns the fault to inject into a commit.
	faultAt func(commit int) fault
}

type fault int

const (
	noFault       fault = iota
	rejectElement       // the kernel rejects an element, with EINVAL
	rejectCommit        // the kernel rejects the commit for a missing set, with ENOENT
	loseAck             // the kernel commits, but its acknowledgment is lost
)

var errAckLost = errors.New("acknowledgment lost")

// deleteInTransaction adds the deletion of an element with a short key to the transaction.
func deleteInTransaction(d *Dataplane, set *nftables.Set) {
	elements := []element{{Key: []byte{1, 2, 3, 4}}}
	if bulk := d.conn.(*bulkConn); len(bulk.transaction) > 0 {
		_ = bulk.deleteBulk(set, elements)
		return
	}
	_ = d.conn.SetDeleteElements(set, elements)
}

// discard empties the transaction.
func (c *bulkConn) discard() {
	c.transaction = c.transaction[:0]
	_ = c.FlushWithGenID(1) // empties the library's queue
}

// observeCommits makes d commit in small steps and checks the state after each commit.
func observeCommits(t *testing.T, d *Dataplane, ns *nettest.Namespace) *observer {
	t.Helper()
	o := &observer{t: t, reader: openInNamespace(t, ns, translatorOf(d)), faultAt: func(int) fault { return noFault }}
	d.transactionSize = 6
	d.flush = func() error {
		before := generation(t, o.reader)
		f := o.faultAt(o.commits)
		switch f {
		case rejectElement:
			deleteInTransaction(d, d.tables[0].services)
		case rejectCommit:
			deleteInTransaction(d, d.missingSet())
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

// missingSet returns a set that does not exist in the table.
func (d *Dataplane) missingSet() *nftables.Set {
	missing := *d.tables[0].services
	missing.Name = "nobody"
	return &missing
}

// checkState checks each frontend. It must have its old state, its new state, or a mix of old
// and new endpoints whose number is the old or the new one. A frontend in both states must
// not be missing.
func (o *observer) checkState() {
	o.t.Helper()
	got, err := o.reader.Read(o.t.Context())
	if err != nil {
		o.t.Fatal(err)
	}
	for f := range got {
		if _, was := o.old[f]; !was {
			if _, willBe := o.new[f]; !willBe {
				o.t.Errorf("commit %d: unknown frontend %s", o.commits, f)
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

// checkFrontend checks one frontend for checkState.
func (o *observer) checkFrontend(got dataplane.State, f dataplane.Frontend) error {
	binding, exists := got[f]
	oldBinding, inOld := o.old[f]
	newBinding, inNew := o.new[f]
	switch {
	case !exists && inOld && inNew:
		return errors.New("missing, want old or new state")
	case !exists, inOld && binding.Equal(oldBinding), inNew && binding.Equal(newBinding), o.matchesSharedLists(binding, oldBinding, newBinding):
		return nil
	case !inOld:
		return fmt.Errorf("visible before it is complete: %s, want %s", binding.ServiceSpec, newBinding.ServiceSpec)
	case !inNew:
		return fmt.Errorf("incomplete during deletion: %s, want %s", binding.ServiceSpec, oldBinding.ServiceSpec)
	}
	for _, spec := range []dataplane.ServiceSpec{oldBinding.ServiceSpec, newBinding.ServiceSpec} {
		hashed := usesHash(oldBinding.ServiceSpec, newBinding.ServiceSpec)
		if stripLists(binding.ServiceSpec).Equal(stripLists(spec)) && hasLength(binding.Endpoints, spec.Endpoints, hashed) &&
			hasLength(binding.LocalEndpoints, spec.LocalEndpoints, hashed) &&
			containsAll(binding.Endpoints, oldBinding.Endpoints, newBinding.Endpoints) && containsAll(binding.LocalEndpoints, oldBinding.LocalEndpoints, newBinding.LocalEndpoints) &&
			!slices.ContainsFunc(spec.SourceRanges, func(p netip.Prefix) bool {
				return slices.Contains(oldBinding.SourceRanges, p) && slices.Contains(newBinding.SourceRanges, p) && !slices.Contains(binding.SourceRanges, p)
			}) {
			return nil
		}
	}
	return fmt.Errorf("got %s, want a state between %s and %s", binding.ServiceSpec, oldBinding.ServiceSpec, newBinding.ServiceSpec)
}

// matchesSharedLists reports whether the frontend belongs to a Service with several
// frontends, and has endpoint lists that the Service has before or after the change.
// Frontends that share a list see its changes at once, but each frontend changes the rest of
// its spec separately.
func (o *observer) matchesSharedLists(got, oldBinding, newBinding dataplane.Binding) bool {
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
	specs := []dataplane.ServiceSpec{oldBinding.ServiceSpec, newBinding.ServiceSpec}
	listMatches := func(list func(dataplane.ServiceSpec) []dataplane.Endpoint) bool {
		endpoints, allowed := list(got.ServiceSpec), slices.Concat(list(oldBinding.ServiceSpec), list(newBinding.ServiceSpec))
		for _, t := range all {
			allowed = append(allowed, list(t)...)
		}
		return slices.ContainsFunc(all, func(t dataplane.ServiceSpec) bool {
			return hasLength(endpoints, list(t), usesHash(append(specs, all...)...)) && containsAll(endpoints, allowed)
		})
	}
	return slices.ContainsFunc(specs, func(t dataplane.ServiceSpec) bool { return stripLists(got.ServiceSpec).Equal(stripLists(t)) }) &&
		listMatches(func(t dataplane.ServiceSpec) []dataplane.Endpoint { return t.Endpoints }) &&
		(!got.ExternalTrafficPolicyLocal || listMatches(func(t dataplane.ServiceSpec) []dataplane.Endpoint { return t.LocalEndpoints }))
}

// stepSize returns the number of elements of a step for a random change. Each slot of a source hash
// is an element, so such Services need larger steps. Only some of the changes contain them.
func stepSize(seed uint64, have, want []*dataplane.Service) int {
	const small, large = 6, 300
	for i, s := range want {
		switch {
		case seed%4 == 2 && i == 0:
			s.Scheduler = dataplane.SourceHash
		case seed%4 != 2 && s.Scheduler == dataplane.SourceHash:
			s.Scheduler = ""
		}
	}
	if slices.ContainsFunc(slices.Concat(have, want), func(s *dataplane.Service) bool { return usesHash(s.ServiceSpec) }) {
		return large
	}
	return small
}

// hasLength reports whether a list has the number of endpoints of another list. The slots of a
// source hash change one after another, and each has an endpoint from before or after. So the
// number differs meanwhile, but there are endpoints.
func hasLength(list, want []dataplane.Endpoint, hashed bool) bool {
	return len(list) == len(want) || hashed && len(list) > 0 && len(want) > 0
}

// usesHash reports whether the endpoints of a ServiceSpec are selected by a source hash.
func usesHash(specs ...dataplane.ServiceSpec) bool {
	return slices.ContainsFunc(specs, func(t dataplane.ServiceSpec) bool { return t.Scheduler == dataplane.SourceHash })
}

// stripLists returns the part of a ServiceSpec that changes atomically.
func stripLists(t dataplane.ServiceSpec) dataplane.ServiceSpec {
	t.Endpoints, t.LocalEndpoints, t.SourceRanges = nil, nil, nil
	return t
}

// containsAll reports whether each endpoint is in at least one of the lists.
func containsAll(endpoints []dataplane.Endpoint, lists ...[]dataplane.Endpoint) bool {
	addrs := map[netip.AddrPort]bool{}
	for _, e := range slices.Concat(lists...) {
		addrs[e.Addr] = true
	}
	return !slices.ContainsFunc(endpoints, func(e dataplane.Endpoint) bool { return !addrs[e.Addr] })
}

// wantNoGarbage fails the test unless the kernel holds these Services and no other elements,
// and a Replace by a new instance changes nothing.
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
				t.Errorf("table %s has leftover elements of %s: %+v", table, f, r)
			}
		}
		for n, l := range c.sharedLists {
			used := func(f dataplane.Frontend) bool { return c.frontends[f].listID == n }
			if !slices.ContainsFunc(slices.Collect(maps.Keys(c.frontends)), used) {
				t.Errorf("table %s has leftover elements of list %d: %+v", table, n, l)
			}
		}
	}
	before := generation(t, d)
	again := openInNamespace(t, ns, translatorOf(d))
	again.now, again.minSharedFrontends = d.now, d.minSharedFrontends
	mustReplace(t, again, node, services...)
	if generation(t, d) != before {
		t.Error("a Replace with the same Services changed the ruleset")
	}
}

// TestStepOrder creates, changes and deletes Services that are too large for one commit, with
// Apply and Replace.
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
		d.transactionSize = stepSize(seed, have, want)
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
		t.Errorf("only %d commits, want small commits", o.commits)
	}
}

// TestInterruptedCommits makes commits fail during large changes. Services must still be
// complete or absent. Services that the error does not name must be programmed. The next
// Replace must leave exactly the desired state.
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
		d.transactionSize = stepSize(seed, have, want)
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
						t.Errorf("%s was programmed, but %s is %s, want %s", s.Key, f, b.ServiceSpec, s.ServiceSpec)
					}
				}
			}
		}
		// Services may now be in the old or the new state, so the intermediate states are
		// not checked.
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

// TestLargestService creates, changes, shrinks and deletes the Service with the maximum
// number of endpoints, next to another Service, with the default transaction size.
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
		t.Errorf("%d endpoints took only %d commits", len(list), commits)
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

// TestReplaceProgress checks the number of complete Services that Replace reports after each
// commit. It includes Services that were complete before, and excludes failed ones.
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
		steps    int // minimum
	}{
		{"no Services", nil, 0, 0},
		{"some rejected", with(rejectedService("poison", frontend(99)), unsupported), 2, 5},
		{"all programmed", services, 0, 5},
		{"one new", with(service(t, "new", []dataplane.Frontend{frontend(97)}, endpoints(1))), 0, 5},
	} {
		d.transactionSize = 20
		o := openInNamespace(t, ns)
		var reported []int
		err := d.Replace(t.Context(), nodeWithPodCIDRs(), slices.Values(step.services), func(complete int) {
			reported = append(reported, complete)
			got, err := o.Read(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range step.services[:min(complete, len(services))] {
				if !got[s.Frontends[0]].ServiceSpec.Equal(s.ServiceSpec) {
					t.Errorf("%s: %d Services reported as complete, but %s is not", step.name, complete, s.Key)
				}
			}
		})
		var failure *dataplane.Error
		if errors.As(err, &failure) != (step.failed > 0) || failure != nil && len(failure.Failed) != step.failed {
			t.Fatalf("%s: error %v, want %d failed", step.name, err, step.failed)
		}
		if !slices.IsSorted(reported) || len(reported) < step.steps {
			t.Errorf("%s: reported %v, want at least %d nondecreasing steps", step.name, reported, step.steps)
		}
		if want := len(step.services) - step.failed; want > 0 && (len(reported) == 0 || reported[len(reported)-1] != want) {
			t.Errorf("%s: reported %v, want %d at the end", step.name, reported, want)
		}
	}
}

// TestFaultInjection checks that the faults used by other tests cause the expected errors.
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

// TestStepSize splits Services with unusually many frontends, or with a different port for
// each endpoint, into steps. No step may be much larger than the limit. The class elements of
// a frontend must be in one step. The steps together must contain the whole change.
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
	makeService := func(frontends []dataplane.Frontend, spec dataplane.ServiceSpec) *dataplane.Service {
		key := dataplane.Key{Namespace: "default", Name: "large", Family: dataplane.IPv4, Kind: dataplane.ExternalIP}
		s, err := dataplane.NewService(key, slices.Clone(frontends), spec)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	full := dataplane.ServiceSpec{Endpoints: endpoints(1), ExternalTrafficPolicyLocal: true, LocalEndpoints: endpoints(1), Affinity: time.Hour}
	for name, s := range map[string]*dataplane.Service{
		"frontends": makeService(frontends, full),
		"ports":     makeService(frontends[:1], dataplane.ServiceSpec{Endpoints: list}),
	} {
		r := render(s, assignServiceSlots(slotAssignment{}, s), nodeWithAllSettings())
		for what, rows := range map[string][2]*frontendElements{"create": {nil, r}, "delete": {r, nil}} {
			whole := &batch{}
			for i, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
				whole.tables[i].table = newTable(family)
			}
			for _, f := range s.Frontends {
				whole.diffFrontend(f, rows[0], rows[1])
			}
			const size = 100
			together := &tableDiff{addrs: newAddrCounts(), verdictElements: map[verdictElement]int{}, elementDiff: elementDiff{ports: portCounts{}}}
			in := map[string]int{} // step of each class element
			n := 0
			for step := range whole.steps(size) {
				if got := step.elements(); got > size+numClassSets {
					t.Errorf("%s %s: step %d has %d elements, want about %d", name, what, n, got, size)
				}
				e := &step.tables[0]
				if len(e.ports) > size {
					t.Errorf("%s %s: step %d has %d ports, want at most %d", name, what, n, len(e.ports), size)
				}
				for set := range numClassSets {
					for _, el := range slices.Concat(e.del[set], e.add[set]) {
						if other, ok := in[string(el.Key)]; ok && other != n {
							t.Errorf("%s %s: class elements of a frontend are in steps %d and %d", name, what, other, n)
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
				t.Errorf("%s %s: the steps do not contain the whole change", name, what)
			}
			for set := range want.addrs {
				if !maps.Equal(together.addrs[set], want.addrs[set]) {
					t.Errorf("%s %s: the steps do not contain all addresses of %s", name, what, addrSet(set))
				}
			}
		}
	}
}

// TestPortRepairSplitsCommits removes elements from endpoint-ports, or adds others, and
// checks how many elements each commit of the repairing Replace changes.
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
		"missing":    "flush set ip fairlead endpoint-ports",
		"unexpected": "add element ip fairlead endpoint-ports { " + strings.Join(others, ", ") + " }",
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
			t.Errorf("%s: %d ports at the end, want %d; up to %d changed in one commit, want at most %d", name, before, many, largest, d.transactionSize)
		}
		d.flush, d.transactionSize = d.conn.Flush, transactionSize
		wantNoGarbage(t, d, ns, nodeWithPodCIDRs(), []*dataplane.Service{s})
	}
}

// endpointPortElements returns the elements of endpoint-ports for IPv4.
func endpointPortElements(t *testing.T, d *Dataplane) []element {
	t.Helper()
	var all []element
	if err := d.dump.dumpElements(t.Context(), d.tables[0].endpointPorts, func(e element, _ bool) { all = append(all, cloneElement(e)) }); err != nil {
		t.Fatal(err)
	}
	return all
}
