// Package system is what a benchmark needs of a Service proxy, whichever it is: how
// it is started and stopped, and what its processes use.
package system

import (
	"context"
	"net/netip"

	"fairlead.io/fairlead/internal/nettest"
)

// System is a Service proxy that can be measured: a program that follows an API
// server and programs the kernel of a network namespace.
type System interface {
	// Name is that of [fairlead.io/fairlead/bench/result.System].
	Name() string
	// Start starts the program and returns at once, without waiting until it has
	// programmed anything. What it programs must be gone with the namespace.
	Start(ctx context.Context, env Environment) (Instance, error)
}

// Checker is a System that knows whether it can run on this machine.
type Checker interface {
	// Check returns an [UnavailableError] if the System cannot run in such a namespace.
	// Nothing is left in it.
	Check(ctx context.Context, node *nettest.Namespace) error
}

// Environment is where a [System] runs.
type Environment struct {
	// Namespace is that of the node, which the program runs in.
	Namespace *nettest.Namespace
	// Kubeconfig is the path of a file that says how the API server is reached from
	// within the Namespace.
	Kubeconfig string
	// ClusterCIDR holds the addresses of pods and ServiceCIDR those of Services.
	ClusterCIDR, ServiceCIDR netip.Prefix
	// NodeName is the node's name in the API.
	NodeName string
	// Dir is a folder for logs and other files of this run.
	Dir string
}

// Instance is a System that was started.
type Instance interface {
	// PID is the process whose use of resources counts, with its children; see
	// [UsageOf].
	PID() int
	// Stop ends the program and waits until it has gone. What it has programmed may
	// stay. Stopping twice is no error.
	Stop() error
}
