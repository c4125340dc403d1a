package kube

import "k8s.io/apimachinery/pkg/util/validation"

// IsDNSSubdomain reports whether name can be the name of a Node, or a domain: an
// RFC 1123 subdomain, as the API server checks it.
func IsDNSSubdomain(name string) bool { return len(validation.IsDNS1123Subdomain(name)) == 0 }
