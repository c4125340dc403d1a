package kube

import (
	"iter"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// ServiceState is what a [Tracker] has computed for one Kubernetes Service.
type ServiceState struct {
	Name types.NamespacedName
	// Ports contains the desired Services of its ports, families and kinds of frontends.
	Ports []*dataplane.Service
	// Problems contains the problems that persist, sorted.
	Problems []Problem
}

// All yields the state of every Service that is programmed or has problems, in no particular
// order. It must not run concurrently with other methods; the values stay valid afterwards.
func (t *Tracker) All() iter.Seq[ServiceState] {
	return func(yield func(ServiceState) bool) {
		for name, s := range t.services {
			state := ServiceState{Name: name, Problems: slices.Clone(s.problems)}
			for _, port := range s.programmed {
				if port != nil {
					state.Ports = append(state.Ports, port)
				}
			}
			if len(state.Ports)+len(state.Problems) > 0 && !yield(state) {
				return
			}
		}
	}
}
