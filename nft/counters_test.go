package nft

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/google/go-cmp/cmp"
)

// newTestCounterReader returns a CounterReader that is closed at the end of the test.
func newTestCounterReader(t testing.TB, ns *nettest.Namespace) *CounterReader {
	t.Helper()
	c := NewCounterReader(Options{NetNS: ns.Fd()})
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// readNonzeroCounters checks that all counters are read and returns the nonzero ones.
func readNonzeroCounters(t *testing.T, c *CounterReader) []CounterValue {
	t.Helper()
	all, err := c.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var reasons []string
	for _, c := range all {
		reasons = append(reasons, c.Family.String()+" "+c.Name)
	}
	var want []string
	for _, f := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		for _, c := range refusedCounters() {
			want = append(want, f.String()+" "+string(c))
		}
	}
	if diff := cmp.Diff(want, reasons); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
	return slices.DeleteFunc(all, func(c CounterValue) bool { return c.Packets == 0 && c.Bytes == 0 })
}

// TestReadCounters checks that every counter of both tables is read, that tables and counters
// of other programs are ignored, and that missing tables count as zero.
func TestReadCounters(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	c := newTestCounterReader(t, ns)
	binary := nftBinaries(t)["1.1.3"]
	if got := readNonzeroCounters(t, c); len(got) > 0 {
		t.Errorf("without tables: got %+v, want zero counters", got)
	}
	var script strings.Builder
	script.WriteString("table inet fairlead {\n counter dropped-no-service { packets 1 bytes 2 }\n}\n" +
		"table ip others {\n counter dropped-no-service { packets 3 bytes 4 }\n}\n")
	var want []CounterValue
	for i, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		fmt.Fprintf(&script, "table %s fairlead {\n comment \"%s%d\"\n counter other { packets 5 bytes 6 }\n", []string{"ip", "ip6"}[i], schemaLabel, schema)
		for n, name := range refusedCounters() {
			count := CounterValue{Family: family, Name: string(name), Packets: uint64(1000*i+n+1) << 32, Bytes: uint64(n) + 100} //nolint:gosec // small numbers
			for _, p := range protocols() {
				if strings.HasSuffix(count.Name, "-localhost-"+strings.ToLower(p.String())) {
					count.Localhost = p
				}
			}
			want = append(want, count)
			fmt.Fprintf(&script, " counter %s { packets %d bytes %d }\n", name, count.Packets, count.Bytes)
		}
		script.WriteString("}\n")
	}
	script.WriteString("table ip others2 {\n counter dropped-no-service { packets 3 bytes 4 }\n}\n") // the kernel lists it last
	runNFT(t, ns, binary, script.String())
	if diff := cmp.Diff(want, readNonzeroCounters(t, c)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// Replace preserves the counts.
	mustReplace(t, d, nodeWithPodCIDRs(), sampleServices(t)...)
	if diff := cmp.Diff(want, readNonzeroCounters(t, c)); diff != "" {
		t.Errorf("after a Replace (-want +got):\n%s", diff)
	}
	runNFT(t, ns, binary, "add quota ip fairlead dropped-no-service { over 7 bytes }")
	if diff := cmp.Diff(want, readNonzeroCounters(t, c)); diff != "" {
		t.Errorf("with a quota of the same name (-want +got):\n%s", diff)
	}
	if err := Cleanup(Options{NetNS: ns.Fd()}); err != nil {
		t.Fatal(err)
	}
	mustReplace(t, d, nodeWithPodCIDRs(), sampleServices(t)...)
	if got := readNonzeroCounters(t, c); len(got) > 0 {
		t.Errorf("in new tables: got %+v, want zero counters", got)
	}
}

// TestReadCountersDuringCommits checks that concurrent reads work while a Dataplane commits,
// and cause no drift.
func TestReadCountersDuringCommits(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t)
	c := newTestCounterReader(t, ns)
	services := sampleServices(t)
	mustReplace(t, d, nodeWithPodCIDRs(), services...)
	var readers sync.WaitGroup
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 100 {
			for _, change := range [][2]*dataplane.Service{{services[0], nil}, {nil, services[0]}} {
				if err := d.Apply(t.Context(), []dataplane.Change{{Old: change[0], New: change[1]}}); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	for range 4 {
		readers.Go(func() {
			for range 25 {
				readNonzeroCounters(t, c)
			}
		})
	}
	readers.Wait()
	<-done
	wantNoDrift(t, d)
}

// TestReadCountersCancelled checks that a canceled read returns at once and that the next
// read succeeds.
func TestReadCountersCancelled(t *testing.T) {
	t.Parallel()
	_, ns := newDataplane(t)
	c := newTestCounterReader(t, ns)
	readNonzeroCounters(t, c)
	cause := errors.New("client disconnected")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if counts, err := c.Read(ctx); !errors.Is(err, cause) || counts != nil {
		t.Errorf("counts %v, error %v; want %v", counts, err, cause)
	}
	for i := range 50 { // cancel at different times
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Duration(i)*10*time.Microsecond, cause)
		if _, err := c.Read(ctx); err != nil && !errors.Is(err, cause) {
			t.Errorf("error %v, want %v", err, cause)
		}
		cancel()
		readNonzeroCounters(t, c)
	}
}

// TestReadCountersAfterFailure checks that a broken connection is replaced.
func TestReadCountersAfterFailure(t *testing.T) {
	t.Parallel()
	_, ns := newDataplane(t)
	c := newTestCounterReader(t, ns)
	readNonzeroCounters(t, c)
	if err := c.conn.Close(); err != nil {
		t.Fatal(err)
	}
	if counts, err := c.Read(t.Context()); err == nil {
		t.Errorf("read %v without a connection", counts)
	}
	readNonzeroCounters(t, c)
}

func BenchmarkReadCounters(b *testing.B) {
	ns, err := nettest.NewNamespace("")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = ns.Close() })
	c := newTestCounterReader(b, ns)
	d, err := Open(Options{NetNS: ns.Fd()})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = d.Close() })
	if err := d.Replace(b.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service(nil)), nil); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := c.Read(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
