package apiload

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/test/controlplane"
)

// Options configures a measurement.
type Options struct {
	// Systems are the Service proxies. All run with the same API server.
	Systems []system.System
	// Programs is the directory of etcd, kube-apiserver and kube-controller-manager, see
	// [controlplane.Options].
	Programs string
	// Nodes, Services and Endpoints are the numbers of Nodes, of Services, and of endpoints
	// of each Service. There must be a Node for each System and one more.
	Nodes, Services, Endpoints int
	// Starts is the number of starts of each System, and of reads of each encoding.
	Starts int
	// Changes is the number of changes of each kind.
	Changes int
	// QuietTime is how long the requests and bytes without changes are measured.
	QuietTime time.Duration
	// IdleTime is how long the API server's processor time without changes is measured, before
	// each part of the measurement.
	IdleTime time.Duration
	// Watchers is the number of additional clients with the watches of a Service proxy, for
	// the API server's processor time for each change and client.
	Watchers int
	// APIServerArgs and ControllerManagerArgs are additional flags of these programs.
	APIServerArgs, ControllerManagerArgs []string
	// Dir is a directory for logs, which must exist.
	Dir string
	// Progress, if not nil, is called with messages about the progress.
	Progress func(message string)
}

func (o Options) validate() error {
	switch {
	case o.Nodes <= len(o.Systems):
		return fmt.Errorf("options: %d Nodes: want more than systems", o.Nodes)
	case o.IdleTime <= 0:
		return errors.New("options: IdleTime is not positive")
	case o.Services < 1 || o.Endpoints < 1:
		return errors.New("options: want at least one Service with one endpoint")
	default:
		return nil
	}
}

// bench is a running measurement.
type bench struct {
	Options

	machine *machine
	cp      *controlplane.ControlPlane
	cluster *cluster
	audit   *auditLog
	report  *Report
	// sliceEvents counts the events of a watch of all EndpointSlices.
	sliceEvents atomic.Int64
	apiserver   int // process ID
	// idle is the processor time that the API server uses in each second without changes.
	idle float64
}

// Run measures the load of each System. It needs root.
func Run(ctx context.Context, o Options) (_ *Report, err error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	b := &bench{Options: o, report: &Report{Nodes: o.Nodes, Services: o.Services, Endpoints: o.Endpoints}}
	if b.machine, err = newMachine(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.machine.Close()) }()
	if err := b.startControlPlane(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.cp.Close()) }()
	begin := time.Now()
	if err := b.cluster.load(ctx); err != nil {
		return nil, err
	}
	if b.apiserver, err = b.cp.APIServerPID(); err != nil {
		return nil, err
	}
	b.progress("%d Nodes, %d Services and their EndpointSlices exist after %s", o.Nodes, o.Services, time.Since(begin).Round(time.Second))
	for _, step := range []func(context.Context) error{b.measureEncodings, b.measureStarts, b.measureChanges, b.measureWatchers} {
		if err := step(ctx); err != nil {
			return b.report, err
		}
	}
	return b.report, nil
}

func (b *bench) progress(format string, args ...any) {
	if b.Progress != nil {
		b.Progress(fmt.Sprintf(format, args...))
	}
}

func (b *bench) startControlPlane(ctx context.Context) error {
	var users []string
	for _, s := range b.Systems {
		users = append(users, s.Name())
	}
	policy, log := filepath.Join(b.Dir, "audit-policy.json"), filepath.Join(b.Dir, "audit.log")
	if err := os.WriteFile(policy, auditPolicy(users), 0o600); err != nil {
		return fmt.Errorf("write the audit policy: %w", err)
	}
	b.audit = newAuditLog(log)
	var err error
	if b.cp, err = controlplane.New(ctx, controlplane.Options{
		Programs: b.Programs, Namespace: b.machine.Namespace, Address: b.machine.IPv4,
		ServiceCIDRs:          []netip.Prefix{serviceCIDR()},
		ControllerManager:     true,
		APIServerArgs:         append([]string{"--audit-policy-file=" + policy, "--audit-log-path=" + log}, b.APIServerArgs...),
		ControllerManagerArgs: b.ControllerManagerArgs,
	}); err != nil {
		return err
	}
	if b.cluster, err = newCluster(b.Options, b.cp); err != nil {
		return errors.Join(err, b.cp.Close())
	}
	return nil
}

// agent is a running System.
type agent struct {
	*client

	name     string
	instance system.Instance
}

// start starts a System in a new namespace, as the proxy of the i-th Node.
func (b *bench) start(ctx context.Context, s system.System, i int) (_ *agent, err error) {
	a := &agent{name: s.Name()}
	if a.client, err = b.machine.newClient(); err != nil {
		return nil, err
	}
	kubeconfig := filepath.Join(b.Dir, s.Name()+".kubeconfig")
	err = b.cp.Kubeconfig(kubeconfig, s.Name(), "system:masters")
	if err == nil {
		a.instance, err = s.Start(ctx, system.Environment{
			Namespace: a.Namespace, Kubeconfig: kubeconfig, ClusterCIDR: clusterCIDR(), ServiceCIDR: serviceCIDR(), NodeName: nodeName(i), Dir: b.Dir,
		})
	}
	if err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

func (a *agent) stop() error { return errors.Join(a.instance.Stop(), a.Close()) }

const (
	// quietPeriod without data means that an agent has read its lists.
	quietPeriod = 3 * time.Second
	quietLimit  = 3 * time.Minute
)

// measureIdle measures the processor time that the API server uses without changes.
func (b *bench) measureIdle(ctx context.Context) error {
	before, err := processorTime(b.apiserver)
	if err == nil {
		err = sleep(ctx, b.IdleTime)
	}
	if err != nil {
		return err
	}
	after, err := processorTime(b.apiserver)
	b.idle = (after - before).Seconds() / b.IdleTime.Seconds()
	return err
}

// processorTimeOf returns the API server's processor time for do, without its idle time.
func (b *bench) processorTimeOf(do func() error) (time.Duration, error) {
	begin := time.Now()
	before, err := processorTime(b.apiserver)
	if err == nil {
		err = do()
	}
	if err != nil {
		return 0, err
	}
	after, err := processorTime(b.apiserver)
	return after - before - time.Duration(b.idle*float64(time.Since(begin))), err
}

// measureStarts measures the starts of the Systems, in turns.
func (b *bench) measureStarts(ctx context.Context) error {
	if err := b.measureIdle(ctx); err != nil {
		return err
	}
	for n := range b.Starts {
		for i, s := range b.Systems {
			if err := b.measureStart(ctx, s, i); err != nil {
				return fmt.Errorf("start %s: %w", s.Name(), err)
			}
		}
		b.progress("start %d of %d of all systems is measured", n+1, b.Starts)
	}
	return nil
}

func (b *bench) measureStart(ctx context.Context, s system.System, i int) error {
	before, err := b.audit.of(s.Name())
	if err != nil {
		return err
	}
	var a *agent
	var bytes Traffic
	cpu, err := b.processorTimeOf(func() (err error) {
		if a, err = b.start(ctx, s, i); err != nil {
			return err
		}
		if err = a.waitQuiet(ctx, quietPeriod, quietLimit); err == nil {
			bytes, err = a.traffic()
		}
		return err
	})
	if a == nil {
		return err
	}
	connections, connErr := a.connections()
	counts, auditErr := b.audit.of(s.Name())
	if err := errors.Join(err, connErr, auditErr, a.stop()); err != nil {
		return err
	}
	b.report.add(Measurement{Case: "start", Client: s.Name(), Requests: counts.minus(before), Traffic: bytes, CPU: cpu, Connections: connections})
	return nil
}

// observer is something that receives the changes.
type observer interface {
	// read returns the requests and bytes so far.
	read(b *bench) (Requests, Traffic, error)
	label() string
}

func (a *agent) label() string { return a.name }

func (a *agent) read(b *bench) (Requests, Traffic, error) {
	counts, err := b.audit.of(a.name)
	if err != nil {
		return nil, Traffic{}, err
	}
	bytes, err := a.traffic()
	return counts, bytes, err
}

// reference is a client that watches one resource.
type reference struct {
	*client

	name   string
	reader *reader
}

func (r *reference) label() string { return r.name }

func (r *reference) read(*bench) (Requests, Traffic, error) {
	bytes, err := r.traffic()
	return nil, bytes, err
}

// measureChanges measures each kind of change with all Systems running.
func (b *bench) measureChanges(ctx context.Context) (err error) {
	watches, stop := context.WithCancel(ctx)
	defer stop()
	group, watches := errgroup.WithContext(watches)
	if err := b.countSliceEvents(watches, group); err != nil {
		return err
	}
	var observers []observer
	for i, s := range b.Systems {
		a, err := b.start(ctx, s, i)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, a.stop()) }()
		if err := a.waitQuiet(ctx, quietPeriod, quietLimit); err != nil {
			return err
		}
		observers = append(observers, a)
	}
	for name, accept := range map[string]string{
		"watch of all Nodes, JSON": mediaJSON, "watch of all Nodes": mediaProtobuf, "watch of the metadata of all Nodes": mediaProtobuf + metadataOnly,
	} {
		r, err := b.watchReference(watches, group, name, watched{path: nodesPath}, accept)
		if err != nil {
			return err
		}
		defer r.Close() //nolint:errcheck // the measurement is complete
		observers = append(observers, r)
	}
	slices.SortStableFunc(observers[len(b.Systems):], func(x, y observer) int { return len(x.label()) - len(y.label()) })
	if err := b.waitIdle(ctx); err != nil {
		return err
	}
	for _, c := range b.changes() {
		if err := b.measureChange(ctx, c, observers); err != nil {
			return fmt.Errorf("measure %q: %w", c.name, err)
		}
	}
	stop()
	return group.Wait()
}

// waitIdle waits until the Systems have no work left from their start.
func (b *bench) waitIdle(ctx context.Context) error { return sleep(ctx, quietPeriod) }

// watchReference starts a client that watches one resource and discards it.
func (b *bench) watchReference(ctx context.Context, group *errgroup.Group, name string, w watched, accept string) (*reference, error) {
	c, err := b.machine.newClient()
	if err != nil {
		return nil, err
	}
	r := &reference{client: c, name: name}
	if r.reader, err = newReader(b.cp, c); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	listed := make(chan struct{})
	group.Go(func() error {
		defer r.reader.close()
		return r.reader.stream(ctx, w.path, w.query, accept, "", func() { close(listed) })
	})
	select {
	case <-listed:
		return r, nil
	case <-ctx.Done():
		return nil, errors.Join(context.Cause(ctx), c.Close())
	}
}

// countSliceEvents counts the changes of EndpointSlices.
func (b *bench) countSliceEvents(ctx context.Context, group *errgroup.Group) error {
	request := func(o metav1.ListOptions) *rest.Request {
		return b.cluster.slices.Get().Resource("endpointslices").VersionedParams(&o, metav1.ParameterCodec)
	}
	list := &discoveryv1.EndpointSliceList{}
	if err := request(metav1.ListOptions{Limit: 1}).Do(ctx).Into(list); err != nil {
		return fmt.Errorf("get the version of EndpointSlices: %w", err)
	}
	stream, err := request(metav1.ListOptions{ResourceVersion: list.ResourceVersion, Watch: true}).Watch(ctx)
	if err != nil {
		return fmt.Errorf("watch EndpointSlices: %w", err)
	}
	group.Go(func() error {
		defer stream.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case event, open := <-stream.ResultChan():
				if _, ok := event.Object.(*discoveryv1.EndpointSlice); !open || event.Type == watch.Error || !ok {
					return errors.New("the watch of EndpointSlices ended")
				}
				b.sliceEvents.Add(1)
			}
		}
	})
	return nil
}

// awaitSliceEvent returns a function that waits until EndpointSlices change after the last call.
func (b *bench) awaitSliceEvent(ctx context.Context) func() error {
	last := b.sliceEvents.Load()
	return func() error {
		const period, limit = 10 * time.Millisecond, time.Minute
		for end := time.Now().Add(limit); b.sliceEvents.Load() == last; {
			if time.Now().After(end) {
				return fmt.Errorf("no EndpointSlice has changed after %s", limit)
			}
			if err := sleep(ctx, period); err != nil {
				return err
			}
		}
		// Another change may follow, for example of the other fields of the endpoint.
		const settle = 200 * time.Millisecond
		err := sleep(ctx, settle)
		last = b.sliceEvents.Load()
		return err
	}
}

// change is a kind of change.
type change struct {
	name  string
	times int
	do    func(ctx context.Context, n int) error
}

func (b *bench) changes() []change {
	perMinute := int(max(1, b.QuietTime/time.Minute))
	step := max(1, b.Services/max(1, b.Changes))
	return []change{
		{"a minute without changes", perMinute, func(ctx context.Context, _ int) error {
			return sleep(ctx, b.QuietTime/time.Duration(perMinute))
		}},
		{"an endpoint becomes unready", b.Changes, func(ctx context.Context, n int) error {
			wait, service := b.awaitSliceEvent(ctx), n*step%b.Services
			if err := b.cluster.setReady(ctx, b.cluster.endpoints[service][0], false); err != nil {
				return err
			}
			return wait()
		}},
		{"an endpoint is replaced", b.Changes, func(ctx context.Context, n int) error {
			return b.cluster.replaceEndpoint(ctx, n*step%b.Services, b.awaitSliceEvent(ctx))
		}},
		{"a Service is created", b.Changes, func(ctx context.Context, _ int) error {
			wait := b.awaitSliceEvent(ctx)
			if _, err := b.cluster.createService(ctx); err != nil {
				return err
			}
			return wait()
		}},
		{"a label of the own Node changes", b.Changes, func(ctx context.Context, n int) error {
			for i := range b.Systems {
				if err := b.cluster.label(ctx, i, fmt.Sprint(n)); err != nil {
					return err
				}
			}
			return nil
		}},
		{"a label of another Node changes", b.Changes, func(ctx context.Context, n int) error {
			return b.cluster.label(ctx, len(b.Systems), fmt.Sprint(n))
		}},
		{fmt.Sprintf("the status of all %d Nodes is updated", b.Nodes), 1, func(ctx context.Context, _ int) error {
			for i := range b.Nodes {
				if err := b.cluster.heartbeat(ctx, i); err != nil {
					return err
				}
			}
			return nil
		}},
	}
}

// measureChange makes a change several times and records the mean for each observer.
func (b *bench) measureChange(ctx context.Context, c change, observers []observer) error {
	if c.times == 0 {
		return nil
	}
	type state struct {
		requests Requests
		bytes    Traffic
	}
	readAll := func() (all []state, err error) {
		for _, o := range observers {
			s := state{}
			if s.requests, s.bytes, err = o.read(b); err != nil {
				return nil, err
			}
			all = append(all, s)
		}
		return all, nil
	}
	before, err := readAll()
	if err != nil {
		return err
	}
	events := b.sliceEvents.Load()
	for n := range c.times {
		if err := c.do(ctx, n); err != nil {
			return err
		}
	}
	const arrival = time.Second // a change may still be on the way
	if err := sleep(ctx, arrival); err != nil {
		return err
	}
	after, err := readAll()
	if err != nil {
		return err
	}
	events = b.sliceEvents.Load() - events
	for i, o := range observers {
		b.report.add(Measurement{
			Case: c.name, Client: o.label(), Times: c.times, SliceEvents: int(events),
			Requests: after[i].requests.minus(before[i].requests), Traffic: after[i].bytes.minus(before[i].bytes),
		})
	}
	b.progress("%s: measured %d times", c.name, c.times)
	return nil
}

// measureEncodings reads the lists in several ways.
func (b *bench) measureEncodings(ctx context.Context) error {
	c, err := b.machine.newClient()
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // the measurement is complete
	r, err := newReader(b.cp, c)
	if err != nil {
		return err
	}
	defer r.close()
	if err := b.measureIdle(ctx); err != nil {
		return err
	}
	watches := proxyWatches(nodeName(0))
	for range b.Starts {
		for _, w := range watches[:2] {
			for _, e := range encodings() {
				before, err := c.traffic()
				if err != nil {
					return err
				}
				cpu, err := b.processorTimeOf(func() error { return e.read(ctx, r, w) })
				if err != nil {
					return fmt.Errorf("read %s, %s: %w", w.path, e.name, err)
				}
				after, err := c.traffic()
				if err != nil {
					return err
				}
				b.report.add(Measurement{Case: "list of " + filepath.Base(w.path), Client: e.name, Traffic: after.minus(before), CPU: cpu})
			}
		}
	}
	b.progress("the encodings of lists are measured")
	return b.measureRenewals(ctx, r, c, watches[1])
}

// measureRenewals measures a watch that begins again, as it does when its time is over.
func (b *bench) measureRenewals(ctx context.Context, r *reader, c *client, w watched) error {
	list := &discoveryv1.EndpointSliceList{}
	err := b.cluster.slices.Get().Resource("endpointslices").VersionedParams(&metav1.ListOptions{Limit: 1}, metav1.ParameterCodec).Do(ctx).Into(list)
	if err != nil {
		return fmt.Errorf("get the version of EndpointSlices: %w", err)
	}
	const times = 100
	before, err := c.traffic()
	if err != nil {
		return err
	}
	cpu, err := b.processorTimeOf(func() error {
		for range times {
			if err := r.renew(ctx, w.path, w.query, list.ResourceVersion); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("begin a watch again: %w", err)
	}
	after, err := c.traffic()
	b.report.add(Measurement{Case: "a watch begins again", Client: "protobuf", Times: times, Traffic: after.minus(before), CPU: cpu})
	return err
}

// encoding is a way to read a list.
type encoding struct {
	name string
	read func(context.Context, *reader, watched) error
}

func encodings() []encoding {
	list := func(accept, coding string) func(context.Context, *reader, watched) error {
		return func(ctx context.Context, r *reader, w watched) error {
			return r.list(ctx, w.path, w.query, accept, coding)
		}
	}
	stream := func(accept, coding string) func(context.Context, *reader, watched) error {
		return func(ctx context.Context, r *reader, w watched) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			return r.stream(ctx, w.path, w.query, accept, coding, cancel)
		}
	}
	return []encoding{
		{"streamed, protobuf", stream(mediaProtobuf, "")},
		{"streamed, protobuf, gzip", stream(mediaProtobuf, encodingGzip)},
		{"streamed, JSON, gzip", stream(mediaJSON, encodingGzip)},
		{"list, protobuf", list(mediaProtobuf, "")},
		{"list, protobuf, gzip", list(mediaProtobuf, encodingGzip)},
		{"list, JSON, gzip", list(mediaJSON, encodingGzip)},
		{"list of metadata, protobuf, gzip", list(mediaProtobuf+metadataList, encodingGzip)},
	}
}

// measureWatchers measures the API server's processor time for changes of EndpointSlices
// without and with additional watchers.
func (b *bench) measureWatchers(ctx context.Context) error {
	if b.Watchers == 0 || b.Changes == 0 {
		return nil
	}
	if err := b.measureUpdates(ctx, "no watchers"); err != nil {
		return err
	}
	for _, coding := range []string{"", encodingGzip} {
		if err := b.measureWatchersWith(ctx, coding); err != nil {
			return err
		}
	}
	return nil
}

// measureWatchersWith measures watchers with or without compression.
func (b *bench) measureWatchersWith(ctx context.Context, coding string) error {
	watches, stop := context.WithCancel(ctx)
	defer stop()
	group, watches := errgroup.WithContext(watches)
	c, err := b.machine.newClient()
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // the measurement is complete
	name := fmt.Sprintf("%d watchers", b.Watchers)
	if coding != "" {
		name += ", " + coding
	}
	readers, err := b.startWatchers(ctx, watches, group, c, name, coding)
	if err == nil {
		err = b.measureUpdates(ctx, name)
	}
	stop()
	for _, r := range readers {
		r.close()
	}
	return errors.Join(err, group.Wait())
}

// startWatchers starts the watchers, some at a time, and measures their start.
func (b *bench) startWatchers(ctx, watches context.Context, group *errgroup.Group, c *client, name, coding string) (readers []*reader, err error) {
	memory, err := system.UsageOf(b.apiserver)
	if err != nil {
		return nil, err
	}
	before, err := c.traffic()
	if err != nil {
		return nil, err
	}
	if err := b.measureIdle(ctx); err != nil {
		return nil, err
	}
	cpu, err := b.processorTimeOf(func() error {
		for i := range b.Watchers {
			r, err := newReader(b.cp, c)
			if err != nil {
				return err
			}
			readers = append(readers, r)
			for _, w := range proxyWatches(nodeName(i % b.Nodes)) {
				listed := make(chan struct{})
				group.Go(func() error {
					return r.stream(watches, w.path, w.query, mediaProtobuf, coding, func() { close(listed) })
				})
				select {
				case <-listed:
				case <-watches.Done():
					return context.Cause(watches)
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	after, err := c.traffic()
	if err != nil {
		return nil, err
	}
	usage, err := system.UsageOf(b.apiserver)
	if err != nil {
		return nil, err
	}
	b.report.add(Measurement{
		Case: "start of a watcher", Client: name, Times: b.Watchers, Traffic: after.minus(before), CPU: cpu,
		Memory: usage.Resident - memory.Resident,
	})
	b.progress("%s have started", name)
	return readers, nil
}

// measureUpdates measures changes of EndpointSlices while the named watchers run.
func (b *bench) measureUpdates(ctx context.Context, watchers string) error {
	counting, stop := context.WithCancel(ctx)
	defer stop()
	group, counting := errgroup.WithContext(counting)
	if err := b.countSliceEvents(counting, group); err != nil {
		return err
	}
	if err := b.measureIdle(ctx); err != nil {
		return err
	}
	step := max(1, b.Services/b.Changes)
	const rounds = 2 // unready and ready again
	events := b.sliceEvents.Load()
	cpu, err := b.processorTimeOf(func() error {
		for n := range rounds * b.Changes {
			wait, service := b.awaitSliceEvent(ctx), n/rounds*step%b.Services
			pods := b.cluster.endpoints[service]
			if err := b.cluster.setReady(ctx, pods[len(pods)-1], n%rounds == 1); err != nil {
				return err
			}
			if err := wait(); err != nil {
				return err
			}
		}
		return nil
	})
	stop()
	if err := errors.Join(err, group.Wait()); err != nil {
		return fmt.Errorf("update EndpointSlices with %s: %w", watchers, err)
	}
	b.report.add(Measurement{
		Case: "an endpoint becomes unready or ready", Client: watchers, Times: rounds * b.Changes,
		SliceEvents: int(b.sliceEvents.Load() - events), CPU: cpu,
	})
	return nil
}
