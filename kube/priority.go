package kube

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/dataplane"
)

// IsPriority reports whether a Service is programmed before others at startup. This applies to
// Services in kube-system, for example cluster DNS, because other programs depend on them.
func IsPriority(key dataplane.Key) bool { return key.Namespace == metav1.NamespaceSystem }
