// Package system starts and stops the Service proxies that benchmarks measure, and reads the
// resources that their processes use.
package system

import (
	"context"
	"net/netip"

	"fairlead.io/fairlead/internal/nettest"
)

// System is a Service proxy that can be measured: a program that watches an API server and
// programs the kernel of a network namespace.
type System interface {
	// Name returns the name for [fairlead.io/fairlead/bench/result.System].
	Name() string
	// Start starts the program and returns immediately, before the program has programmed anything.
	// The network namespace must be the only place that keeps the program's state.
	Start(ctx context.Context, env Environment) (Instance, error)
}

// Checker is a System that knows whether it can run on this machine.
type Checker interface {
	// Check returns an [UnavailableError] if the System cannot run in a namespace like node. It
	// leaves nothing behind in the namespace.
	Check(ctx context.Context, node *nettest.Namespace) error
}

// Environment describes where a [System] runs.
type Environment struct {
	// Namespace is the node's network namespace, in which the program runs.
	Namespace *nettest.Namespace
	// Kubeconfig is the path of a kubeconfig file for access to the API server from within the
	// Namespace.
	Kubeconfig string
	// ClusterCIDR contains the addresses of pods, and ServiceCIDR the addresses of Services.
	ClusterCIDR, ServiceCIDR netip.Prefix
	// NodeName is the name of the Node object.
	NodeName string
	// Dir is a directory for logs and other files of this run.
	Dir string
}

// Instance is a running System.
type Instance interface {
	// PID returns the ID of the process whose resources count, with its children; see [UsageOf].
	PID() int
	// Stop ends the program and waits until it has ended. The kernel may keep its state. Stop may
	// be called more than once.
	Stop() error
}
