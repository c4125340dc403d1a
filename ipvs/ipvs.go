// Package ipvs is the IPVS backend: a [dataplane.Dataplane] whose Services are
// virtual servers of the kernel, on a dummy interface.
package ipvs

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"net/netip"
	"time"

	"fairlead/dataplane"
)

// Options are the options of [Open]. The zero value is ready to use.
type Options struct {
	// NetNS is a file descriptor of the network namespace to program; 0 means
	// the namespace of the calling thread. It is used during Open only.
	NetNS int
	// Logger gets what is worth an operator's attention but is no failure of a
	// Service. Nil discards it.
	Logger *slog.Logger
	// Scheduler is the kernel's name of the scheduler of Services that want none
	// in particular, such as rr or lc (man ipvsadm). Empty: rr.
	Scheduler string
	// ExcludeCIDRs are networks whose virtual servers are another's: they are
	// neither read nor written. A Service with a cluster IP in one of them is
	// refused.
	ExcludeCIDRs []netip.Prefix
	// StrictARP makes the node answer ARP for the addresses of the interface that
	// was asked, only (sysctls arp_ignore=1 and arp_announce=2 of all interfaces).
	StrictARP bool
	// TCPTimeout, TCPFinTimeout and UDPTimeout are for how long the kernel
	// remembers a connection of TCP that is idle, or whose client has closed it,
	// and a flow of UDP. They are whole seconds and hold for all virtual servers of
	// the namespace. 0 leaves the kernel's.
	TCPTimeout, TCPFinTimeout, UDPTimeout time.Duration
	// DrainLimit is how long an endpoint that has left keeps its connections.
	// 0: 15 minutes.
	DrainLimit time.Duration
}

// Schedulers returns the names of the schedulers that the kernel's sources have,
// in order. Whether a kernel has one is known when it is asked for.
func Schedulers() []string {
	return []string{"dh", "fo", "lblc", "lblcr", "lc", "mh", "nq", "ovf", "rr", "sed", "sh", "twos", "wlc", "wrr"}
}

// ErrNotSupported is wrapped by the error of [Open] on a kernel that lacks IPVS or
// dummy interfaces and cannot load them. The error says which is missing and what
// to do.
var ErrNotSupported = errors.New("the kernel cannot run the ipvs mode")

// Dataplane programs IPVS.
type Dataplane struct{}

var _ dataplane.Dataplane = (*Dataplane)(nil)

// Open connects to the kernel, loading the modules that it needs.
func Open(Options) (*Dataplane, error) { return nil, ErrNotSupported }

// Cleanup removes what the backend made, whoever ran it. It needs no Dataplane.
func Cleanup(Options) error { return nil }

// Replace implements [dataplane.Dataplane].
func (d *Dataplane) Replace(context.Context, dataplane.Node, iter.Seq[*dataplane.Service], func(int)) error {
	return nil
}

// Apply implements [dataplane.Dataplane].
func (d *Dataplane) Apply(context.Context, []dataplane.Change) error { return nil }

// Read implements [dataplane.Dataplane].
func (d *Dataplane) Read(context.Context) (dataplane.State, error) { return nil, nil }

// Drift implements [dataplane.Dataplane].
func (d *Dataplane) Drift() <-chan struct{} { return nil }

// Close implements [dataplane.Dataplane].
func (d *Dataplane) Close() error { return nil }
