package dataplane_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
)

// A history is a sequence of random changes to a few Services that compete for a few frontends. A
// small syncer programs them while the dataplane injects faults. When the faults stop, the
// programmed state must equal the desired state.

// intN returns a number in [0, n), from a seeded generator or from the bytes of a fuzzer.
type intN func(n int) int

func seededIntN(seed uint64) intN {
	return rand.New(rand.NewPCG(seed, 1)).IntN
}

func bytesIntN(data []byte) intN {
	return func(n int) int {
		if len(data) == 0 {
			return 0
		}
		b := data[0]
		data = data[1:]
		return int(b) % n
	}
}

// cluster is the desired state of a history.
type cluster struct {
	keys      []dataplane.Key
	frontends []dataplane.Frontend
	owner     map[dataplane.Frontend]dataplane.Key
	specs     map[dataplane.Key]dataplane.ServiceSpec
	desired   map[dataplane.Key]*dataplane.Service
}

func newCluster() *cluster {
	c := &cluster{
		owner:   map[dataplane.Frontend]dataplane.Key{},
		specs:   map[dataplane.Key]dataplane.ServiceSpec{},
		desired: map[dataplane.Key]*dataplane.Service{},
	}
	for i := range byte(4) {
		for family, prefix := range map[dataplane.Family]string{dataplane.IPv4: "10.96.0.0", dataplane.IPv6: "fd00::"} {
			c.keys = append(c.keys, dataplane.Key{Namespace: "default", Name: fmt.Sprintf("s%d", i), Family: family})
			a := netip.MustParseAddr(prefix).AsSlice()
			a[len(a)-1] = i
			addr, _ := netip.AddrFromSlice(a)
			c.frontends = append(c.frontends, dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(addr, 80)})
		}
	}
	slices.SortFunc(c.keys, dataplane.Key.Compare)
	slices.SortFunc(c.frontends, dataplane.Frontend.Compare)
	return c
}

// change makes one to four random changes: a frontend moves to another Service or is removed, or
// a Service gets a new ServiceSpec.
func (c *cluster) change(intn intN) {
	for range 1 + intn(4) {
		k := c.keys[intn(len(c.keys))]
		switch intn(4) {
		case 0, 1:
			f := c.frontends[intn(len(c.frontends))]
			if dataplane.FamilyOf(f.Addr.Addr()) == k.Family {
				c.owner[f] = k
			}
		case 2:
			delete(c.owner, c.frontends[intn(len(c.frontends))])
		case 3:
			c.specs[k] = randomSpec(k.Family, intn)
		}
	}
	desired := map[dataplane.Key]*dataplane.Service{}
	for _, k := range c.keys {
		var fs []dataplane.Frontend
		for _, f := range c.frontends {
			if c.owner[f] == k {
				fs = append(fs, f)
			}
		}
		if len(fs) == 0 {
			continue
		}
		s, err := dataplane.NewService(k, fs, cloneSpec(c.specs[k]))
		if err != nil {
			panic(err)
		}
		desired[k] = s
	}
	c.desired = desired
}

// cloneSpec returns a copy of spec with its own lists, because NewService takes ownership of them.
func cloneSpec(spec dataplane.ServiceSpec) dataplane.ServiceSpec {
	spec.Endpoints, spec.LocalEndpoints = slices.Clone(spec.Endpoints), slices.Clone(spec.LocalEndpoints)
	spec.SourceRanges = slices.Clone(spec.SourceRanges)
	return spec
}

// randomSpec returns a ServiceSpec with random endpoints. In most cases it also sets one of the
// other fields.
func randomSpec(family dataplane.Family, intn intN) dataplane.ServiceSpec {
	t := dataplane.ServiceSpec{Endpoints: randomEndpoints(family, intn)}
	switch intn(8) {
	case 0:
		t.ExternalTrafficPolicyLocal, t.LocalEndpoints = true, randomEndpoints(family, intn)
	case 1:
		t.Masquerade = dataplane.Masquerade(intn(3)) //nolint:gosec // fits
	case 2:
		t.NoEndpointsVerdict = dataplane.Drop
	case 3:
		t.Affinity = time.Duration(1+intn(2)) * time.Hour
	case 4:
		for range 1 + intn(2) {
			addr := randomEndpoint(family, intn).Addr.Addr()
			t.SourceRanges = append(t.SourceRanges, netip.PrefixFrom(addr, addr.BitLen()-intn(2)).Masked())
		}
	case 5:
		t.Scheduler = []string{"lc", "sh"}[intn(2)]
	}
	return t
}

func randomEndpoints(family dataplane.Family, intn intN) []dataplane.Endpoint {
	var es []dataplane.Endpoint
	for range intn(5) {
		es = append(es, randomEndpoint(family, intn))
	}
	return es
}

func randomEndpoint(family dataplane.Family, intn intN) dataplane.Endpoint {
	prefix := "10.0.0.%d"
	if family == dataplane.IPv6 {
		prefix = "fd01::%d"
	}
	addr := netip.MustParseAddr(fmt.Sprintf(prefix, 1+intn(6)))
	return dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, 8080), Local: intn(2) == 0}
}

// errorRule is a syncer's assumption about the kernel after an error.
type errorRule string

const (
	unknownUntilReplace errorRule = "failed keys are unknown until Replace" // the contract
	assumeOld           errorRule = "failed keys keep their Old"
	assumeNew           errorRule = "applied is updated before the write"
	keyByKey            errorRule = "each change is a separate call"
)

// testSyncer is a small syncer that follows an errorRule.
type testSyncer struct {
	rule       errorRule
	dp         dataplane.Dataplane
	applied    map[dataplane.Key]*dataplane.Service
	unknown    map[dataplane.Key]bool
	allUnknown bool // the state of every key is unknown
}

func newTestSyncer(r errorRule, dp dataplane.Dataplane) *testSyncer {
	return &testSyncer{
		rule: r, dp: dp, allUnknown: true,
		applied: map[dataplane.Key]*dataplane.Service{},
		unknown: map[dataplane.Key]bool{},
	}
}

// diff returns the changes from applied to desired for all keys with a known state.
func (syncer *testSyncer) diff(desired map[dataplane.Key]*dataplane.Service) []dataplane.Change {
	var changes []dataplane.Change
	for k, s := range desired {
		if !syncer.unknown[k] && !s.Equal(syncer.applied[k]) {
			changes = append(changes, dataplane.Change{Old: syncer.applied[k], New: s})
		}
	}
	for k, s := range syncer.applied {
		if desired[k] == nil && !syncer.unknown[k] {
			changes = append(changes, dataplane.Change{Old: s})
		}
	}
	// Sort, so that a seed always produces the same history.
	slices.SortFunc(changes, func(a, b dataplane.Change) int { return a.Key().Compare(b.Key()) })
	return changes
}

// sync programs desired. It calls Replace if the state of every key is unknown, or if repair is
// set and the state of any key is unknown.
func (syncer *testSyncer) sync(ctx context.Context, desired map[dataplane.Key]*dataplane.Service, repair bool) {
	select {
	case <-syncer.dp.Drift():
		syncer.allUnknown = true
	default:
	}
	if syncer.allUnknown || repair && len(syncer.unknown) > 0 {
		err := syncer.dp.Replace(ctx, dataplane.Node{}, maps.Values(desired), nil)
		syncer.recordResult(err, nil, desired)
		return
	}
	changes := syncer.diff(desired)
	switch syncer.rule {
	case keyByKey:
		for _, c := range changes {
			syncer.recordResult(syncer.dp.Apply(ctx, []dataplane.Change{c}), []dataplane.Change{c}, nil)
		}
	default:
		syncer.recordResult(syncer.dp.Apply(ctx, changes), changes, nil)
	}
}

// recordResult updates the syncer's state after a call: after Apply with changes, or after
// Replace with desired.
func (syncer *testSyncer) recordResult(err error, changes []dataplane.Change, desired map[dataplane.Key]*dataplane.Service) {
	var keyed *dataplane.Error
	if !errors.As(err, &keyed) {
		keyed = &dataplane.Error{}
	}
	whole := err != nil && keyed.Failed == nil
	if syncer.rule == assumeNew {
		keyed, whole = &dataplane.Error{}, false
	}
	if whole && syncer.rule == unknownUntilReplace {
		syncer.allUnknown = true
	}
	if whole {
		return
	}
	if desired != nil {
		syncer.applied = maps.Clone(desired)
		syncer.allUnknown = false
		clear(syncer.unknown)
	}
	for _, c := range changes {
		if _, failed := keyed.Failed[c.Key()]; failed {
			continue
		}
		if c.New == nil {
			delete(syncer.applied, c.Key())
		} else {
			syncer.applied[c.Key()] = c.New
		}
	}
	for k := range keyed.Failed {
		switch {
		case syncer.rule == unknownUntilReplace:
			syncer.unknown[k] = true
			delete(syncer.applied, k)
		case desired != nil:
			delete(syncer.applied, k)
		}
	}
}

// fakeOptions returns the options of the fakes that histories run against.
func fakeOptions() map[string]fake.Options {
	return map[string]fake.Options{
		"atomic":     {},
		"strict":     {Strict: true},
		"per object": {PerObject: true},
	}
}

// allFaults returns the faults of a history that combines all kinds.
func allFaults(opts fake.Options) fake.Faults {
	return supportedFaults(opts, fake.Faults{Reject: 0.1, Lose: 0.1, Partial: 0.1, Keys: 0.2, Drift: 0.05})
}

// supportedFaults returns the faults that the kernel can produce: a strict kernel applies a
// call completely or not at all.
func supportedFaults(opts fake.Options, faults fake.Faults) fake.Faults {
	if opts.Strict {
		faults.Partial, faults.Keys = 0, 0
	}
	return faults
}

// runHistory runs 40 rounds and returns the difference between the desired and the programmed
// state at the end.
func runHistory(t *testing.T, r errorRule, opts fake.Options, faults fake.Faults, seed uint64, intn intN) string {
	t.Helper()
	if opts.PerObject && faults.Keys > 0 {
		writes := rand.New(rand.NewPCG(seed, 2))
		opts.WriteFault = func(fake.Write) error {
			if faults.Keys > 0 && writes.IntN(20) == 0 {
				return errors.New("no memory")
			}
			return nil
		}
	}
	faulty := fake.NewFaulty(fake.New(opts), seed, fake.Faults{})
	syncer := newTestSyncer(r, faulty)
	c := newCluster()
	c.change(intn)
	syncer.sync(t.Context(), c.desired, true)
	faulty.Set(faults)
	for range 40 {
		c.change(intn)
		syncer.sync(t.Context(), c.desired, intn(4) == 0)
	}
	faulty.Set(fake.Faults{})
	faults.Keys = 0 // WriteFault reads faults and stops too.
	// The first call repairs. The second is for a testSyncer that still has changes to program
	// after the first.
	syncer.sync(t.Context(), c.desired, true)
	syncer.sync(t.Context(), c.desired, true)
	got, err := faulty.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := dataplane.StateOf(maps.Values(c.desired))
	if want.Equal(got) != (want.Diff(got) == "") {
		t.Fatalf("Equal returns %v, but Diff returns:\n%s", want.Equal(got), want.Diff(got))
	}
	return want.Diff(got)
}

// TestHistoriesConverge checks that the programmed state equals the desired state after the
// faults stop.
func TestHistoriesConverge(t *testing.T) {
	t.Parallel()
	for name, opts := range fakeOptions() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(2000) {
				if diff := runHistory(t, unknownUntilReplace, opts, allFaults(opts), seed, seededIntN(seed)); diff != "" {
					t.Fatalf("seed %d does not converge:\n%s", seed, diff)
				}
			}
		})
	}
}

// TestHistoriesDetectWrongErrorRules checks that the same histories detect syncers with wrong
// assumptions after an error. Otherwise TestHistoriesConverge could pass without testing
// anything.
func TestHistoriesDetectWrongErrorRules(t *testing.T) {
	t.Parallel()
	const seeds = 200
	for name, opts := range fakeOptions() {
		for _, tt := range []struct {
			rule   errorRule
			faults fake.Faults
			least  int // minimum number of histories, of seeds, that must not converge
		}{
			{unknownUntilReplace, fake.Faults{}, 0},
			{assumeOld, fake.Faults{}, 0},
			{assumeNew, fake.Faults{}, 0},
			{assumeOld, fake.Faults{Lose: 0.2, Partial: 0.2, Keys: 0.2}, seeds / 10},
			{assumeNew, fake.Faults{Reject: 0.2, Partial: 0.2, Keys: 0.2}, seeds / 2},
			{keyByKey, fake.Faults{}, seeds / 10},
		} {
			if opts.Strict && tt.rule == keyByKey {
				continue // A strict kernel rejects wrongly ordered changes until the order happens to be right.
			}
			t.Run(fmt.Sprintf("%s/%s/least=%d", name, tt.rule, tt.least), func(t *testing.T) {
				t.Parallel()
				wrong := 0
				for seed := range uint64(seeds) {
					if runHistory(t, tt.rule, opts, supportedFaults(opts, tt.faults), seed, seededIntN(seed)) != "" {
						wrong++
					}
				}
				t.Logf("%d of %d histories do not converge", wrong, seeds)
				if wrong < tt.least {
					t.Errorf("%d of %d histories do not converge, want at least %d", wrong, seeds, tt.least)
				}
				if tt.least == 0 && wrong > 0 {
					t.Errorf("%d of %d histories do not converge, want none", wrong, seeds)
				}
			})
		}
	}
}

// TestHistoriesPassCorrectOld checks that a kernel that rejects a wrong Old never receives one in
// the absence of faults.
func TestHistoriesPassCorrectOld(t *testing.T) {
	t.Parallel()
	for seed := range uint64(500) {
		intn := seededIntN(seed)
		kernel := fake.New(fake.Options{Strict: true})
		syncer := newTestSyncer(unknownUntilReplace, kernel)
		c := newCluster()
		for range 40 {
			c.change(intn)
			syncer.sync(t.Context(), c.desired, true)
			if syncer.allUnknown || len(syncer.unknown) > 0 {
				t.Fatalf("seed %d: a call failed: all keys unknown: %t, unknown keys: %v", seed, syncer.allUnknown, syncer.unknown)
			}
		}
	}
}

// FuzzHistory searches for histories that do not converge.
func FuzzHistory(f *testing.F) {
	for seed := range uint64(8) {
		intn := seededIntN(seed)
		data := make([]byte, 400)
		for i := range data {
			data[i] = byte(intn(256))
		}
		f.Add(seed, seed%2 == 0, data)
	}
	f.Fuzz(func(t *testing.T, seed uint64, perObject bool, data []byte) {
		opts := fake.Options{PerObject: perObject, Strict: !perObject && seed%4 == 1}
		if diff := runHistory(t, unknownUntilReplace, opts, allFaults(opts), seed, bytesIntN(data)); diff != "" {
			t.Errorf("the history does not converge:\n%s", diff)
		}
	})
}
