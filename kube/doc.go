// Package kube says what Kubernetes objects mean for this node: it turns
// Services and their EndpointSlices into the [dataplane.Service] values that
// the node must have. It follows kube-proxy's rules, and names where it does
// not (yet) in a [Problem].
//
// Everything here is computation: no I/O, no clock, no lock, no goroutine. A
// source delivers each change as a [Delta]; a [Tracker] keeps the objects and
// answers with a [Result], at a cost that follows the change and not the number
// of Services.
//
// # From objects to Services
//
// Each port of a Service gives one dataplane.Service per IP family the Service
// has a cluster IP in. Headless Services, Services of type ExternalName and
// those with the label service.kubernetes.io/service-proxy-name (which ask for
// another proxy) give none.
//
// Endpoints come from the EndpointSlices of the Service's namespace whose label
// kubernetes.io/service-name is its name, whose addressType is the family, and
// whose port has the same name and protocol as the Service's port. Connections
// go to the ready endpoints; if there are none, to those that are terminating
// but still serving.
//
// # Collisions
//
// A frontend (protocol, address, port) belongs to one Service port. If several
// claim it, it goes to the Service with the oldest creationTimestamp, then to
// the first by namespace and name, then to the first port in the Service. The
// others go without, are reported, and take over when the owner goes.
package kube
