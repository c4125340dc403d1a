package kube

import (
	"cmp"
	"strings"

	"k8s.io/apimachinery/pkg/types"
)

// Problem describes a field of an object that cannot be programmed as written, and the fix.
// Problems are comparable. See the package documentation for the number of problems reported per
// Service and for ports without a match in any EndpointSlice.
type Problem struct {
	// Service is the affected Service, and UID its metadata.uid.
	Service types.NamespacedName
	UID     types.UID
	// EndpointSlice is the name of the EndpointSlice that contains Field, in the Service's
	// namespace. It is empty if Field is in the Service.
	EndpointSlice string
	// Field is the path of the field, for example spec.ports[0].targetPort.
	Field string
	// Message describes the problem and names the fix.
	Message string
}

// String returns the problem in one line:
//
//	shop/web: spec.ports[0].protocol: "tpc" is not a protocol…
//	shop/web: EndpointSlice web-x7k2p: endpoints[0].addresses[0]: …
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.Service.String())
	if p.EndpointSlice != "" {
		b.WriteString(": EndpointSlice ")
		b.WriteString(p.EndpointSlice)
	}
	b.WriteString(": ")
	b.WriteString(p.Field)
	b.WriteString(": ")
	b.WriteString(p.Message)
	return b.String()
}

// Compare orders problems by Service, EndpointSlice, field and message.
func (p Problem) Compare(o Problem) int {
	return cmp.Or(
		compareNames(p.Service, o.Service),
		strings.Compare(p.EndpointSlice, o.EndpointSlice),
		strings.Compare(p.Field, o.Field),
		strings.Compare(p.Message, o.Message),
		strings.Compare(string(p.UID), string(o.UID)),
	)
}

func compareNames(a, b types.NamespacedName) int {
	return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
}
