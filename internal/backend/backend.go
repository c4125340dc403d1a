// Package backend describes the kernel mechanisms that Fairlead can program. [All] lists
// them. To add a backend, write a package that implements dataplane.Dataplane and add an
// entry to [All]; see docs/writing-a-backend.md.
package backend

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/kube"
)

// Backend describes one kernel mechanism. Fields are required unless their comment says what
// nil means.
type Backend struct {
	// Name is the value of --mode.
	Name string
	// KubeProxyName is the value of kube-proxy's --proxy-mode for the same mechanism, empty
	// if kube-proxy does not have it.
	KubeProxyName string
	// Flags are the settings that only this backend has.
	Flags []Flag

	// NodePortsOnAllAddresses serves node ports on all addresses of the node if
	// --nodeport-addresses is empty, like kube-proxy's mode of the same name.
	NodePortsOnAllAddresses bool
	// Schedulers are the values of [kube.AnnotationIPVSScheduler] that the backend supports. Nil
	// means that the scheduler cannot be selected by its name.
	Schedulers []string
	// Balancing returns the supported values of [kube.AnnotationBalancing], given the values of
	// Flags. Nil means that the balancing cannot be selected.
	Balancing func(Values) kube.Balancing
	// Conntrack is set if the backend translates addresses with connection tracking. The
	// agent then deletes stale entries that direct clients to removed endpoints.
	Conntrack bool

	// Open opens the backend. The error names the missing kernel feature or privilege. The
	// Dataplane may implement [Yielder] and [TableOwner].
	Open func(Options) (dataplane.Dataplane, error)
	// SetUp performs the initialization that may need more privileges than programming
	// Services, without programming any. Nil means that none is needed.
	SetUp func(Options) error
	// Drain waits until the connections that end with Cleanup have ended, at most for some
	// minutes, while another backend serves new ones. Nil means that none end.
	Drain func(context.Context, *slog.Logger) error
	// Cleanup removes everything that this or an earlier process has programmed with the
	// backend.
	Cleanup func(*slog.Logger) error

	// NewCounters returns a reader of the counters of refused packets. Nil means that the
	// backend does not count them.
	NewCounters func() Counters
	// NewAffinityLimiter returns a limiter of the clients that session affinity remembers,
	// for a Dataplane from Open, which must stay open. Nil means that the kernel limits
	// them.
	NewAffinityLimiter func(dataplane.Dataplane) AffinityLimiter
	// ServedServices returns the names of Services for which an earlier process has programmed
	// endpoints. A name is namespace/name with an optional suffix :port. Nil means that no
	// kernel state survives a restart.
	ServedServices func(context.Context) (map[string]struct{}, error)
}

// Options are the options of [Backend.Dial].
type Options struct {
	Logger *slog.Logger
	// NetNS is a file descriptor of the network namespace to program, 0 for the namespace
	// of the calling thread. It must stay open until Close.
	NetNS int
	// OwnTables prevents other processes from changing the tables, if the Dataplane is a
	// [TableOwner] and the kernel supports it.
	OwnTables bool
	// Values holds the values of the backend's Flags. A missing value means the default.
	Values Values
	// DryRun, if not nil, collects what the Dataplane would write. The Dataplane then writes
	// nothing. Only a new Dataplane reads the kernel correctly after Replace or Apply.
	DryRun *dataplane.DryRun
	// OnRebuild, if not nil, is called before the backend rebuilds a table that it cannot
	// repair in place. It must not block.
	OnRebuild func(Rebuild)
}

// Rebuild describes a table that a backend rebuilds.
type Rebuild struct {
	Family dataplane.Family
	// Table is the table's name in the kernel. Reason says why it cannot be repaired in place.
	Table, Reason string
}

// Yielder is implemented by a Dataplane whose rules can give way to the rules of other
// programs after Close.
type Yielder interface {
	// GiveWay gives other programs' rules precedence once the process has exited and the
	// given time has passed.
	GiveWay(after time.Duration) error
}

// TableOwner is implemented by a Dataplane that supports [Options.OwnTables].
type TableOwner interface {
	// OwnsTables reports whether the kernel prevents other processes from changing the tables.
	OwnsTables() bool
}

// Counters reads the counters of refused packets independently of a Dataplane. Its methods are
// safe for concurrent use.
type Counters interface {
	Read(context.Context) ([]metrics.RefusedPackets, error)
	Close() error
}

// AffinityLimiter keeps room for new clients in the kernel's session affinity maps.
type AffinityLimiter interface {
	// Limit counts the clients and evicts the least recently connected clients from full maps.
	Limit(context.Context) error
	// Stats returns the result of the last count. It is safe for concurrent use.
	Stats() []metrics.Affinity
}

// Dial opens the backend. Its errors name --mode.
func (b Backend) Dial(o Options) (dataplane.Dataplane, error) {
	log := o.Logger
	o.Logger = log.With("backend", b.Name)
	d, err := b.Open(o)
	if err != nil {
		return nil, fmt.Errorf("--mode=%s: %w", b.Name, err)
	}
	if owner, ok := d.(TableOwner); o.OwnTables && o.DryRun == nil && (!ok || !owner.OwnsTables()) {
		log.Warn("a setting has no effect", "setting", "--nft-own-table", "reason", "it requires Linux 6.9 or newer, this is "+kernelRelease())
	}
	return d, nil
}

// TrackerOptions adds the options that depend on the backend: kube-proxy's default for the
// addresses of node ports in this mode, the IPVS schedulers and the kinds of balancing. v holds
// the values of Flags.
func (b Backend) TrackerOptions(o kube.Options, v Values) kube.Options {
	if b.NodePortsOnAllAddresses && o.NodePortAddresses.IsZero() {
		o.NodePortAddresses.All = true
	}
	o.Schedulers = b.Schedulers
	if b.Balancing != nil {
		o.Balancing = b.Balancing(v)
	}
	return o
}

// kernelRelease returns the kernel release that `uname -r` prints.
func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "an unknown release"
	}
	return unix.ByteSliceToString(name.Release[:])
}

// Prepare calls SetUp and logs its result.
func (b Backend) Prepare(ctx context.Context, o Options) error {
	const reason = "--init-only"
	log := o.Logger
	if b.SetUp == nil {
		log.InfoContext(ctx, "the mode needs no initialization", "reason", reason, "mode", b.Name)
		return nil
	}
	o.Logger = log.With("backend", b.Name)
	if err := b.SetUp(o); err != nil {
		return fmt.Errorf("--mode=%s: %w", b.Name, err)
	}
	log.InfoContext(ctx, "kernel initialized", "reason", reason, "mode", b.Name)
	return nil
}

// RemoveDrained calls Drain and then Cleanup, unless ctx is done. Its errors name --mode.
func (b Backend) RemoveDrained(ctx context.Context, log *slog.Logger) error {
	if b.Drain != nil {
		if err := b.Drain(ctx, log.With("backend", b.Name)); ctx.Err() != nil {
			return ctx.Err()
		} else if err != nil {
			log.WarnContext(ctx, "cannot wait for the connections of another mode", "other_mode", b.Name, "error", err)
		}
	}
	return b.Remove(log)
}

// Remove calls Cleanup. Its errors name --mode.
func (b Backend) Remove(log *slog.Logger) error {
	if err := b.Cleanup(log.With("backend", b.Name)); err != nil {
		return fmt.Errorf("clean up after --mode=%s: %w", b.Name, err)
	}
	return nil
}
