package nft

import (
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/google/nftables"
)

// tryNFT runs the nft program with a script that may fail.
func tryNFT(t *testing.T, ns *nettest.Namespace, script string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	err := ns.Do(cmd.Run)
	return out.String(), err
}

// ownerTestbed is a testbed whose Dataplane can be closed and reopened.
type ownerTestbed struct {
	*testbed
	*Dataplane // shadows the Dataplane of testbed, which only created the tables
}

// reopen closes the Dataplane, as the end of its process does, and opens a new one.
func (b *ownerTestbed) reopen(own bool) {
	b.t.Helper()
	b.close()
	var err error
	if b.Dataplane, err = Open(Options{NetNS: b.netns.Fd(), Logger: b.testbed.log.logger(), OwnTables: own}); err != nil {
		b.t.Fatal(err)
	}
	b.replace()
}

func (b *ownerTestbed) close() {
	b.t.Helper()
	if b.Dataplane == nil {
		return
	}
	if err := b.Close(); err != nil {
		b.t.Error(err)
	}
	b.Dataplane = nil
}

func (b *ownerTestbed) replace() {
	b.t.Helper()
	mustReplace(b.t, b.Dataplane, b.testbed.node, b.services...)
}

// checkOwner checks whether both tables have this Dataplane as owner, or none.
func (b *ownerTestbed) checkOwner(when string, want bool) {
	b.t.Helper()
	for _, t := range b.tables {
		info, err := b.dump.listTables(b.t.Context(), t.nf.Family)
		if err != nil {
			b.t.Fatal(err)
		}
		got := info[t.nf.Name]
		if has := got.flags&nftables.TableFlagOwner != 0; has != want || has && got.owner != b.portID {
			b.t.Errorf("%s: table %s has flags %b and owner %d, want an owner: %t (%d)", when, t, got.flags, got.owner, want, b.portID)
		}
	}
}

// TestTableOwnership tries to change owned tables under load, and starts instances with and
// without ownership one after the other.
func TestTableOwnership(t *testing.T) {
	t.Parallel()
	b := &ownerTestbed{testbed: newTestbed(t)}
	defer b.endLoad()
	defer b.close()

	b.reopen(true)
	if !b.OwnsTables() {
		t.Log("this kernel does not support table ownership")
		b.testbed.log.check(t, "with ownership on an old kernel", false)
		b.checkOwner("on an old kernel", false)
		b.check("with ownership on an old kernel")
		return
	}
	b.testbed.log.check(t, "with ownership of tables without an owner", true)
	b.checkOwner("with ownership", true)
	b.check("with ownership of tables without an owner")
	b.expectChangesRejected()

	other, err := Open(Options{NetNS: b.netns.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for what, err := range map[string]error{
		"Replace by another process": other.Replace(t.Context(), b.testbed.node, slices.Values(b.services), nil),
		"Cleanup":                    Cleanup(Options{NetNS: b.netns.Fd()}),
	} {
		if !errors.Is(err, ErrOwned) || !strings.Contains(err.Error(), "table ip fairlead belongs to ") {
			t.Errorf("%s: %v, want ErrOwned", what, err)
		}
	}

	b.reopen(true)
	b.testbed.log.check(t, "warm restart with ownership", false)
	b.checkOwner("warm restart with ownership", true)
	b.check("warm restart with ownership")

	b.schema++ // like an upgrade
	b.replace()
	b.testbed.log.check(t, "new schema", true)
	b.checkOwner("new schema", true)
	b.check("new schema")
	b.schema--
	b.replace()
	b.testbed.log.check(t, "old schema", true)

	b.reopen(false)
	b.testbed.log.check(t, "warm restart without ownership", false)
	b.checkOwner("warm restart without ownership", false)
	if out, err := tryNFT(t, b.netns, "insert rule ip fairlead filter-forward counter"); err != nil {
		t.Errorf("manual edit without ownership: %v: %s", err, out)
	}
	b.replace()
	b.check("without ownership")

	b.reopen(true)
	b.testbed.log.check(t, "ownership again", false)
	b.checkOwner("ownership again", true)
	b.check("ownership again")

	b.stopLoad()
	b.load.Wait()
	b.close()
	if err := Cleanup(Options{NetNS: b.netns.Fd()}); err != nil {
		t.Error(err)
	}
	if out, err := tryNFT(t, b.netns, "list tables"); err != nil || strings.Contains(out, "fairlead") {
		t.Errorf("tables after Cleanup: %v: %s", err, out)
	}
}

// expectChangesRejected checks that other processes cannot change the owned tables.
func (b *ownerTestbed) expectChangesRejected() {
	b.t.Helper()
	for _, script := range []string{
		"delete table ip fairlead",
		"add table ip fairlead { flags dormant; }",
		"flush table ip fairlead",
		"insert rule ip fairlead filter-forward counter",
		"delete element ip fairlead services { 10.96.0.1 . tcp . 80 }",
	} {
		if out, err := tryNFT(b.t, b.netns, script); err == nil {
			b.t.Errorf("nft %s succeeded: %s", script, out)
		}
	}
	b.check("changes by other processes")
	generation, err := b.currentGeneration()
	if err != nil {
		b.t.Fatal(err)
	}
	if out, err := tryNFT(b.t, b.netns, strings.Repeat("add table ip other\nflush ruleset\n", 100)); err != nil {
		b.t.Fatalf("nft flush ruleset: %v: %s", err, out)
	}
	conn, err := nftables.New(nftables.WithNetNSFd(b.netns.Fd()))
	if err != nil {
		b.t.Fatal(err)
	}
	for until := b.opened.Load() + 100; b.opened.Load() < until && b.failed.Load() == 0; {
		conn.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyIPv4})
		conn.FlushRuleset()
		if err := conn.Flush(); err != nil {
			b.t.Fatal(err)
		}
	}
	b.check("nft flush ruleset in a loop")
	if out, err := tryNFT(b.t, b.netns, "list table ip fairlead"); err != nil || !strings.Contains(out, "flags owner") {
		b.t.Errorf("nft list table: %v: %.200s", err, out)
	}
	if now, err := b.currentGeneration(); err != nil || now == generation {
		b.t.Errorf("the flushes did not change the generation: %v", err)
	}
	select {
	case <-b.Lost():
		b.t.Error("the flushes were reported as a loss")
	case <-time.After(10 * time.Millisecond):
	}
}

// TestOwnershipHandover makes an instance wait in Replace until the owner of the tables
// exits.
func TestOwnershipHandover(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	opts := Options{NetNS: network.Node.Fd(), OwnTables: true}
	first, err := Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	if !first.OwnsTables() {
		_ = first.Close()
		t.Skip("this kernel does not support table ownership")
	}
	mustReplace(t, first, nodeWithPodCIDRs(), sampleServices(t)...)
	second := openWithOptions(t, network.Node.Namespace, opts)
	for range 2 { // the first call only detects the tables
		if err := second.Prefetch(t.Context(), dataplane.Desired{Node: nodeWithPodCIDRs(), Services: slices.Values(sampleServices(t))}); err != nil {
			t.Fatal(err)
		}
	}
	closed := make(chan error, 1)
	time.AfterFunc(50*time.Millisecond, func() { closed <- first.Close() })
	mustReplace(t, second, nodeWithPodCIDRs(), sampleServices(t)...)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	(&ownerTestbed{testbed: &testbed{t: t}, Dataplane: second}).checkOwner("after the owner exited", true)
}
