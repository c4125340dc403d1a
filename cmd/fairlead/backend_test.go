package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/sync"
)

// byName returns a backend of the table.
func byName(t *testing.T, name string) backend.Backend {
	t.Helper()
	b, err := backend.ByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What a tracker is told depends on the mode that runs: where node ports are
// served unless somebody says it, and which schedulers there are.
func TestModeTracker(t *testing.T) {
	t.Parallel()
	network := kube.NodePortAddresses{CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	primary := kube.NodePortAddresses{Primary: true}
	all := kube.NodePortAddresses{All: true}
	for _, test := range []struct {
		name        string
		mode        string
		given, want kube.NodePortAddresses
		schedulers  []string
	}{
		{"nft: the primary addresses, which the zero value stands for", backend.NFT, kube.NodePortAddresses{}, kube.NodePortAddresses{}, nil},
		{"nft, with a folder", backend.NFT, all, all, nil},
		{"nft, networks", backend.NFT, network, network, nil},
		{"ipvs: all addresses", backend.IPVS, kube.NodePortAddresses{}, all, ipvs.Schedulers()},
		{"ipvs, primary", backend.IPVS, primary, primary, ipvs.Schedulers()},
		{"ipvs, networks", backend.IPVS, network, network, ipvs.Schedulers()},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got := trackerOptions(byName(t, test.mode), kube.Options{NodeName: "node", NodePortAddresses: test.given})
			want := kube.Options{NodeName: "node", NodePortAddresses: test.want, Schedulers: test.schedulers}
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// A file that names another mode changes nothing that goes with the mode: the one
// that runs stays until a restart.
func TestModeStaysUntilRestart(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		runs, file string
		everywhere bool
	}{{backend.NFT, backend.IPVS, false}, {backend.IPVS, backend.NFT, true}, {backend.NFT, backend.NFT, false}, {backend.IPVS, backend.IPVS, true}} {
		t.Run(test.runs+" to "+test.file, func(t *testing.T) {
			t.Parallel()
			var log bytes.Buffer
			j := newJoin(slog.New(slog.NewTextHandler(&log, nil)))
			p := &program{log: j.log, backend: byName(t, test.runs), join: j.join, metrics: j.metrics}
			was, _, err := config.Load(config.Flags{"hostname-override": "node"})
			if err != nil {
				t.Fatal(err)
			}
			next := was
			was.Mode, next.Mode = test.runs, test.file
			p.applier(was, &slog.LevelVar{})(t.Context(), next)
			if j.nodePorts.All != test.everywhere {
				t.Errorf("node ports are served on all addresses: %t, want %t", j.nodePorts.All, test.everywhere)
			}
			if got := strings.Contains(log.String(), "needs a restart"); got != (test.runs != test.file) || got && !strings.Contains(log.String(), "what=mode\n") {
				t.Errorf("log:\n%s", &log)
			}
		})
	}
}

// Each mode counts what its own tables have not served.
func TestModeCounters(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.nft("add table ip fairlead-ipvs; add counter ip fairlead-ipvs rejected-no-endpoints { packets 7 bytes 420; };" +
		"add table ip fairlead; add counter ip fairlead rejected-no-endpoints { packets 3 bytes 180; }")
	for m, want := range map[string]uint64{backend.NFT: 3, backend.IPVS: 7} {
		c := newCounters(byName(t, m), slog.New(slog.DiscardHandler))
		t.Cleanup(func() { _ = c.close() })
		var counts []metrics.Unserved
		err := n.Node.Do(func() (err error) { // where it connects to the kernel
			counts, err = c.unserved()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(counts, func(u metrics.Unserved) bool {
			return u.Family == dataplane.IPv4 && u.Reason == "rejected-no-endpoints"
		})
		if i < 0 || counts[i].Packets != want {
			t.Errorf("--mode=%s: counted %+v, want %d packets", m, counts, want)
		}
	}
}

// A mode removes what the others have left when it has programmed everything, and
// not before. What goes wrong is logged, and stops nothing.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		mode string
		err  error
		want string // cleaned up
		log  string
	}{
		{backend.NFT, nil, "ipvs", `level=INFO msg="nothing that another mode has programmed is left" other_mode=ipvs`},
		{backend.IPVS, nil, "nft", `level=INFO msg="nothing that another mode has programmed is left" other_mode=nft`},
		{backend.IPVS, errors.New("no"), "nft", `level=WARN msg="what another mode may have programmed is still there; the next start tries again" other_mode=nft error=no`},
	} {
		t.Run(test.want+" "+test.log[:10], func(t *testing.T) {
			t.Parallel()
			var log bytes.Buffer
			var cleaned []string
			j := newJoin(slog.New(slog.NewTextHandler(&log, nil)))
			done := make(chan struct{})
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			committed := make(chan bool, 1)
			go func() {
				defer close(done)
				takeOver(ctx, byName(t, test.mode), j.log, j.programmed, func(b backend.Backend, _ *slog.Logger) error {
					cleaned = append(cleaned, b.Name)
					select {
					case <-committed:
					default:
						t.Error("removed before anything was programmed")
					}
					return test.err
				})
			}()
			j.commits.notify(sync.Commit{Start: time.Now(), End: time.Now(), Err: errors.New("not yet")})
			committed <- true
			j.commits.notify(sync.Commit{Start: time.Now(), End: time.Now()})
			<-done
			j.commits.notify(sync.Commit{Start: time.Now(), End: time.Now()})
			if got := strings.Join(cleaned, " "); got != test.want {
				t.Errorf("removed what is of %q, want %q", got, test.want)
			}
			if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, test.log) {
				t.Errorf("log %q, want %q", got, test.log)
			}
		})
	}
}

// A program that ends before it has programmed everything removes nothing.
func TestNoTakeOver(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	takeOver(ctx, byName(t, backend.IPVS), slog.New(slog.DiscardHandler), make(chan struct{}), func(b backend.Backend, _ *slog.Logger) error {
		t.Errorf("removed what is of %s", b.Name)
		return nil
	})
}

// The tables of the mode nft go when another has taken over, and nothing else does.
func TestTakeOverFromNFT(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a")
	n.nft(foreignTables)
	foreign := n.nft("list", "ruleset")
	n.put("backend.yaml", serviceYAML("backend", 10, 80))
	n.putPods("backend", "a")
	n.run()
	n.awaitAnswers(vips(10, 80), "a")
	n.stop()
	programmed := make(chan struct{})
	close(programmed)
	err := n.Node.Do(func() error {
		takeOver(t.Context(), byName(t, backend.IPVS), slog.New(slog.DiscardHandler), programmed, backend.Backend.Remove)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(foreign, n.nft("list", "ruleset")); diff != "" {
		t.Errorf("the ruleset (-others' +now):\n%s", diff)
	}
}

// leftByIPVS is what an ended program of the mode ipvs leaves in nftables, as far as
// its name goes.
const leftByIPVS = "add table ip " + ipvs.TableName + "; add table ip6 " + ipvs.TableName

// The mode nft removes the other's tables once it has programmed its own, and
// `fairlead cleanup` removes both, on a kernel without IPVS as well.
func TestTakeOverByNFT(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a")
	n.nft(leftByIPVS)
	n.put("backend.yaml", serviceYAML("backend", 10, 80))
	n.putPods("backend", "a")
	n.run()
	n.program.await(func(r record) bool { return r.Msg == "nothing that another mode has programmed is left" })
	if listing := n.nft("list", "tables"); strings.Contains(listing, ipvs.TableName) || !strings.Contains(listing, "table ip fairlead\n") {
		t.Errorf("the tables are:\n%s", listing)
	}
	n.awaitAnswers(vips(10, 80), "a")
	n.stop()
	n.nft(leftByIPVS)
	if code, stderr := n.once(nil, "cleanup"); code != 0 || stderr != "" {
		t.Errorf("cleanup: exit code %d, output %q, want 0 and nothing", code, stderr)
	}
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("cleanup left:\n%s", listing)
	}
}

// The mode ipvs either programs the kernel, or ends at once and says what the
// kernel lacks.
func TestModeIPVS(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a")
	n.put("backend.yaml", serviceYAML("backend", 10, 80))
	n.putPods("backend", "a")
	args := append(n.runArgs(), "--mode=ipvs")
	n.program = n.start(nil, args...)
	has := false
	eventually(t, func() error {
		has = slices.ContainsFunc(n.program.log.records(), func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
		select {
		case <-n.program.ended:
			return nil
		default:
		}
		if !has {
			return errors.New("neither")
		}
		return nil
	})
	if has {
		n.awaitAnswers(vips(10, 80), "a")
		n.awaitGet(n.Node, "127.0.0.1:10249", "/proxyMode", 200, "ipvs")
		n.stop()
		return
	}
	lacks := func(code int, stderr string) {
		t.Helper()
		last := stderr[strings.LastIndex(strings.TrimSpace(stderr), "\n")+1:]
		if code != 1 || !strings.HasPrefix(last, "fairlead: --mode=ipvs: the kernel cannot run the ipvs mode: ") ||
			!strings.Contains(last, "ip_vs") && !strings.Contains(last, "dummy") {
			t.Errorf("exit code %d, output %q; want 1, and which module is missing", code, stderr)
		}
	}
	lacks(n.program.wait(), n.program.log.String())
	lacks(n.once(nil, append(args, "--init-only")...))
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("the ruleset has:\n%s", listing)
	}
}

// An annotation that the mode can't follow is told of, and the Service is served.
func TestSchedulerWithoutIPVS(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a")
	n.put("backend.yaml", strings.Replace(serviceYAML("backend", 10, 80), "name: backend\n",
		"name: backend\n  annotations: {fairlead.io/ipvs-scheduler: lc}\n", 1))
	n.putPods("backend", "a")
	n.run()
	n.program.await(func(r record) bool { return r.Msg == "Service can't be carried out as written" && r.Level == "WARN" })
	n.awaitAnswers(vips(10, 80), "a")
}
