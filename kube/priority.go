package kube

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/dataplane"
)

// IsPriority reports whether a Service is programmed before others at a start: other
// programs need the Services of kube-system, such as the cluster's DNS, for their work.
func IsPriority(key dataplane.Key) bool { return key.Namespace == metav1.NamespaceSystem }
