//go:build e2e

package e2e_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/internal/nettest"
)

// waitNodeEvent waits until the Node has an Event with the reason and a note that contains
// all of the parts.
func (s *scenario) waitNodeEvent(reason string, parts ...string) {
	s.Helper()
	s.eventually(func(ctx context.Context) error {
		events, err := s.api.EventsV1().Events(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var notes []string
		for i := range events.Items {
			e := &events.Items[i]
			if e.Reason != reason || e.Regarding.Kind != "Node" || e.Regarding.Name != thisNode {
				continue
			}
			if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(e.Note, part) }) {
				return nil
			}
			notes = append(notes, e.Note)
		}
		return fmt.Errorf("no Event %s on the Node contains %q; notes: %q", reason, parts, notes)
	})
}

// TestNodeEvents checks the Events on the Node when Fairlead starts in two situations: most
// Services of an earlier run are gone from the API server, and a table has the schema of
// another version.
func TestNodeEvents(t *testing.T) {
	if os.Getenv(kubeProxyEnv) != "" {
		t.Skip("kube-proxy reports neither condition")
	}
	s := newScenario(t, sharedCluster)
	kept := s.createService("kept")
	client, only := s.addClient(), s.createPod("kept")
	var doomed []*service
	for i := range 12 {
		v := s.createService(fmt.Sprintf("doomed-%d", i), func(v *corev1.Service) { v.Spec.Selector = kept.Spec.Selector })
		doomed = append(doomed, v)
	}
	for _, v := range append(doomed, kept) {
		s.waitReaches(client, tcpTo(v.addrPort(80)), only)
	}
	s.must(s.fairlead.stop())
	for _, v := range doomed {
		v.delete()
	}
	s.eventually(func(ctx context.Context) error {
		slices, err := s.api.DiscoveryV1().EndpointSlices(s.namespace).List(ctx, metav1.ListOptions{})
		if err == nil && len(slices.Items) > 2 {
			err = fmt.Errorf("%d EndpointSlices, want at most two for the remaining Service", len(slices.Items))
		}
		return err
	})
	args := s.fairlead.args
	s.Cleanup(func() { s.fairlead.args = args })
	s.fairlead.args = append(slices.Clone(args), "--mass-removal-delay=3s")
	s.must(s.fairlead.start())
	s.waitNodeEvent("MassRemovalHeld", "list of services", "lacks 12 of ", "--mass-removal-delay")
	s.must(s.fairlead.waitReady(s.ctx))
	s.waitFails(client, tcpTo(doomed[0].addrPort(80)), nettest.ErrRefused, nettest.ErrTimeout)

	// A table with another schema.
	s.must(s.fairlead.stop())
	s.fairlead.args = args
	s.must(s.fairlead.host.Do(func() error {
		script := `delete table ip fairlead; add table ip fairlead { comment "fairlead schema 99"; }`
		out, err := exec.CommandContext(s.ctx, "nft", script).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("nft: %w\n%s", err, out)
		}
		return err
	}))
	s.must(s.start(s.ctx))
	s.waitReaches(client, tcpTo(kept.addrPort(80)), only)
	s.waitNodeEvent("TableRebuilt", "table ip fairlead ", "schema")
	s.eventually(func(ctx context.Context) error {
		n, err := s.fairlead.metric(ctx, "fairlead_nftables_table_rebuilds_total", `ip_family="IPv4"`)
		if err == nil && n != 1 {
			err = fmt.Errorf("%v rebuilds counted, want 1", n)
		}
		return err
	})
}
