package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// TestDumpDuringResize dumps a set while the kernel moves its elements to a hash table of
// another size. An incomplete dump must be reported as inconsistent.
func TestDumpDuringResize(t *testing.T) {
	t.Parallel()
	d, _ := newDataplane(t)
	mustReplace(t, d, dataplane.Node{})
	table := d.tables[familyIndex(dataplane.IPv4)]
	set := table.addrSets[clusterIPAddrs]
	const elements = 20_000
	all := make([]element, elements)
	for i := range all {
		all[i].Key = binary.BigEndian.AppendUint32(nil, 10<<24+uint32(i))
	}
	change := func(how func(*nftables.Set, []element) error, part []element) {
		t.Helper()
		if err := errors.Join(how(set, part), d.conn.Flush()); err != nil {
			t.Fatal(err)
		}
	}
	incomplete := 0
	for range 10 {
		before := generation(t, d)
		change(d.conn.SetAddElements, all)
		for range 2 {
			found := map[string]bool{}
			d.dump.inconsistent = false
			if err := d.dump.dumpElements(t.Context(), set, func(e element, _ bool) { found[string(e.Key)] = true }); err != nil {
				t.Fatal(err)
			}
			if len(found) == elements {
				continue
			}
			incomplete++
			if !d.dump.inconsistent {
				t.Errorf("dump has %d of %d elements but is not marked inconsistent", len(found), elements)
			}
			if now := generation(t, d); now != before+1 {
				t.Errorf("generation %d, want %d: another process changed the ruleset", now, before+1)
			}
		}
		d.conn.FlushSet(set)
		if err := d.conn.Flush(); err != nil {
			t.Fatal(err)
		}
		if incomplete > 0 {
			break
		}
	}
	t.Logf("%d dumps were incomplete", incomplete)
}

// TestReadRetries commits other changes while the tables are read.
func TestReadRetries(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	services := sampleServices(t)
	mustReplace(t, d, nodeWithAllSettings(), services...)
	tool := nftBinaries(t)["1.1.3"]
	read := func(interfere func(n int)) (reads int, verified bool) {
		t.Helper()
		_, verified, err := d.readConsistently(t.Context(), func() error {
			reads++
			interfere(reads)
			_, err := d.readTable(t.Context(), d.tables[0])
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return reads, verified
	}
	for _, test := range []struct {
		name      string
		interfere func(n int)
		reads     int
		verified  bool
	}{
		{"no other commit", func(int) {}, 1, true},
		{"other table", func(int) { runNFT(t, ns, tool, "add table ip others\ndelete table ip others") }, 1, true},
		{"our table once", func(n int) {
			if n == 1 {
				runNFT(t, ns, tool, "add element ip fairlead cluster-ips { 10.96.7.7 }")
			}
		}, 2, true},
		{"our table on each read", func(int) {
			runNFT(t, ns, tool, "add element ip fairlead cluster-ips { 10.96.7.7 }; delete element ip fairlead cluster-ips { 10.96.7.7 }")
		}, readAttempts, false},
		{"inconsistent dump once", func(n int) { d.dump.inconsistent = n == 1 }, 2, true},
	} {
		reads, verified := read(test.interfere)
		if reads != test.reads || verified != test.verified {
			t.Errorf("%s: read %d times, verified %t; want %d, %t", test.name, reads, verified, test.reads, test.verified)
		}
	}

	interfered := errors.New("interfered")
	if _, _, err := d.readConsistently(t.Context(), func() error { return interfered }); !errors.Is(err, interfered) {
		t.Errorf("error %v, want the error of the read", err)
	}
	reads := 0
	if _, _, err := d.readConsistently(t.Context(), func() error {
		reads++
		runNFT(t, ns, tool, "add table ip others\ndelete table ip others")
		return unix.ENOENT
	}); !errors.Is(err, unix.ENOENT) || reads != readAttempts {
		t.Errorf("error %v after %d reads, want ENOENT after %d", err, reads, readAttempts)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := d.readConsistently(canceled, func() error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want the error of the context", err)
	}
}

// TestWatchRecovers closes the watch's socket. The watch must open a new socket and signal
// drift, because it may have missed notifications.
func TestWatchRecovers(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	services := []*dataplane.Service{service(t, "s", []dataplane.Frontend{frontend(1)}, endpoints(1, 2))}
	mustReplace(t, d, nodeWithAllSettings(), services...)
	for range 2 {
		d.watch.mu.Lock()
		conn := d.watch.conn
		d.watch.mu.Unlock()
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		wantDrift(t, d) // notifications may have been lost
		drainNotifications(t, d)
		wantSubscribed(t, d, ns)
		runNFT(t, ns, nftBinaries(t)["1.1.3"], "add element ip fairlead cluster-ips { 10.96.7.7 }")
		wantDrift(t, d)
		mustReplace(t, d, nodeWithAllSettings(), services...)
		drainNotifications(t, d)
		wantState(t, d, services...)
	}
}

// TestElementStatementsRemoved replaces elements by equal elements with a statement, which
// the definition of a set does not show. One Replace must remove the statements.
func TestElementStatementsRemoved(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	services := sampleServices(t)
	mustReplace(t, d, nodeWithAllSettings(), services...)
	tool := nftBinaries(t)["1.1.3"]
	before := sortedLines(runNFT(t, ns, tool, "list ruleset"))
	other, err := nftables.New(nftables.WithNetNSFd(ns.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	table := d.tables[familyIndex(dataplane.IPv4)]
	for _, set := range []*nftables.Set{table.services, table.endpoints[1], table.verdicts[vmapClasses], table.nodePortAddrs, table.addrSets[clusterIPAddrs]} {
		var all []element
		if err := d.dump.dumpElements(t.Context(), set, func(e element, _ bool) { all = append(all, cloneElement(e)) }); err != nil {
			t.Fatal(err)
		}
		if len(all) == 0 {
			t.Fatalf("set %s is empty", set.Name)
		}
		with := table.plainElements(set, all[:1])
		with[0].Counter = &expr.Counter{}
		for _, change := range []func(*nftables.Set, []element) error{other.SetDeleteElements, other.SetAddElements} {
			if err := change(set, with); err != nil {
				t.Fatal(err)
			}
		}
		if err := other.Flush(); err != nil {
			t.Fatalf("set %s: %v", set.Name, err)
		}
		wantDrift(t, d)
		drainNotifications(t, d)
		if slices.Equal(before, sortedLines(runNFT(t, ns, tool, "list ruleset"))) {
			t.Errorf("set %s: the statement was not added", set.Name)
		}
		mustReplace(t, d, nodeWithAllSettings(), services...)
		if diff := cmp.Diff(before, sortedLines(runNFT(t, ns, tool, "list ruleset"))); diff != "" {
			t.Errorf("set %s: after the repair (-before +after):\n%s", set.Name, diff)
		}
	}
}
