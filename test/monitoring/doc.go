// Package monitoring tests that dashboards, alerts and probes written for kube-proxy work with
// Fairlead. The tests run both programs on the same input and compare the responses.
//
// The package has a module of its own because of the Prometheus parser's dependencies.
package monitoring
