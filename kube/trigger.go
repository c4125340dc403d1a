package kube

import (
	"iter"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// Trigger is a change of a Service's endpoints, as the EndpointSlice controller records it in the
// annotation endpoints.kubernetes.io/last-change-trigger-time.
type Trigger struct {
	// Service is the name of the Service.
	Service types.NamespacedName
	// At is the time of the change of pods or Service, by the controller's clock.
	At time.Time
}

// Triggers yields the triggers of the Delta's EndpointSlices whose Service this Result changes.
// Slices without the annotation have no trigger.
func (r Result) Triggers() iter.Seq[Trigger] {
	return func(yield func(Trigger) bool) {
		var changed map[types.NamespacedName]struct{} // created on first use
		for _, trigger := range r.triggers {
			if changed == nil {
				changed = make(map[types.NamespacedName]struct{}, len(r.Changes))
				for key := range r.Changes {
					changed[types.NamespacedName{Namespace: key.Namespace, Name: key.Name}] = struct{}{}
				}
			}
			if _, ok := changed[trigger.Service]; ok && !yield(trigger) {
				return
			}
		}
	}
}
