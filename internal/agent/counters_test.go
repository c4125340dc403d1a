package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	stdsync "sync"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/kube/kubetest"
)

// TestRefusedServiceCIDR checks the metric of packets to unused addresses of a ServiceCIDR.
func TestRefusedServiceCIDR(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	dp := dialBackend(t, n.Network, backend.NFT)
	p := pipeline.New(dp, pipeline.Options{Tracker: kube.Options{NodeName: "node"}})
	syncer := p.Syncer
	var group stdsync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	group.Go(func() { _ = syncer.Run(ctx) })
	t.Cleanup(func() {
		stop()
		group.Wait()
		if err := dp.Close(); err != nil {
			t.Error(err)
		}
	})
	comp := newComponents(slog.New(slog.DiscardHandler))
	comp.pipeline, comp.sourceHasNodes = p, false
	comp.deliver(kube.Delta{ServiceCIDRs: sliceOf(kubetest.ServiceCIDR("kubernetes", "10.96.0.0/16", "fd00:10:96::/112"))})
	if err := syncer.WaitSynced(t.Context()); err != nil {
		t.Fatal(err)
	}
	agenttest.ExpectNoAnswer(t, n.client, agenttest.ServiceAddrs(1, 80))

	c := newPacketCounters(backendByName(t, backend.NFT), slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	})
	var counts []metrics.RefusedPackets
	err := n.Node.Do(func() (err error) { // the first read opens the netlink socket
		counts, err = c.readRefused()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	response := httptest.NewRecorder()
	m := metrics.New(metrics.Options{Status: syncer.Status, RefusedPackets: func() ([]metrics.RefusedPackets, error) { return counts, nil }})
	m.Handler().ServeHTTP(response, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	for _, family := range []string{"IPv4", "IPv6"} {
		want := fmt.Sprintf("\nfairlead_refused_packets_total{ip_family=%q,reason=\"no-service\",verdict=\"drop\"} 1\n", family)
		if !strings.Contains(response.Body.String(), want) {
			t.Errorf("no %q in\n%s", want, response.Body)
		}
	}
}

// TestModeCounters checks that each mode reads the counters of its own tables.
func TestModeCounters(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.nft("add table ip fairlead-ipvs; add counter ip fairlead-ipvs rejected-no-endpoints { packets 7 bytes 420; };" +
		"add table ip fairlead; add counter ip fairlead rejected-no-endpoints { packets 3 bytes 180; }")
	for m, want := range map[string]uint64{backend.NFT: 3, backend.IPVS: 7} {
		c := newPacketCounters(backendByName(t, m), slog.New(slog.DiscardHandler))
		t.Cleanup(func() { _ = c.close() })
		var counts []metrics.RefusedPackets
		err := n.Node.Do(func() (err error) { // the first read opens the netlink socket
			counts, err = c.readRefused()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(counts, func(u metrics.RefusedPackets) bool {
			return u.Family == dataplane.IPv4 && u.Verdict == metrics.Reject && u.Reason == "no-endpoints"
		})
		if i < 0 || counts[i].Packets != want {
			t.Errorf("--mode=%s: counters %+v, want %d packets rejected without endpoints", m, counts, want)
		}
	}
}

// TestUnreadableCounters checks that consecutive failures are logged once, and the next success as
// well.
func TestUnreadableCounters(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	var failure error
	c := &packetCounters{
		log: slog.New(slog.NewJSONHandler(&log, nil)),
		read: func(ctx context.Context) ([]metrics.RefusedPackets, error) {
			if _, ok := ctx.Deadline(); !ok {
				t.Error("the context has no deadline")
			}
			return nil, failure
		},
	}
	var levels []string
	for _, failure = range []error{nil, errors.New("one"), errors.New("two"), nil, nil, errors.New("three")} {
		if _, err := c.readRefused(); !errors.Is(err, failure) {
			t.Errorf("error %v, want %v", err, failure)
		}
	}
	for line := range strings.Lines(log.String()) {
		var r struct{ Level, Error string }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		levels = append(levels, r.Level+" "+r.Error)
	}
	if want := []string{"WARN one", "INFO ", "WARN three"}; !slices.Equal(levels, want) {
		t.Errorf("logged %q, want %q:\n%s", levels, want, log.String())
	}
}
