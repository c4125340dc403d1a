package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	stdsync "sync"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/sync"
)

// awaitCounted waits until the metrics have so many packets of a label, for each
// family.
func (n *node) awaitCounted(metric, label, value string, want int) {
	n.t.Helper()
	for _, family := range []string{"IPv4", "IPv6"} {
		n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK,
			fmt.Sprintf("\n%s{ip_family=%q,%s=%q} %d\n", metric, family, label, value, want))
	}
}

// connectInVain sends a packet to each of the addresses.
func (n *node) connectInVain(from *nettest.Host, addrs []netip.AddrPort) {
	n.t.Helper()
	for _, addr := range addrs {
		ctx, cancel := context.WithTimeout(n.t.Context(), attempt/5)
		if answer, err := from.Connect(ctx, nettest.UDP, addr); err == nil {
			n.t.Errorf("%s answered: %+v", addr, answer)
		}
		cancel()
	}
}

// What is not served shows in the metrics, by its reason, also after a restart.
func TestUnservedPackets(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.put("empty.yaml", serviceYAML("empty", 1, 80))
	n.put("node-port.yaml", `apiVersion: v1
kind: Service
metadata: {name: node-port}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  ports: [{name: game, port: 80, nodePort: 30080, protocol: UDP}]
`)
	n.run()
	const metric = "fairlead_unserved_packets_total"
	n.awaitCounted(metric, "reason", "rejected-no-endpoints", 0)
	n.connectInVain(n.client, vips(1, 80))
	n.connectInVain(n.Node, localhost(30080))
	check := func() {
		t.Helper()
		n.awaitCounted(metric, "reason", "rejected-no-endpoints", 1)
		n.awaitCounted(metric, "reason", "rejected-localhost-udp", 1)
		n.awaitCounted(metric, "reason", "dropped-no-service", 0)
		n.awaitCounted("kubeproxy_nftables_localhost_nodeport_rejected_packets_total", "protocol", "UDP", 1)
	}
	check()
	n.stop()
	n.run()
	check()
	status, body, err := get(t.Context(), n.Node, "127.0.0.1:10249", "/metrics")
	if err != nil || status != http.StatusOK {
		t.Fatalf("status %d, error %v", status, err)
	}
	for _, metric := range []string{"fairlead_first_service_programmed_seconds ", "fairlead_last_service_programmed_seconds "} {
		if _, value, found := strings.Cut(body, "\n"+metric); !found || strings.HasPrefix(value, "0\n") {
			t.Errorf("want a time as %s in\n%s", metric, body)
		}
	}
}

// Connections to addresses of a ServiceCIDR that no Service has show as dropped.
func TestUnservedServiceCIDR(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	var dp dataplane.Dataplane
	err := n.Node.Do(func() (err error) {
		dp, err = byName(t, backend.NFT).Dial(backend.Options{Logger: slog.New(slog.DiscardHandler)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	syncer := sync.New(dp, sync.Options{})
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
	j := newJoin(slog.New(slog.DiscardHandler))
	j.syncer, j.hasNode = syncer, false
	j.deliver(kube.Delta{ServiceCIDRs: []*networkingv1.ServiceCIDR{{
		ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"},
		Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16", "fd00:10:96::/112"}},
	}}})
	eventually(t, func() error {
		if syncer.Status().LastSuccess.IsZero() {
			return errors.New("not programmed")
		}
		return nil
	})
	n.connectInVain(n.client, vips(1, 80))

	c := newCounters(byName(t, backend.NFT), slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	})
	var counts []metrics.Unserved
	err = n.Node.Do(func() (err error) { // where it connects to the kernel
		counts, err = c.unserved()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	response := httptest.NewRecorder()
	m := metrics.New(metrics.Options{Status: syncer.Status, Unserved: func() ([]metrics.Unserved, error) { return counts, nil }})
	m.Handler().ServeHTTP(response, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	for _, family := range []string{"IPv4", "IPv6"} {
		want := fmt.Sprintf("\nfairlead_unserved_packets_total{ip_family=%q,reason=\"dropped-no-service\"} 1\n", family)
		if !strings.Contains(response.Body.String(), want) {
			t.Errorf("want %q in\n%s", want, response.Body)
		}
	}
}

// That the counters can't be read is told once, and so is that they can again.
func TestUnreadableCounters(t *testing.T) {
	t.Parallel()
	var log logbook
	var failure error
	c := &counters{
		log: slog.New(slog.NewJSONHandler(&log, nil)),
		read: func(ctx context.Context) ([]metrics.Unserved, error) {
			if _, ok := ctx.Deadline(); !ok {
				t.Error("it may take for ever")
			}
			return nil, failure
		},
	}
	var levels []string
	for _, failure = range []error{nil, errors.New("one"), errors.New("two"), nil, nil, errors.New("three")} {
		if _, err := c.unserved(); !errors.Is(err, failure) {
			t.Errorf("error %v, want %v", err, failure)
		}
	}
	for _, r := range log.records() {
		levels = append(levels, r.Level+" "+r.Error)
	}
	if want := []string{"WARN one", "INFO ", "WARN three"}; !slices.Equal(levels, want) {
		t.Errorf("logged %q, want %q:\n%s", levels, want, log.String())
	}
}
