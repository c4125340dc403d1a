package loadbalancer

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func TestPool(t *testing.T) {
	t.Parallel()
	p := newPool([]netip.Prefix{netip.MustParsePrefix("172.30.1.0/24"), netip.MustParsePrefix("fd00:1::/64")})
	get := func(owner types.UID, families ...corev1.IPFamily) string {
		t.Helper()
		addresses, err := p.get(owner, families)
		if err != nil {
			t.Fatal(err)
		}
		text := ""
		for _, address := range addresses {
			text += address.String() + " "
		}
		return text
	}
	got := []string{
		get("a", corev1.IPv4Protocol),
		get("b", corev1.IPv6Protocol, corev1.IPv4Protocol),
		// A Service gets the same addresses again, also after it has got a second family.
		get("a", corev1.IPv4Protocol, corev1.IPv6Protocol),
	}
	want := []string{"172.30.1.1 ", "fd00:1::1 172.30.1.2 ", "172.30.1.1 fd00:1::2 "}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	if released := p.retain(map[types.UID]bool{"b": true}); len(released) != 2 {
		t.Errorf("released %v, want the addresses of a", released)
	}
	if got := get("c", corev1.IPv4Protocol); got != "172.30.1.1 " {
		t.Errorf("address %s, want the released one", got)
	}
}

func TestPoolFull(t *testing.T) {
	t.Parallel()
	p := newPool([]netip.Prefix{netip.MustParsePrefix("172.30.1.0/24")})
	var err error
	count := 0
	for ; err == nil; count++ {
		_, err = p.get(types.UID(rune('a'+count)), []corev1.IPFamily{corev1.IPv4Protocol})
	}
	if count != 251 {
		t.Errorf("error %v after %d Services, want after 250", err, count-1)
	}
}

func TestClassify(t *testing.T) {
	t.Parallel()
	class := "example.com/other"
	deleted := metav1.Now()
	for _, tc := range []struct {
		name         string
		change       func(*corev1.Service)
		wanted, ours bool
	}{
		{"load balancer", func(*corev1.Service) {}, true, false},
		{"with the finalizer", func(s *corev1.Service) { s.Finalizers = []string{finalizer} }, true, true},
		{"of another class", func(s *corev1.Service) { s.Spec.LoadBalancerClass = &class }, false, false},
		{"deleted", func(s *corev1.Service) { s.Finalizers, s.DeletionTimestamp = []string{finalizer}, &deleted }, false, true},
		{"changed to ClusterIP", func(s *corev1.Service) {
			s.Finalizers, s.Spec.Type = []string{finalizer}, corev1.ServiceTypeClusterIP
		}, false, true},
	} {
		s := &corev1.Service{Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer}}
		tc.change(s)
		if wanted, ours := classify(s); wanted != tc.wanted || ours != tc.ours {
			t.Errorf("%s: wanted %t, ours %t", tc.name, wanted, ours)
		}
	}
}
