// Package backend describes the kernel mechanisms that Fairlead can program. [All] is
// the table of backends; a further backend is one entry in it and the package that
// the entry opens. docs/writing-a-backend.md shows how to write one.
package backend

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
)

// Backend describes one kernel mechanism. Fields without a comment on nil must be
// set.
type Backend struct {
	// Name is the value of --mode.
	Name string
	// KubeProxyName is the value of kube-proxy's --proxy-mode for the same mechanism.
	// Empty means that kube-proxy does not have it.
	KubeProxyName string
	// Flags are the settings of this backend alone.
	Flags []Flag

	// NodePortsOnAllAddresses serves node ports on all addresses of the node where
	// --nodeport-addresses is empty, as kube-proxy's mode of the same name does.
	NodePortsOnAllAddresses bool
	// Schedulers are the values of [dataplane.ServiceSpec.Scheduler] that the backend
	// knows. Nil means that it picks endpoints in one way only.
	Schedulers []string
	// Conntrack says that the backend translates connections by connection tracking.
	// The agent then deletes the entries that would keep clients at removed endpoints.
	Conntrack bool

	// Open opens the backend. The error says what the kernel or the process lacks.
	// A Dataplane may implement [Yielder].
	Open func(Options) (dataplane.Dataplane, error)
	// SetUp does what may take more rights than to program Services, and programs
	// none. Nil means that the backend needs no preparation.
	SetUp func(Options) error
	// Cleanup removes everything that the backend has programmed, in this or an
	// earlier process.
	Cleanup func(*slog.Logger) error

	// NewCounters returns a reader of the packets that the kernel rejected or dropped.
	// Nil means that the backend counts none.
	NewCounters func() Counters
	// NewAffinityLimiter returns a limiter of the clients that session affinity remembers, beside
	// the Dataplane that Open has returned, which must stay open. Nil
	// means that the kernel limits them itself.
	NewAffinityLimiter func(dataplane.Dataplane) AffinityLimiter
	// ServedServices returns the names of Services, as namespace/name with an optional
	// suffix :port, for which the kernel has endpoints from an earlier process. Nil
	// means that nothing outlives the process.
	ServedServices func(context.Context) (map[string]struct{}, error)
}

// Options are what a backend is opened with.
type Options struct {
	Logger *slog.Logger
	// NetNS is a file descriptor of the network namespace to program, 0 for that of
	// the calling thread. It must stay open until Close.
	NetNS int
	// OwnTables keeps other processes from changing what the backend programs, where the
	// Dataplane is a [TableOwner] and the kernel can do so.
	OwnTables bool
	// Values has the values of the backend's Flags. A missing value means the default.
	Values Values
	// OnRebuild, if not nil, is called before the backend makes something anew that it
	// cannot repair in place. It must not block.
	OnRebuild func(Rebuild)
}

// Rebuild describes what a backend makes anew.
type Rebuild struct {
	Family dataplane.Family
	// Table is the kernel's name of it, and Reason why it is not repaired in place.
	Table, Reason string
}

// Yielder is implemented by a Dataplane that can let other programs' rules go first
// after its end.
type Yielder interface {
	// GiveWay moves the rules behind other programs' after the process has ended.
	GiveWay(after time.Duration) error
}

// TableOwner is implemented by a Dataplane that can obey [Options.OwnTables].
type TableOwner interface {
	// OwnsTables reports whether the kernel keeps other processes from changing the
	// tables.
	OwnsTables() bool
}

// Counters reads packet counters beside a Dataplane. Its methods may be called from
// any goroutine.
type Counters interface {
	Read(context.Context) ([]metrics.RefusedPackets, error)
	Close() error
}

// AffinityLimiter keeps room for new clients in the kernel's maps of session affinity.
type AffinityLimiter interface {
	// Limit counts the clients, and evicts from full maps the clients with the oldest
	// last connection.
	Limit(context.Context) error
	// Stats may be called from any goroutine.
	Stats() []metrics.Affinity
}

// Dial opens the backend, and names --mode in its error.
func (b Backend) Dial(o Options) (dataplane.Dataplane, error) {
	log := o.Logger
	o.Logger = log.With("backend", b.Name)
	d, err := b.Open(o)
	if err != nil {
		return nil, fmt.Errorf("--mode=%s: %w", b.Name, err)
	}
	if owner, ok := d.(TableOwner); o.OwnTables && (!ok || !owner.OwnsTables()) {
		log.Warn("a setting has no effect", "setting", "--nft-own-table", "reason", "it needs Linux 6.9 or newer, and this is "+kernelRelease())
	}
	return d, nil
}

// kernelRelease returns the release of the kernel, as `uname -r` does.
func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "a kernel that does not tell its release"
	}
	return unix.ByteSliceToString(name.Release[:])
}

// Prepare sets up what the backend needs of the node, and logs that it has.
func (b Backend) Prepare(ctx context.Context, o Options) error {
	const reason = "--init-only"
	log := o.Logger
	if b.SetUp == nil {
		log.InfoContext(ctx, "nothing to set up", "reason", reason)
		return nil
	}
	o.Logger = log.With("backend", b.Name)
	if err := b.SetUp(o); err != nil {
		return fmt.Errorf("--mode=%s: %w", b.Name, err)
	}
	log.InfoContext(ctx, "the kernel is set up", "reason", reason, "mode", b.Name)
	return nil
}

// Remove removes everything that the backend has programmed.
func (b Backend) Remove(log *slog.Logger) error {
	if err := b.Cleanup(log.With("backend", b.Name)); err != nil {
		return fmt.Errorf("clean up after --mode=%s: %w", b.Name, err)
	}
	return nil
}
