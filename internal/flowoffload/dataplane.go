package flowoffload

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/flowdevices"
	"fairlead.io/fairlead/internal/kmod"
)

// DefaultThreshold is the default of [Options.Threshold]. A short request and its response take about
// ten packets, which is not worth an entry in the flowtable.
const DefaultThreshold = 20

// Options configure [New].
type Options struct {
	// NetNS is a file descriptor of the network namespace, 0 for the namespace of the calling thread.
	NetNS int
	// Hardware lets the drivers of the devices forward the packets. Devices whose drivers cannot do so
	// do not take part.
	Hardware bool
	// Threshold is the number of packets, in both directions, after which a connection is offloaded.
	Threshold uint32
	// OnFailure, if not nil, is called when offloading does not work, and not again until it has
	// worked. It must not block.
	OnFailure func(error)
	Logger    *slog.Logger
}

// Dataplane wraps the Dataplane of a backend that translates addresses with nftables. Failures of the
// flowtable do not affect Services.
type Dataplane struct {
	dataplane.Wrapper

	options Options
	log     *slog.Logger
	watcher *flowdevices.Watcher
	// drift reports changes of the table by other programs.
	drift *drift
	// connections counts the connections in the flowtable.
	connections *active

	// mu protects the remaining fields. It is not held during calls of the inner Dataplane.
	mu    sync.Mutex
	conn  *nftables.Conn
	hooks hooks
	table *table
	// owners contains the frontends in the kernel, services the ones of each Service.
	owners   map[dataplane.Frontend]dataplane.Key
	services map[dataplane.Key][]dataplane.Frontend
	// desired contains the devices that take part, active the ones in the kernel, and refused the ones
	// that the kernel does not accept.
	desired         []flowdevices.Device
	active, refused map[flowdevices.Device]struct{}
	// started is set after the first Replace, devicesKnown once desired is known.
	started, devicesKnown bool
	// intact is set while the kernel has the state that these fields describe.
	intact bool
	err    error // why it is not intact, nil before the first attempt
}

var (
	_ dataplane.Dataplane    = (*Dataplane)(nil)
	_ dataplane.LossNotifier = (*Dataplane)(nil)
	_ dataplane.Prefetcher   = (*Dataplane)(nil)
)

// New returns a Dataplane that offloads connections to the Services that it passes to inner. It writes
// nothing before the first Replace. [Dataplane.Run] must run for devices to take part.
func New(inner dataplane.Dataplane, o Options) (*Dataplane, error) {
	o.Threshold = cmp.Or(o.Threshold, DefaultThreshold)
	log := o.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	withUDP, err := deletesOffloadedFlows()
	if err != nil {
		return nil, err
	}
	d := &Dataplane{
		Wrapper: dataplane.Wrapper{Dataplane: inner}, options: o, log: log, table: newTable(o.Threshold, o.Hardware, withUDP),
		owners: map[dataplane.Frontend]dataplane.Key{}, services: map[dataplane.Key][]dataplane.Frontend{},
		active: map[flowdevices.Device]struct{}{}, refused: map[flowdevices.Device]struct{}{},
	}
	if d.conn, err = nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(o.NetNS)); err != nil {
		return nil, fmt.Errorf("open netlink socket for the flowtable: %w", err)
	}
	if d.hooks, err = openHooks(o.NetNS); err != nil {
		return nil, errors.Join(err, d.conn.CloseLasting())
	}
	d.watcher = flowdevices.New(flowdevices.Options{NetNS: o.NetNS, Logger: log}, d.setDevices)
	d.drift = &drift{netns: o.NetNS, log: log, ownPort: d.hooks.conn.PID()}
	d.connections = newActive(o.NetNS, log)
	return d, nil
}

// Run follows the devices and repairs the table until ctx is done.
func (d *Dataplane) Run(ctx context.Context) error {
	if !d.table.withUDP {
		d.log.InfoContext(ctx, "only TCP connections are offloaded: UDP requires Linux 6.4 or newer")
	}
	var group sync.WaitGroup
	defer group.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group.Go(func() { d.drift.run(ctx, d.repair) })
	return d.watcher.Run(ctx)
}

// Replace implements [dataplane.Dataplane].
func (d *Dataplane) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	err := d.Dataplane.Replace(ctx, node, services, progress)
	d.watcher.SetPodInterfaces(flowdevices.PodInterfaces{Bridge: node.PodInterface, Prefix: node.PodInterfacePrefix})
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.owners)
	clear(d.services)
	for s := range services {
		d.setService(s)
	}
	d.started = true
	d.report(ctx, d.compare(true))
	return err
}

// setService records the frontends of a Service. The caller holds mu.
func (d *Dataplane) setService(s *dataplane.Service) {
	d.services[s.Key] = s.Frontends
	for _, f := range s.Frontends {
		d.owners[f] = s.Key
	}
}

// Apply implements [dataplane.Dataplane]. Changes of endpoints cost nothing here.
func (d *Dataplane) Apply(ctx context.Context, changes []dataplane.Change) error {
	err := d.Dataplane.Apply(ctx, changes)
	d.mu.Lock()
	defer d.mu.Unlock()
	changed := slices.DeleteFunc(slices.Clone(changes), func(c dataplane.Change) bool {
		var frontends []dataplane.Frontend
		if c.New != nil {
			frontends = c.New.Frontends
		}
		return slices.Equal(frontends, d.services[c.Key()])
	})
	if len(changed) == 0 {
		return err
	}
	// Frontends may move between Services, so remove all old ones before adding new ones.
	old := map[dataplane.Frontend]struct{}{}
	for _, c := range changed {
		for _, f := range d.services[c.Key()] {
			if d.owners[f] == c.Key() {
				old[f] = struct{}{}
				delete(d.owners, f)
			}
		}
		delete(d.services, c.Key())
	}
	var added, removed []dataplane.Frontend
	for _, c := range changed {
		if c.New == nil {
			continue
		}
		for _, f := range c.New.Frontends {
			_, exists := d.owners[f]
			if _, remains := old[f]; !exists && !remains {
				added = append(added, f)
			}
		}
		d.setService(c.New)
	}
	for f := range old {
		if _, ok := d.owners[f]; !ok {
			removed = append(removed, f)
		}
	}
	if d.intact {
		d.report(ctx, errors.Join(d.writeFrontends(removed, d.conn.SetDeleteElements), d.writeFrontends(added, d.conn.SetAddElements)))
	}
	return err
}

// setDevices sets the devices that take part.
func (d *Dataplane) setDevices(devices []flowdevices.Device) {
	d.mu.Lock()
	defer d.mu.Unlock()
	first := !d.devicesKnown
	d.desired, d.devicesKnown = devices, true
	switch {
	case !d.intact:
	case first:
		d.report(context.Background(), d.compare(false))
	default:
		d.report(context.Background(), d.writeDevices(false))
	}
}

// repair makes the kernel's table complete. It reads the frontends only after a failure.
func (d *Dataplane) repair(ctx context.Context) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.started {
		d.report(ctx, d.compare(!d.intact))
	}
}

// compare makes the kernel's table contain the devices and, if it was missing or all is set, the
// frontends. The caller holds mu.
func (d *Dataplane) compare(all bool) error {
	c, err := d.table.read(d.conn, all)
	if err != nil {
		return err
	}
	if c == nil {
		if err := d.table.create(d.conn, kmod.Load); err != nil {
			return fmt.Errorf("create the flowtable: %w", err)
		}
		all, c = true, &content{}
	}
	var errs []error
	if all {
		errs = append(errs, d.compareFrontends(c))
	}
	if d.devicesKnown {
		errs = append(errs, d.compareDevices(c), d.writeDevices(true))
	}
	return errors.Join(errs...)
}

// compareFrontends writes the differences of the frontends. The caller holds mu.
func (d *Dataplane) compareFrontends(c *content) error {
	var added, removed []dataplane.Frontend
	for f := range d.owners {
		if _, ok := c.frontends[f]; !ok {
			added = append(added, f)
		}
	}
	for f := range c.frontends {
		if _, ok := d.owners[f]; !ok {
			removed = append(removed, f)
		}
	}
	return errors.Join(d.writeFrontends(removed, d.conn.SetDeleteElements), d.writeFrontends(added, d.conn.SetAddElements))
}

// compareDevices makes active correspond to the kernel, and removes what belongs to no active device.
// The caller holds mu.
func (d *Dataplane) compareDevices(c *content) error {
	names, indices := map[string]struct{}{}, map[uint32]struct{}{}
	clear(d.active)
	for _, device := range d.desired {
		_, hooked := c.hooks[device.Name]
		_, listed := c.devices[device.Index]
		if hooked && listed {
			d.active[device] = struct{}{}
			names[device.Name], indices[device.Index] = struct{}{}, struct{}{}
		}
	}
	var errs []error
	var unknown []flowdevices.Device
	for index := range c.devices {
		if _, ok := indices[index]; !ok {
			unknown = append(unknown, flowdevices.Device{Index: index})
		}
	}
	errs = append(errs, d.writeIndices(unknown, d.conn.SetDeleteElements))
	for name := range c.hooks {
		if _, ok := names[name]; !ok {
			if err := d.hooks.remove(name); err != nil && !isMissing(err) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// writeDevices adds and removes devices. A device is in the set of devices only while it is in the
// flowtable. retry says whether to try refused devices again. The caller holds mu.
func (d *Dataplane) writeDevices(retry bool) error {
	desired := make(map[flowdevices.Device]struct{}, len(d.desired))
	for _, device := range d.desired {
		desired[device] = struct{}{}
	}
	var added, removed []flowdevices.Device
	for device := range d.active {
		if _, ok := desired[device]; !ok {
			removed = append(removed, device)
		}
	}
	for device := range d.refused {
		if _, ok := desired[device]; !ok {
			delete(d.refused, device)
		}
	}
	for _, device := range d.desired {
		_, active := d.active[device]
		_, refused := d.refused[device]
		if !active && (!refused || retry) {
			added = append(added, device)
		}
	}
	return errors.Join(d.removeDevices(removed), d.addDevices(added))
}

func (d *Dataplane) removeDevices(devices []flowdevices.Device) error {
	errs := []error{d.writeIndices(devices, d.conn.SetDeleteElements)}
	for _, device := range devices {
		delete(d.active, device)
		// Before Linux 6.16, the kernel removes the hook of a device that goes away. Later kernels
		// keep its name.
		if err := d.hooks.remove(device.Name); err != nil && !isMissing(err) {
			errs = append(errs, fmt.Errorf("remove device %s from the flowtable: %w", device.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (d *Dataplane) addDevices(devices []flowdevices.Device) error {
	var added []flowdevices.Device
	var errs []error
	for chunk := range slices.Chunk(devices, maxHooks) {
		if !d.options.Hardware && d.hooks.add(namesOf(chunk)...) == nil {
			added = append(added, chunk...)
			continue
		}
		// One device has disappeared, or is not suitable.
		for _, device := range chunk {
			switch err := d.hooks.add(device.Name); {
			case err == nil:
				added = append(added, device)
				delete(d.refused, device)
			case isMissing(err) && d.exists():
				// The watcher will report that the device does not exist any more.
			case errors.Is(err, unix.EOPNOTSUPP):
				if _, logged := d.refused[device]; logged {
					continue
				}
				d.refused[device] = struct{}{}
				d.log.Info("a device does not take part in flow offload, because its driver does not support it", "device", device.Name, "hardware", d.options.Hardware)
			default:
				errs = append(errs, fmt.Errorf("add device %s to the flowtable: %w", device.Name, err))
			}
		}
	}
	errs = append(errs, d.writeIndices(added, d.conn.SetAddElements))
	for _, device := range added {
		d.active[device] = struct{}{}
	}
	return errors.Join(errs...)
}

// exists reports whether the flowtable exists.
func (d *Dataplane) exists() bool {
	_, complete, err := d.table.readStructure(d.conn)
	return complete && err == nil
}

func namesOf(devices []flowdevices.Device) []string {
	names := make([]string, len(devices))
	for i, device := range devices {
		names[i] = device.Name
	}
	return names
}

// writeIndices adds devices to the set of devices, or removes them.
func (d *Dataplane) writeIndices(devices []flowdevices.Device, change func(*nftables.Set, []nftables.SetElement) error) error {
	if len(devices) == 0 {
		return nil
	}
	elements := make([]nftables.SetElement, len(devices))
	for i, device := range devices {
		elements[i].Key = encodeIndex(device.Index)
	}
	_ = change(d.table.devices, elements) // the library keeps the error for Flush
	if err := d.conn.Flush(); err != nil {
		return fmt.Errorf("write the devices of the flowtable: %w", err)
	}
	return nil
}

// writeFrontends adds or removes frontends in batches.
func (d *Dataplane) writeFrontends(frontends []dataplane.Frontend, change func(*nftables.Set, []nftables.SetElement) error) error {
	for batch := range slices.Chunk(frontends, batchSize) {
		sets := map[*nftables.Set][]nftables.SetElement{}
		for _, f := range batch {
			s := d.table.frontendsOf(f)
			sets[s] = append(sets[s], nftables.SetElement{Key: frontendKey(f)})
		}
		for s, elements := range sets {
			_ = change(s, elements) // the library keeps the error for Flush
		}
		if err := d.conn.Flush(); err != nil {
			return fmt.Errorf("write the frontends of the flowtable: %w", err)
		}
	}
	return nil
}

// report records the result of a write. It logs the first of consecutive failures and the next
// success. After a failure, the next Replace or repair compares the table.
func (d *Dataplane) report(ctx context.Context, err error) {
	failed := d.err != nil
	d.err, d.intact = err, err == nil
	switch {
	case err != nil && !failed:
		d.log.WarnContext(ctx, "connections are not offloaded to a flowtable; Services are not affected", "error", err)
		if d.options.OnFailure != nil {
			d.options.OnFailure(err)
		}
	case err == nil && failed:
		d.log.InfoContext(ctx, "connections are offloaded to a flowtable again")
	}
	if err != nil && !errors.Is(err, ErrUnsupported) {
		d.drift.retry()
	}
}

// Stats describe the flowtable.
type Stats struct {
	// Ready reports that the kernel has the flowtable.
	Ready bool
	// Devices is the number of devices in the flowtable. Refused is the number of devices that would
	// take part, but whose drivers do not support it.
	Devices, Refused int
	// Offloaded is the number of times that a connection was offloaded since the table was created.
	Offloaded uint64
	// Active is the number of translated connections that are in a flowtable. It may be older than the
	// other fields by 100 times the time that it takes to count them. It is negative if they cannot be
	// counted.
	Active int
}

// Stats returns the current state.
func (d *Dataplane) Stats(ctx context.Context) Stats {
	s := d.stats()
	if !s.Ready {
		return s
	}
	var err error
	if s.Active, err = d.connections.read(ctx); err != nil {
		s.Active = -1
	}
	return s
}

// stats returns the state without the number of active connections.
func (d *Dataplane) stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := Stats{Ready: d.intact, Devices: len(d.active), Refused: len(d.refused)}
	if !d.intact {
		return s
	}
	counter, err := d.conn.GetObject(&nftables.CounterObj{Table: d.table.nf, Name: counterName})
	if c, ok := counter.(*nftables.CounterObj); ok && err == nil {
		s.Offloaded = c.Packets
	}
	return s
}

// Close closes the connections to the kernel, but not the inner Dataplane. The flowtable stays.
func (d *Dataplane) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(d.hooks.close(), d.conn.CloseLasting())
}
