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
	// deniedRetryMin and deniedRetryMax are how long after a refusal
	// ServiceCIDRs are asked for again. The first time may be soon: an API
	// server that starts can refuse what it allows a moment later.
	deniedRetryMin = 30 * time.Second
	deniedRetryMax = 10 * time.Minute

	verbList  = "list"
	verbWatch = "watch"
)

// Options say which API server to follow, and for which node.
type Options struct {
	// Config says how to reach the API server, see [Config].
	Config *rest.Config
	// NodeName is the name of this node's Node object.
	NodeName string
	// Version is the program's, for the user agent. It may be empty.
	Version string
	// BatchPeriod is how far apart changes are read in the long run, so that those
	// that come faster gather. No change is late by more than that, and none while
	// they are few: ten readings may follow each other at once. Lists never wait.
	// Zero has every change read as it arrives.
	BatchPeriod time.Duration
	// MassRemovalDelay is how long removals are held if a list lacks more than half
	// of the Services or EndpointSlices that there were before. The list is then
	// made once more. Zero or less removes them at once.
	MassRemovalDelay time.Duration
	// Programmed, if not nil, returns the names of the Services for which an earlier
	// run of the program has left endpoints in the kernel. The first list of each kind
	// is compared with them. It is called at most once for each kind, and may block.
	ProgrammedServices func() map[types.NamespacedName]struct{}
	// OnMassRemoval, if not nil, is called when removals begin to be held, with the
	// resource and how many of its objects are affected. It must not block.
	OnMassRemoval func(resource string, removed, before int)
	// Logger takes what is unusual: when the API server goes away, with growing
	// pauses while it is, and when it is back. Nil discards it.
	Logger *slog.Logger
}

// Source follows the objects of an API server.
type Source struct {
	nodeName   string
	log        *slog.Logger
	clients    clients
	trimmer    *trimmer
	queue      *deltaQueue
	connection *connectionState
	synced     atomic.Bool
	inFlight   requestTracker
	reflectors []*resourceReflector
	conns      *connrotation.ConnectionTracker
}

// New returns a Source. It starts nothing and does not speak to the server. The
// error says what in the configuration cannot be used, such as a certificate.
func New(opts Options) (*Source, error) {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	box := newDeltaQueue()
	conns := connrotation.NewConnectionTracker()
	config := trackConnections(newReadBatcher(opts.BatchPeriod, box.watchingOnly).wrapConfig(opts.Config), conns)
	clients, err := newClients(config, opts.Version, services.groupVersion(), endpointSlices.groupVersion(), serviceCIDRs.groupVersion())
	if err != nil {
		return nil, err
	}
	s := &Source{
		nodeName:   opts.NodeName,
		log:        log,
		clients:    clients,
		trimmer:    newTrimmer(),
		queue:      box,
		connection: newConnectionState(log, describeCredentials(opts.Config)),
		conns:      conns,
	}
	s.reflectors = s.newReflectors(opts)
	return s, nil
}

// trackConnections returns a configuration whose connections can be closed all at once.
func trackConnections(config *rest.Config, conns *connrotation.ConnectionTracker) *rest.Config {
	config = rest.CopyConfig(config)
	config.Dial = connrotation.NewDialerWithTracker(connrotation.DialFunc(baseDial(config)), conns).DialContext
	return config
}

// closeConnections closes all connections to the API server, so that others are made:
// something on the way may answer pings and pass nothing on.
func (s *Source) closeConnections() { s.conns.CloseAll() }

// Run delivers everything there is, and then each change. It blocks until ctx is
// done, and then returns nil: whatever is wrong with the API server, it tries
// again. deliver is called from within Run, one call at a time. Run must be called
// only once.
//
// The first Delta comes when the lists of Services and EndpointSlices are complete.
// It waits some seconds longer for the Node of this name and for ServiceCIDRs; it may
// be empty. Changes that arrive while deliver is busy gather and
// come in one Delta, which has the last of each name.
func (s *Source) Run(ctx context.Context, deliver func(kube.Delta)) error {
	ctx, cancel := context.WithCancel(logr.NewContext(ctx, logr.FromSlogHandler(demotingHandler{s.log.Handler()})))
	var reflectors sync.WaitGroup
	defer func() {
		cancel()
		reflectors.Wait()
		s.inFlight.closeAndWait()
	}()
	for _, k := range s.reflectors {
		reflectors.Go(func() { k.follow(ctx) })
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
			if d, ok := s.queue.pop(); ok {
				deliver(d)
				s.synced.Store(true)
			} else if missing := s.queue.missingLists(); len(missing) > 0 {
				optional.start(missing)
			}
		}
	}
}

// Synced reports whether the first Delta has been delivered. It stays so while
// the API server is away.
func (s *Source) Synced() bool { return s.synced.Load() }

// requestTracker has the lists that are being read: a reflector that is told to stop
// leaves its own behind.
type requestTracker struct {
	sync.WaitGroup
	mu     sync.Mutex
	closed bool
}

// tryAdd reports whether a list may begin. Done says that it has ended.
func (u *requestTracker) tryAdd() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.closed {
		u.Add(1)
	}
	return !u.closed
}

// closeAndWait waits for what is under way. Nothing begins after that.
func (u *requestTracker) closeAndWait() {
	u.mu.Lock()
	u.closed = true
	u.mu.Unlock()
	u.Wait()
}

// resourceReflector is one kind of objects to follow.
type resourceReflector struct {
	resource     resource
	expectedType runtime.Object
	newList      func() runtime.Object
	store        cache.TransformingStore
	source       *Source
	progress     *progress
	hold         *removalHold // nil for kinds whose removals are not held
	// relistRequests has an element when the list is to be made once more.
	relistRequests chan struct{}
	// refused, if not nil, is told that the server does not serve the kind, or
	// not to us: then there is nothing to wait for. watched is told that it does.
	onDenied  func(error)
	onWatched func()
}

// requestRelist has the list made once more after a time.
func (l *resourceReflector) requestRelist(after time.Duration) {
	time.AfterFunc(after, func() {
		select {
		case l.relistRequests <- struct{}{}:
		default:
		}
	})
}

// newReflector returns a list that is to be given a store.
func (s *Source) newReflector(k resource, item runtime.Object, empty func() runtime.Object) *resourceReflector {
	l := &resourceReflector{resource: k, expectedType: item, newList: empty, source: s, relistRequests: make(chan struct{}, 1)}
	l.progress = &progress{resource: k, log: s.log, requestRelist: l.requestRelist}
	return l
}

// enableRemovalHold has the removals of a list held if they are many.
func (l *resourceReflector) enableRemovalHold(opts Options) {
	l.hold = &removalHold{
		resource: l.resource, delay: opts.MassRemovalDelay, log: l.source.log, requestRelist: l.requestRelist,
		programmedServices: opts.ProgrammedServices, onHold: opts.OnMassRemoval,
	}
}

func (s *Source) newReflectors(opts Options) []*resourceReflector {
	followedServices := s.newReflector(services, &corev1.Service{}, func() runtime.Object { return &corev1.ServiceList{} })
	followedServices.enableRemovalHold(opts)
	serviceStore := newStore(services, s.queue, func(m *deltaQueue) pendingChanges[*corev1.Service] { return m.services }, s.trimmer.trimService, nil)
	serviceStore.hold, serviceStore.progress = followedServices.hold, followedServices.progress
	serviceStore.serviceName = func(svc *corev1.Service) (types.NamespacedName, bool) { return namespacedName(svc), true }
	followedServices.store = serviceStore

	slices := s.newReflector(endpointSlices, &discoveryv1.EndpointSlice{}, func() runtime.Object { return &discoveryv1.EndpointSliceList{} })
	slices.enableRemovalHold(opts)
	sliceStore := newStore(endpointSlices, s.queue,
		func(m *deltaQueue) pendingChanges[*discoveryv1.EndpointSlice] { return m.endpointSlices }, s.trimmer.trimEndpointSlice, nil)
	sliceStore.hold, sliceStore.progress = slices.hold, slices.progress
	sliceStore.serviceName = serviceNameOfSlice
	slices.store = sliceStore

	node := s.newReflector(nodes, &corev1.Node{}, func() runtime.Object { return &corev1.NodeList{} })
	nodeStore := newStore(nodes, s.queue, func(m *deltaQueue) pendingChanges[*corev1.Node] { return m.nodes }, s.trimmer.trimNode, sameNode)
	nodeStore.progress, node.store = node.progress, nodeStore

	cidrs := s.newReflector(serviceCIDRs, &networkingv1.ServiceCIDR{}, func() runtime.Object { return &networkingv1.ServiceCIDRList{} })
	cidrStore := newStore(serviceCIDRs, s.queue,
		func(m *deltaQueue) pendingChanges[*networkingv1.ServiceCIDR] { return m.serviceCIDRs }, s.trimmer.trimServiceCIDR, nil)
	cidrStore.progress, cidrs.store = cidrs.progress, cidrStore
	return []*resourceReflector{followedServices, slices, node, cidrs}
}

// serviceNameOfSlice returns the name of the Service that the slice has endpoints for.
func serviceNameOfSlice(slice *discoveryv1.EndpointSlice) (types.NamespacedName, bool) {
	name := slice.Labels[discoveryv1.LabelServiceName]
	return types.NamespacedName{Namespace: slice.Namespace, Name: name}, name != "" && len(slice.Endpoints) > 0
}

// sameNode says whether two trimmed Nodes are equal but for their versions. A
// kubelet writes its Node's status every few minutes.
func sameNode(a, b *corev1.Node) bool {
	c := *b
	c.ResourceVersion = a.ResourceVersion
	return equality.Semantic.DeepEqual(a, &c)
}

// follow keeps the store up to date until ctx is done.
func (l *resourceReflector) follow(ctx context.Context) {
	if l.resource != serviceCIDRs {
		l.listAndWatch(ctx)
		return
	}
	// Clusters older than 1.33 have no ServiceCIDRs, and a role made for
	// kube-proxy may not allow to read them.
	told, read := false, false
	for delay := deniedRetryMin; ; delay = min(2*delay, deniedRetryMax) {
		attemptCtx, cancel := context.WithCancel(ctx)
		attempt := *l
		attempt.onDenied = func(err error) {
			switch {
			case told:
			case read:
				l.source.log.WarnContext(ctx, "ServiceCIDRs can no longer be read, so what they were stays; "+
					"allow list and watch of servicecidrs.networking.k8s.io", "error", err)
			default:
				l.source.log.InfoContext(ctx, "ServiceCIDRs can't be read, so connections to addresses of no Service are not dropped; "+
					"a cluster since 1.33 serves them to who may list and watch servicecidrs of networking.k8s.io", "error", err)
			}
			told = true
			l.source.queue.skipList(l.resource)
			cancel()
		}
		attempt.onWatched = func() {
			if told {
				l.source.log.InfoContext(ctx, "ServiceCIDRs can be read now")
			}
			told, read, delay = false, true, deniedRetryMin
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

// listAndWatch lists and watches until ctx is done.
func (l *resourceReflector) listAndWatch(ctx context.Context) {
	logger := logr.FromContextOrDiscard(ctx)
	backoff := retryBackoff()
	reflector := cache.NewReflectorWithOptions(&cache.ListWatch{
		ListWithContextFunc:  l.list,
		WatchFuncWithContext: l.watch,
	}, l.expectedType, l.store, cache.ReflectorOptions{
		Name: string(l.resource), Logger: &logger, Backoff: &backoff,
		Clock: contextClock{after: func(d time.Duration) <-chan time.Time { return afterOrDone(ctx, d) }},
	})
	// As the reflector's own loop, which however hands errors to a function that
	// is shared by the whole process and makes everybody wait.
	_ = backoff.DelayWithReset(clock.RealClock{}, 2*time.Minute).Until(ctx, true, true, func(ctx context.Context) (bool, error) {
		if err := reflector.ListAndWatchWithContext(ctx); err != nil {
			l.source.log.DebugContext(ctx, "list or watch ended", "resource", string(l.resource), "error", err)
		}
		return false, nil
	})
}

// retryBackoff are those between attempts: from 0.8 to 10 seconds, up to twice that by
// chance, and short again after two minutes without one. They are client-go's but
// for the longest, which is 60 seconds there: so late would a node learn of
// endpoints that are gone. When the API server of 5,000 nodes
// returns, their four kinds make some 1,300 requests a second for 20 seconds, in
// no common step. They are streams from the server's cache, which it admits as it
// is able to (API Priority and Fairness), and while nobody listens attempts cost it
// nothing.
func retryBackoff() wait.Backoff {
	return wait.Backoff{Duration: 800 * time.Millisecond, Cap: 10 * time.Second, Steps: 10, Factor: 2, Jitter: 1}
}

// contextClock is the real clock, but nothing waits on it for longer than there is
// use: a reflector that streams a list does not look at its context while it
// pauses after "connection refused" or 429 Too Many Requests.
type contextClock struct {
	clock.RealClock
	after func(time.Duration) <-chan time.Time
}

// After returns a channel that has the time after d, or when it is of no use to
// wait longer.
func (c contextClock) After(d time.Duration) <-chan time.Time { return c.after(d) }

// afterOrDone returns a channel that has the time after d, or when ctx is done.
func afterOrDone(ctx context.Context, d time.Duration) <-chan time.Time {
	over := make(chan time.Time, 1) // nobody may be there to take it
	ctx, cancel := context.WithTimeout(ctx, d)
	context.AfterFunc(ctx, func() {
		cancel()
		over <- time.Now()
	})
	return over
}

func (l *resourceReflector) newRequest(opts *metav1.ListOptions) *rest.Request {
	l.resource.addSelectors(opts, l.source.nodeName)
	return l.source.clients[l.resource.groupVersion()].Get().Resource(string(l.resource)).VersionedParams(opts, metav1.ParameterCodec)
}

// onResponse passes on what the server answered.
func (l *resourceReflector) onResponse(ctx context.Context, verb string, err error) {
	if ctx.Err() != nil {
		return
	}
	l.progress.recordResponse(err == nil || isExpired(err) || isDenied(err))
	if l.onDenied != nil && isDenied(err) {
		l.source.connection.onOptionalDenied(ctx, l.resource, verb, err)
		l.onDenied(err)
		return
	}
	l.source.connection.onResponse(ctx, l.resource, verb, err)
	if l.onWatched != nil && verb == verbWatch && err == nil {
		l.onWatched()
	}
}
