package agent

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
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/sync"
)

// A mode removes what the others have left when it has programmed everything, and
// not before. What goes wrong is logged, and stops nothing.
func TestRemoveOtherBackends(t *testing.T) {
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
			j := newComponents(slog.New(slog.NewTextHandler(&log, nil)))
			done := make(chan struct{})
			ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
			defer cancel()
			committed := make(chan bool, 1)
			go func() {
				defer close(done)
				removeOtherBackends(ctx, backendByName(t, test.mode), j.log, j.programmed, func(b backend.Backend, _ *slog.Logger) error {
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
func TestRemoveOtherBackendsCanceled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	removeOtherBackends(ctx, backendByName(t, backend.IPVS), slog.New(slog.DiscardHandler), make(chan struct{}), func(b backend.Backend, _ *slog.Logger) error {
		t.Errorf("removed what is of %s", b.Name)
		return nil
	})
}

// otherTables are somebody else's, made with nft.
const otherTables = `
	add table ip foreign
	add chain ip foreign in { type filter hook input priority 0; policy accept; }
	add set ip foreign services { type ipv4_addr; elements = { 10.96.0.10 }; }
	add table ip6 foreign
	add table inet fairlead
	add chain inet fairlead prerouting
	add rule inet fairlead prerouting counter`

// The tables of the mode nft go when another has taken over, and nothing else does.
func TestIPVSRemovesNFTTables(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.nft(otherTables)
	foreign := n.nft("list", "ruleset")
	pod := n.PodT(t, "a")
	pod.ServeT(t, nettest.TCP, podPort)
	var services []*dataplane.Service
	for i, addr := range serviceAddrs(10, 80) {
		service, err := dataplane.NewService(
			dataplane.Key{Namespace: "default", Name: "backend", Family: dataplane.FamilyOf(addr.Addr())},
			[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: addr}},
			dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.Addrs()[i], podPort), Local: true}}},
		)
		if err != nil {
			t.Fatal(err)
		}
		services = append(services, service)
	}
	dp := dialBackend(t, n.Network, backend.NFT)
	if err := dp.Replace(t.Context(), dataplane.Node{}, slices.Values(services), nil); err != nil {
		t.Fatal(err)
	}
	for _, addr := range serviceAddrs(10, 80) {
		ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
		if answer, err := n.client.Connect(ctx, nettest.TCP, addr); err != nil || answer.Host != "a" {
			t.Errorf("%s: answered by %q, error %v, want a", addr, answer.Host, err)
		}
		cancel()
	}
	if err := dp.Close(); err != nil {
		t.Fatal(err)
	}
	programmed := make(chan struct{})
	close(programmed)
	err := n.Node.Do(func() error {
		removeOtherBackends(t.Context(), backendByName(t, backend.IPVS), slog.New(slog.DiscardHandler), programmed, backend.Backend.Remove)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(foreign, n.nft("list", "ruleset")); diff != "" {
		t.Errorf("the ruleset (-others' +now):\n%s", diff)
	}
}
