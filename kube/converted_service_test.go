package kube

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestConvertedServiceKeepsFields checks that a converted Service has all fields of the object that
// this package reads, and that the object itself stays unchanged.
func TestConvertedServiceKeepsFields(t *testing.T) {
	t.Parallel()
	for name, svc := range map[string]*corev1.Service{
		"cluster IP":                      newService("web", "10.96.0.1"),
		"two families":                    newService("web", "10.96.0.1 fd00::1"),
		"no cluster IP":                   newService("web", ""),
		"headless":                        newService("web", "None"),
		"only the field clusterIP":        newService("web", "", func(s *corev1.Service) { s.Spec.ClusterIP = "10.96.0.1" }),
		"cluster IPs that differ":         newService("web", "10.96.0.1", func(s *corev1.Service) { s.Spec.ClusterIP = "10.96.0.2" }),
		"invalid cluster IPs":             newService("web", "10.96.0.1", func(s *corev1.Service) { s.Spec.ClusterIPs = []string{"10.96.0.1", "", "x,y"} }),
		"node port":                       newService("web", "10.96.0.1", nodePorts(30080)),
		"every kind and session affinity": newService("web", "10.96.0.1", everyKind(3), timeout(60), sourceRangesOf("10.0.0.0/8"), healthCheckNodePort(32000)),
		"annotation":                      newService("web", "10.96.0.1", scheduler("lc")),
		"no ports":                        newService("web", "10.96.0.1", func(s *corev1.Service) { s.Spec.Ports = nil }),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			svc.UID, svc.ResourceVersion = "u", "7"
			before := svc.DeepCopy()
			converter := NewServiceConverter()
			c := converter.Convert(svc)
			other := newService("other", "10.96.0.9", nodePorts(30099))
			converter.Convert(other) // reuses the memory of the converter
			if diff := cmp.Diff(before, svc); diff != "" {
				t.Errorf("Convert changed the object (-before +after):\n%s", diff)
			}
			want := before.DeepCopy()
			want.ResourceVersion, want.CreationTimestamp = "", metav1.Time{}
			if diff := cmp.Diff(want, c.expand(new(corev1.Service))); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if c.createdUnix != svc.CreationTimestamp.Unix() || c.UID() != "u" || c.Name().Name != "web" {
				t.Errorf("got %s, UID %s, created %d", c.Name(), c.UID(), c.createdUnix)
			}
		})
	}
}

// TestConvertedServicesShare checks that Services which differ only in names, cluster IPs and node
// ports share the rest, and that others do not.
func TestConvertedServicesShare(t *testing.T) {
	t.Parallel()
	converter := NewServiceConverter()
	convert := func(i int, changes ...func(*corev1.Service)) *ConvertedService {
		svc := newService(fmt.Sprint("web-", i), addrOf(10, i), changes...)
		svc.UID, svc.ResourceVersion = "u", fmt.Sprint(i)
		return converter.Convert(svc)
	}
	first := convert(1, nodePorts(30001))
	if second := convert(2, nodePorts(30002)); first.rest != second.rest {
		t.Error("two Services of one shape share nothing")
	}
	if other := convert(3, nodePorts(30003), timeout(60)); first.rest == other.rest {
		t.Error("Services with and without session affinity share the fields")
	}
}

// TestSharedServicesAreBounded checks that the converter does not accumulate values.
func TestSharedServicesAreBounded(t *testing.T) {
	t.Parallel()
	converter := NewServiceConverter()
	for i := range 2*maxSharedServices + 1 {
		converter.Convert(newService("web", "10.96.0.1", ingress(addrOf(172, i))))
	}
	if n := len(converter.shared); n > maxSharedServices {
		t.Errorf("holds %d values", n)
	}
}
