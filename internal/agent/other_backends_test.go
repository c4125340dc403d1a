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
	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/sync"
)

// TestRemoveOtherBackends checks that the kernel state of other modes is removed after the first
// successful commit and not before, and that failures are only logged.
func TestRemoveOtherBackends(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		mode string
		err  error
		want string // names of the removed backends
		log  string
	}{
		{backend.NFT, nil, "ipvs", `level=INFO msg="no kernel state of another mode remains" other_mode=ipvs`},
		{backend.IPVS, nil, "nft", `level=INFO msg="no kernel state of another mode remains" other_mode=nft`},
		{backend.IPVS, errors.New("no"), "nft", `level=WARN msg="removing the kernel state of another mode failed; the next start retries" other_mode=nft error=no`},
	} {
		t.Run(test.want+" "+test.log[:10], func(t *testing.T) {
			t.Parallel()
			var log bytes.Buffer
			var cleaned []string
			comp := newComponents(slog.New(slog.NewTextHandler(&log, nil)))
			done := make(chan struct{})
			ctx, cancel := context.WithTimeout(t.Context(), waitTimeout)
			defer cancel()
			committed := make(chan bool, 1)
			go func() {
				defer close(done)
				removeOtherBackends(ctx, backendByName(t, test.mode), comp.log, comp.programmed, func(b backend.Backend, _ context.Context, _ *slog.Logger) error {
					cleaned = append(cleaned, b.Name)
					select {
					case <-committed:
					default:
						t.Error("removed before the first successful commit")
					}
					return test.err
				})
			}()
			comp.commits.notify(sync.Commit{Start: time.Now(), End: time.Now(), Err: errors.New("not yet")})
			committed <- true
			comp.commits.notify(sync.Commit{Start: time.Now(), End: time.Now()})
			<-done
			comp.commits.notify(sync.Commit{Start: time.Now(), End: time.Now()})
			if got := strings.Join(cleaned, " "); got != test.want {
				t.Errorf("removed the state of %q, want %q", got, test.want)
			}
			if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, test.log) {
				t.Errorf("log %q, want %q", got, test.log)
			}
		})
	}
}

// TestRemoveOtherBackendsCanceled checks that nothing is removed if the agent stops before the first
// successful commit.
func TestRemoveOtherBackendsCanceled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	removeOtherBackends(ctx, backendByName(t, backend.IPVS), slog.New(slog.DiscardHandler), make(chan struct{}), func(b backend.Backend, _ context.Context, _ *slog.Logger) error {
		t.Errorf("removed the state of %s", b.Name)
		return nil
	})
}

// TestIPVSRemovesNFTTables checks that ipvs mode removes the tables of nft mode and no others.
func TestIPVSRemovesNFTTables(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.nft(agenttest.OtherTables)
	foreign := n.nft("list", "ruleset")
	pod := n.PodT(t, "a")
	pod.ServeT(t, nettest.TCP, podPort)
	var services []*dataplane.Service
	for i, addr := range agenttest.ServiceAddrs(10, 80) {
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
	for _, addr := range agenttest.ServiceAddrs(10, 80) {
		ctx, cancel := context.WithTimeout(t.Context(), waitTimeout)
		if answer, err := n.client.Connect(ctx, nettest.TCP, addr); err != nil || answer.Host != "a" {
			t.Errorf("%s: answer from %q, error %v; want a", addr, answer.Host, err)
		}
		cancel()
	}
	if err := dp.Close(); err != nil {
		t.Fatal(err)
	}
	programmed := make(chan struct{})
	close(programmed)
	err := n.Node.Do(func() error {
		removeOtherBackends(t.Context(), backendByName(t, backend.IPVS), slog.New(slog.DiscardHandler), programmed, backend.Backend.RemoveDrained)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(foreign, n.nft("list", "ruleset")); diff != "" {
		t.Errorf("ruleset (-want +got):\n%s", diff)
	}
}
