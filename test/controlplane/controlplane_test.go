package controlplane_test

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"fairlead/test/controlplane"
)

func TestServicesGetAddresses(t *testing.T) {
	t.Parallel()
	cp := controlplane.Start(t, controlplane.Options{ServiceCIDRs: []netip.Prefix{
		netip.MustParsePrefix("fd00:77::/112"), netip.MustParsePrefix("10.77.0.0/16"),
	}})
	clients, err := kubernetes.NewForConfig(cp.Config())
	if err != nil {
		t.Fatal(err)
	}
	policy := corev1.IPFamilyPolicyRequireDualStack
	service, err := clients.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{IPFamilyPolicy: &policy, Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(service.Spec.ClusterIPs) != len(cp.ServiceCIDRs()) {
		t.Fatalf("got addresses %v, want one of each of %v", service.Spec.ClusterIPs, cp.ServiceCIDRs())
	}
	for i, cidr := range cp.ServiceCIDRs() {
		if addr := netip.MustParseAddr(service.Spec.ClusterIPs[i]); !cidr.Contains(addr) {
			t.Errorf("address %d is %s, want one of %s", i, addr, cidr)
		}
	}
}
