package kube

import "k8s.io/apimachinery/pkg/util/validation"

// IsDNSSubdomain reports whether name is an RFC 1123 subdomain, as the API server requires for
// the name of a Node or for a domain.
func IsDNSSubdomain(name string) bool { return len(validation.IsDNS1123Subdomain(name)) == 0 }

// IsLabelValue reports whether the API server accepts the value of a label. Empty values are
// valid.
func IsLabelValue(value string) bool { return len(validation.IsValidLabelValue(value)) == 0 }
