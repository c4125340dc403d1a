//go:build e2e

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/internal/nettest"
)

// TestServiceCIDROverlap checks that connections to pods and to this node work if a
// ServiceCIDR contains their addresses, while connections to its unused addresses are
// dropped.
func TestServiceCIDROverlap(t *testing.T) {
	s := newScenario(t, sharedCluster)
	client, server := s.addClient(), s.createPod("web")
	s.net.Node.ServeT(t, nettest.TCP, 7070)
	unused := netip.MustParseAddrPort("10.245.77.77:80")
	connects := func(to netip.AddrPort) error {
		ctx, cancel := context.WithTimeout(s.ctx, nettest.DefaultTimeout/5)
		defer cancel()
		_, err := client.Connect(ctx, nettest.TCP, to)
		return err
	}
	cidrs := s.api.NetworkingV1().ServiceCIDRs()
	for i, network := range []string{"10.244.0.0/15", "192.0.2.0/24"} {
		created, err := cidrs.Create(s.ctx, &networkingv1.ServiceCIDR{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("overlapping-%d", i)},
			Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{network}},
		}, metav1.CreateOptions{})
		s.must(err)
		t.Cleanup(func() {
			s.must(ignoreNotFound(cidrs.Delete(context.WithoutCancel(s.ctx), created.Name, metav1.DeleteOptions{})))
		})
		s.eventually(func(context.Context) error {
			ok, err := s.fairlead.logged("ServiceCIDR overlaps", network)
			if err == nil && !ok {
				err = errors.New("the overlap is not logged")
			}
			return err
		})
	}
	// The ServiceCIDRs are programmed once connections to an unused address are dropped
	// instead of routed.
	s.eventually(func(ctx context.Context) error {
		if err := connects(unused); !errors.Is(err, nettest.ErrTimeout) {
			return fmt.Errorf("connection to %s: error %w, want a timeout", unused, err)
		}
		dropped, err := s.fairlead.metric(ctx, "fairlead_refused_packets_total", `reason="no-service"`, `verdict="drop"`, `ip_family="IPv4"`)
		if err == nil && dropped == 0 {
			err = errors.New("no packet was dropped")
		}
		return err
	})
	for _, to := range []netip.AddrPort{
		netip.AddrPortFrom(server.IPv4, 8080), netip.AddrPortFrom(s.net.Node.IPv4, 7070),
	} {
		if err := connects(to); err != nil {
			t.Error(err)
		}
	}
}
