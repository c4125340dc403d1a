package apiserver

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/connrotation"
	"k8s.io/utils/clock"

	"fairlead.io/fairlead/kube"
)

const (
	// deniedRetryMin and deniedRetryMax bound the interval at which the Source retries
	// ServiceCIDRs after the server denies them. The first retry is early because a
	// starting API server can deny requests that it allows a moment later.
	deniedRetryMin = 30 * time.Second
	deniedRetryMax = 10 * time.Minute

	verbList  = "list"
	verbWatch = "watch"
)

// Options configures a [Source].
type Options struct {
	// Config is the connection to the API server, see [Config].
	Config *rest.Config
	// NodeName is the name of this node's Node object.
	NodeName string
	// ServiceProxyName selects the Services and EndpointSlices with this value of the label
	// [kube.LabelServiceProxyName]. If it is empty, the Services without the label are selected.
	ServiceProxyName string
	// Version is the program's version for the user agent. It may be empty.
	Version string
	// BatchPeriod is the time between two reads of a connection while the Source watches and
	// changes are frequent: at least two in a period on average, and more than ten. It delays a
	// change by at most one period. Lists are never delayed. Zero reads each change as it arrives.
	BatchPeriod time.Duration
	// MassRemovalDelay is how long the Source holds removals if a list lacks more than half
	// of the Services or EndpointSlices that were known before. It then lists again. Zero
	// or less removes them at once.
	MassRemovalDelay time.Duration
	// ProgrammedServices, if not nil, returns the names of the Services for which an
	// earlier run of the program left endpoints in the kernel. The first list of each
	// resource is compared with them. It is called at most once per resource, and may
	// block.
	ProgrammedServices func() map[types.NamespacedName]struct{}
	// OnMassRemoval, if not nil, is called when the Source starts to hold removals, with
	// the resource, the number of objects to remove and the number known before. It must
	// not block.
	OnMassRemoval func(resource string, removed, before int)
	// ConvertObjects delivers Services and EndpointSlices as [kube.Delta.ConvertedServices] and
	// [kube.Delta.ConvertedSlices], converted for a Tracker of the node NodeName. It saves most of
	// the memory of the first lists.
	ConvertObjects bool
	// KeepAllFields keeps the fields of objects that package kube does not need, such as labels
	// and the names of pods, at the expense of memory.
	KeepAllFields bool
	// Logger receives warnings and state changes: when the API server becomes unavailable,
	// repeatedly while it is, and when it is back. Nil discards them.
	Logger *slog.Logger
}

// Source delivers the objects of an API server.
type Source struct {
	selection  selection
	log        *slog.Logger
	clients    clients
	trimmer    *trimmer
	queue      *deltaQueue
	connection *connectionState
	synced     atomic.Bool
	inFlight   requestTracker
	reflectors []*resourceReflector
	conns      *connrotation.ConnectionTracker
	// changes is the number of changes of Services and EndpointSlices that watches have received.
	changes *atomic.Uint64
	// uncompressed means that the client's configuration disables compression.
	uncompressed bool

	// delivering is held by the goroutine that calls receive, the function of Run.
	delivering sync.Mutex
	receive    func(kube.Delta) // nil while Run does not run
	// handOverUntil is the time before which only Run delivers, because a delivery took long.
	handOverUntil time.Time
}

// New returns a Source. It starts nothing and sends no requests. It returns an error if the
// client configuration is invalid, for example because of an unreadable certificate.
func New(opts Options) (*Source, error) {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	queue := newDeltaQueue()
	conns := connrotation.NewConnectionTracker()
	changes := &atomic.Uint64{}
	config := trackConnections(newReadBatcher(opts.BatchPeriod, queue.watchingOnly, changes.Load).wrapConfig(opts.Config), conns)
	clients, err := newClients(config, opts.Version, services.groupVersion(), endpointSlices.groupVersion(), serviceCIDRs.groupVersion())
	if err != nil {
		return nil, err
	}
	s := &Source{
		selection:  selection{nodeName: opts.NodeName, proxyName: opts.ServiceProxyName},
		log:        log,
		clients:    clients,
		trimmer:    newTrimmer(),
		queue:      queue,
		connection: newConnectionState(log, describeCredentials(opts.Config)),
		conns:      conns,
		changes:    changes,

		uncompressed: opts.Config.DisableCompression,
	}
	s.trimmer.keepsAll, s.trimmer.discards = opts.KeepAllFields, opts.ConvertObjects
	s.reflectors = s.newReflectors(opts)
	return s, nil
}

// trackConnections returns a copy of config whose connections can all be closed at once.
func trackConnections(config *rest.Config, conns *connrotation.ConnectionTracker) *rest.Config {
	config = rest.CopyConfig(config)
	config.Dial = connrotation.NewDialerWithTracker(connrotation.DialFunc(baseDial(config)), conns).DialContext
	return config
}

// closeConnections closes all connections to the API server, so that the next requests open
// new ones: a proxy or load balancer on the path may answer pings but forward nothing.
func (s *Source) closeConnections() { s.conns.CloseAll() }

// Run delivers all objects and then each change. It blocks until ctx is done and then
// returns nil; it retries all errors of the API server. Run must be called only once.
//
// Calls of deliver do not overlap, and none is active after Run has returned. They come from
// several goroutines: the goroutine that receives a single change delivers it, because a hand-over
// takes longer than the change. Meanwhile it receives no further changes of the same resource.
//
// The first Delta is delivered when the lists of Services and EndpointSlices are complete.
// It waits some seconds longer for the Node with the configured name and for ServiceCIDRs;
// it may be empty. Changes that arrive while deliver is busy are coalesced into one Delta
// with the latest state of each name.
func (s *Source) Run(ctx context.Context, deliver func(kube.Delta)) error {
	ctx, cancel := context.WithCancel(logr.NewContext(ctx, logr.FromSlogHandler(demotingHandler{s.log.Handler()})))
	var goroutines sync.WaitGroup
	defer func() {
		cancel()
		goroutines.Wait()
		s.inFlight.closeAndWait()
	}()
	s.setReceiver(deliver)
	defer s.setReceiver(nil)
	for _, r := range s.reflectors {
		goroutines.Go(func() { r.follow(ctx) })
	}
	reminder, optional := newReminder(), &optionalListTimer{Timer: newReminder().Timer}
	defer reminder.Stop()
	defer optional.Stop()
	reminder.start(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-reminder.C:
			s.logProblems(ctx, reminder)
		case <-s.connection.failureBegan:
			reminder.start(1)
		case <-optional.C:
			s.skipLateLists(ctx, optional)
		case <-s.queue.wake:
			if s.deliverAll() {
				s.synced.Store(true)
			} else if missing := s.queue.missingLists(); len(missing) > 0 {
				optional.start(missing)
			}
		}
	}
}

// setReceiver sets the function that receives the changes. It waits until no call of the previous
// one is active.
func (s *Source) setReceiver(receive func(kube.Delta)) {
	s.delivering.Lock()
	defer s.delivering.Unlock()
	s.receive = receive
}

// deliverAll delivers the pending changes. It reports false without changes, or if a list is
// missing.
func (s *Source) deliverAll() bool {
	s.delivering.Lock()
	defer s.delivering.Unlock()
	d, ok := s.queue.pop()
	if ok {
		s.receive(d)
	}
	return ok
}

const (
	// slowDelivery is the duration of a delivery after which reflectors hand over their changes to
	// Run for handOverPeriod.
	slowDelivery   = 20 * time.Millisecond
	handOverPeriod = 200 * time.Millisecond
)

// maxDirectChanges is the largest number of changes that a reflector delivers. While more are
// delivered, the reflector should receive further ones.
const maxDirectChanges = 64

// deliverChanges delivers the changes that a reflector has stored. It hands over to Run if they are
// many, if another delivery is active, or if deliveries take long.
func (s *Source) deliverChanges() {
	if !s.synced.Load() || !s.delivering.TryLock() {
		s.queue.signal()
		return
	}
	defer s.delivering.Unlock()
	start := time.Now()
	if s.receive == nil || start.Before(s.handOverUntil) || s.queue.size() > maxDirectChanges {
		s.queue.signal()
		return
	}
	d, ok := s.queue.pop()
	if !ok {
		return
	}
	s.receive(d)
	if end := time.Now(); end.Sub(start) > slowDelivery {
		s.handOverUntil = end.Add(handOverPeriod)
	}
}

// Synced reports whether the first Delta has been delivered. It stays true while the API
// server is unavailable.
func (s *Source) Synced() bool { return s.synced.Load() }

// requestTracker tracks requests in flight. A stopped client-go reflector does not wait for
// its requests.
type requestTracker struct {
	sync.WaitGroup
	mu     sync.Mutex
	closed bool
}

// tryAdd registers a request and reports true, or reports false after closeAndWait. The
// caller calls Done when the request ends.
func (u *requestTracker) tryAdd() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.closed {
		u.Add(1)
	}
	return !u.closed
}

// closeAndWait rejects further requests and waits for those in flight.
func (u *requestTracker) closeAndWait() {
	u.mu.Lock()
	u.closed = true
	u.mu.Unlock()
	u.Wait()
}

// resourceReflector lists and watches one resource and writes it to a store.
type resourceReflector struct {
	resource     resource
	expectedType runtime.Object
	newList      func() runtime.Object
	store        cache.TransformingStore
	source       *Source
	progress     *progress
	hold         *removalHold // nil for kinds whose removals are not held
	// changed means that the store has undelivered changes of a watch. The reflector's goroutine
	// uses it.
	changed bool
	// relistRequests holds one element when the resource must be listed again.
	relistRequests chan struct{}
	// onDenied, if not nil, is called when the server does not serve the resource or does
	// not allow access. onWatched, if not nil, is called when a watch is accepted.
	onDenied  func(error)
	onWatched func()
}

// requestRelist requests another list of the resource after a delay.
func (r *resourceReflector) requestRelist(after time.Duration) {
	time.AfterFunc(after, func() {
		select {
		case r.relistRequests <- struct{}{}:
		default:
		}
	})
}

// newReflector returns a resourceReflector. The caller sets its store.
func (s *Source) newReflector(res resource, expectedType runtime.Object, newList func() runtime.Object) *resourceReflector {
	r := &resourceReflector{resource: res, expectedType: expectedType, newList: newList, source: s, relistRequests: make(chan struct{}, 1)}
	r.progress = &progress{resource: res, log: s.log, requestRelist: r.requestRelist}
	return r
}

// noteChange is called when the reflector has stored a change.
func (r *resourceReflector) noteChange() {
	r.changed = true
	r.source.changes.Add(1)
}

// deliverChanges delivers the changes that the reflector has stored. The reflector calls it before it
// waits for further ones.
func (r *resourceReflector) deliverChanges() {
	if r.changed {
		r.changed = false
		r.source.deliverChanges()
	}
}

// enableRemovalHold holds mass removals of the resource, see [Options.MassRemovalDelay].
func (r *resourceReflector) enableRemovalHold(opts Options) {
	r.hold = &removalHold{
		resource: r.resource, delay: opts.MassRemovalDelay, log: r.source.log, requestRelist: r.requestRelist,
		programmedServices: opts.ProgrammedServices, onHold: opts.OnMassRemoval,
	}
}

// newReflectors returns the reflectors of all resources, with their stores.
func (s *Source) newReflectors(opts Options) []*resourceReflector {
	convertService, convertSlice := whole[corev1.Service, kube.ConvertedService], whole[discoveryv1.EndpointSlice, kube.ConvertedSlice]
	if opts.ConvertObjects {
		convertService, convertSlice = newServiceConverter(), newSliceConverter(opts.NodeName)
	}
	serviceReflector := s.newReflector(services, &corev1.Service{}, func() runtime.Object { return &corev1.ServiceList{} })
	serviceReflector.enableRemovalHold(opts)
	serviceStore := newStore(services, s.queue,
		func(q *deltaQueue) pendingChanges[deliveredService] { return q.services }, s.trimmer.trimService, convertService, nil)
	serviceStore.hold, serviceStore.progress = serviceReflector.hold, serviceReflector.progress
	serviceStore.serviceName = func(svc *corev1.Service) (types.NamespacedName, bool) { return namespacedName(svc), true }
	serviceStore.onChange = serviceReflector.noteChange
	serviceReflector.store = serviceStore

	sliceReflector := s.newReflector(endpointSlices, &discoveryv1.EndpointSlice{}, func() runtime.Object { return &discoveryv1.EndpointSliceList{} })
	sliceReflector.enableRemovalHold(opts)
	sliceStore := newStore(endpointSlices, s.queue,
		func(q *deltaQueue) pendingChanges[deliveredSlice] { return q.endpointSlices }, s.trimmer.trimEndpointSlice, convertSlice, nil)
	sliceStore.hold, sliceStore.progress = sliceReflector.hold, sliceReflector.progress
	sliceStore.serviceName = serviceNameOfSlice
	sliceStore.onChange = sliceReflector.noteChange
	sliceReflector.store = sliceStore

	nodeReflector := s.newReflector(nodes, &corev1.Node{}, func() runtime.Object { return &corev1.NodeList{} })
	nodeStore := newStore(nodes, s.queue, func(q *deltaQueue) pendingChanges[*corev1.Node] { return q.nodes }, s.trimmer.trimNode, unconverted, sameNode)
	nodeStore.progress, nodeReflector.store = nodeReflector.progress, nodeStore

	cidrReflector := s.newReflector(serviceCIDRs, &networkingv1.ServiceCIDR{}, func() runtime.Object { return &networkingv1.ServiceCIDRList{} })
	cidrStore := newStore(serviceCIDRs, s.queue,
		func(q *deltaQueue) pendingChanges[*networkingv1.ServiceCIDR] { return q.serviceCIDRs }, s.trimmer.trimServiceCIDR, unconverted, nil)
	cidrStore.progress, cidrReflector.store = cidrReflector.progress, cidrStore
	return []*resourceReflector{serviceReflector, sliceReflector, nodeReflector, cidrReflector}
}

// newServiceConverter returns the convert function of Services for Options.ConvertObjects.
func newServiceConverter() func(*corev1.Service) deliveredService {
	converter := kube.NewServiceConverter()
	return func(svc *corev1.Service) deliveredService { return deliveredService{converted: converter.Convert(svc)} }
}

// newSliceConverter returns the convert function of EndpointSlices for Options.ConvertObjects.
func newSliceConverter(node string) func(*discoveryv1.EndpointSlice) deliveredSlice {
	return func(slice *discoveryv1.EndpointSlice) deliveredSlice {
		return deliveredSlice{converted: kube.ConvertSlice(slice, node)}
	}
}

// serviceNameOfSlice returns the name of the Service whose endpoints the slice holds. It
// reports false if the slice names no Service or has no endpoints.
func serviceNameOfSlice(slice *discoveryv1.EndpointSlice) (types.NamespacedName, bool) {
	name := slice.Labels[discoveryv1.LabelServiceName]
	return types.NamespacedName{Namespace: slice.Namespace, Name: name}, name != "" && len(slice.Endpoints) > 0
}

// sameNode reports whether two trimmed Nodes are equal except for their resource versions.
// A kubelet updates the status of its Node every few minutes.
func sameNode(a, b *corev1.Node) bool {
	c := *b
	c.ResourceVersion = a.ResourceVersion
	return equality.Semantic.DeepEqual(a, &c)
}

// follow keeps the store up to date until ctx is done.
func (r *resourceReflector) follow(ctx context.Context) {
	if r.resource != serviceCIDRs {
		r.listAndWatch(ctx)
		return
	}
	// Clusters older than 1.33 have no ServiceCIDRs, and kube-proxy's RBAC role may not
	// include them.
	denied, readBefore := false, false
	for delay := deniedRetryMin; ; delay = min(2*delay, deniedRetryMax) {
		attemptCtx, cancel := context.WithCancel(ctx)
		// A copy with handlers that end this attempt when the server denies ServiceCIDRs.
		attempt := *r
		attempt.onDenied = func(err error) {
			switch {
			case denied:
			case readBefore:
				r.source.log.WarnContext(ctx, "ServiceCIDRs can no longer be read; the last known ones stay in use: "+
					"allow list and watch of servicecidrs.networking.k8s.io", "error", err)
			default:
				r.source.log.InfoContext(ctx, "ServiceCIDRs can't be read, so connections to unassigned cluster IPs are not dropped: "+
					"use Kubernetes 1.33 or later, and allow list and watch of servicecidrs.networking.k8s.io", "error", err)
			}
			denied = true
			r.source.queue.skipList(r.resource)
			cancel()
		}
		attempt.onWatched = func() {
			if denied {
				r.source.log.InfoContext(ctx, "ServiceCIDRs can be read now")
			}
			denied, readBefore, delay = false, true, deniedRetryMin
		}
		attempt.listAndWatch(attemptCtx)
		cancel()
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
	}
}

// listAndWatch runs a client-go reflector until ctx is done.
func (r *resourceReflector) listAndWatch(ctx context.Context) {
	logger := logr.FromContextOrDiscard(ctx)
	backoff := retryBackoff()
	reflector := cache.NewReflectorWithOptions(&cache.ListWatch{
		ListWithContextFunc:  r.list,
		WatchFuncWithContext: r.watch,
	}, r.expectedType, r.store, cache.ReflectorOptions{
		Name: string(r.resource), Logger: &logger, Backoff: &backoff,
		Clock: contextClock{after: func(d time.Duration) <-chan time.Time { return afterOrDone(ctx, d) }},
	})
	// This is the loop of Reflector.RunWithContext, except that RunWithContext passes errors to
	// handlers that all clients of the process share and that delay each caller.
	_ = backoff.DelayWithReset(clock.RealClock{}, 2*time.Minute).Until(ctx, true, true, func(ctx context.Context) (bool, error) {
		if err := reflector.ListAndWatchWithContext(ctx); err != nil {
			r.source.log.DebugContext(ctx, "list or watch ended", "resource", string(r.resource), "error", err)
		}
		return false, nil
	})
}

// retryBackoff returns the backoff between two attempts: from 0.8 to 10 seconds with a
// random factor of one to two; it is reset after two minutes without a retry. The values
// are client-go's, except for its maximum of 60 seconds, which is too late for a node to
// learn of removed endpoints. When the API server returns, the four resources of 5,000
// nodes cause about 1,300 requests a second for 20 seconds, spread at random. The server
// streams them from its cache and admits them according to API Priority and Fairness. While
// no server listens, attempts cost it nothing.
func retryBackoff() wait.Backoff {
	return wait.Backoff{Duration: 800 * time.Millisecond, Cap: 10 * time.Second, Steps: 10, Factor: 2, Jitter: 1}
}

// contextClock is the real clock, except that its After channels also fire when the context
// is done. A reflector that streams a list does not check its context while it waits after
// "connection refused" or 429 Too Many Requests.
type contextClock struct {
	clock.RealClock
	after func(time.Duration) <-chan time.Time
}

// After implements [clock.Clock].
func (c contextClock) After(d time.Duration) <-chan time.Time { return c.after(d) }

// afterOrDone returns a channel that receives the time after d, or when ctx is done.
func afterOrDone(ctx context.Context, d time.Duration) <-chan time.Time {
	fired := make(chan time.Time, 1) // buffered: the receiver may be gone
	ctx, cancel := context.WithTimeout(ctx, d)
	context.AfterFunc(ctx, func() {
		cancel()
		fired <- time.Now()
	})
	return fired
}

func (r *resourceReflector) newRequest(opts *metav1.ListOptions) *rest.Request {
	r.source.selection.addSelectors(r.resource, opts)
	return r.source.clients[r.resource.groupVersion()].Get().Resource(string(r.resource)).VersionedParams(opts, metav1.ParameterCodec)
}

// dropFieldSelector reports whether the server refused the field selector of Services, so that the
// request must be repeated. Later requests do without it.
func (r *resourceReflector) dropFieldSelector(ctx context.Context, err error) bool {
	if r.resource != services || !apierrors.IsBadRequest(err) || r.source.selection.headless.Swap(true) {
		return false
	}
	r.source.log.InfoContext(ctx, "API server can't leave out headless Services, as before Kubernetes 1.31; the agent ignores them", "error", err)
	return true
}

// onResponse records the result of a request.
func (r *resourceReflector) onResponse(ctx context.Context, verb string, err error) {
	if ctx.Err() != nil {
		return
	}
	r.progress.recordResponse(err == nil || isExpired(err) || isDenied(err))
	if r.onDenied != nil && isDenied(err) {
		r.source.connection.onOptionalDenied(ctx, r.resource, verb, err)
		r.onDenied(err)
		return
	}
	r.source.connection.onResponse(ctx, r.resource, verb, err)
	if r.onWatched != nil && verb == verbWatch && err == nil {
		r.onWatched()
	}
}
