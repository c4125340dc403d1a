package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestShouldServe checks which proxy serves a Service with and without the label.
func TestShouldServe(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name      string
		labels    map[string]string
		proxyName string
		want      bool
	}{
		{"no label, default proxy", nil, "", true},
		{"label, default proxy", map[string]string{LabelServiceProxyName: "try"}, "", false},
		{"empty label, default proxy", map[string]string{LabelServiceProxyName: ""}, "", false},
		{"no label, named proxy", nil, "try", false},
		{"label, named proxy", map[string]string{LabelServiceProxyName: "try"}, "try", true},
		{"another label, named proxy", map[string]string{LabelServiceProxyName: "other"}, "try", false},
		{"empty label, named proxy", map[string]string{LabelServiceProxyName: ""}, "try", false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			svc := newService("web", "10.96.0.1", func(svc *corev1.Service) { svc.Labels = test.labels })
			if got := shouldServe(svc, test.proxyName); got != test.want {
				t.Errorf("shouldServe is %t, want %t", got, test.want)
			}
		})
	}
}
