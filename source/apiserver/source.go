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
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/clock"

	"fairlead/kube"
)

const (
	// lateAfter is when the operator is told which lists are waited for.
	lateAfter = 5 * time.Second
	// refusedRetryMin and refusedRetryMax are how long after a refusal
	// ServiceCIDRs are asked for again. The first time may be soon: an API
	// server that starts can refuse what it allows a moment later.
	refusedRetryMin = 30 * time.Second
	refusedRetryMax = 10 * time.Minute

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
	// Logger takes what is unusual: once when the API server goes away, once
	// when it is back. Nil discards it.
	Logger *slog.Logger
}

// Source follows the objects of an API server.
type Source struct {
	nodeName string
	log      *slog.Logger
	clients  clients
	trimmer  *trimmer
	box      *mailbox
	contact  *contact
	synced   atomic.Bool
	lists    underWay
}

// New returns a Source. It starts nothing and does not speak to the server. The
// error says what in the configuration cannot be used, such as a certificate.
func New(opts Options) (*Source, error) {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	box := newMailbox()
	clients, err := newClients(newPace(opts.BatchPeriod, box.following).config(opts.Config), opts.Version, services.group(), endpointSlices.group(), serviceCIDRs.group())
	if err != nil {
		return nil, err
	}
	return &Source{
		nodeName: opts.NodeName,
		log:      log,
		clients:  clients,
		trimmer:  newTrimmer(),
		box:      box,
		contact:  newContact(log, credentials(opts.Config)),
	}, nil
}

// Run delivers everything there is, and then each change. It blocks until ctx is
// done, and then returns nil: whatever is wrong with the API server, it tries
// again. deliver is called from within Run, one call at a time. Run must be called
// only once.
//
// The first Delta comes when the lists of Services and EndpointSlices are complete,
// it is known whether there is a Node of this name, and ServiceCIDRs are listed or
// refused; it may be empty. Changes that arrive while deliver is busy gather and
// come in one Delta, which has the last of each name.
func (s *Source) Run(ctx context.Context, deliver func(kube.Delta)) error {
	ctx, cancel := context.WithCancel(logr.NewContext(ctx, logr.FromSlogHandler(demoted{s.log.Handler()})))
	var reflectors sync.WaitGroup
	defer func() {
		cancel()
		reflectors.Wait()
		s.lists.end()
	}()
	for _, k := range s.kinds() {
		reflectors.Go(func() { k.follow(ctx) })
	}
	late := time.NewTimer(lateAfter)
	defer late.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-late.C:
			if missing := s.box.late(); len(missing) > 0 {
				s.log.WarnContext(ctx, "lists of the API server are late; nothing new is programmed until they are complete",
					"missing", missing)
			}
		case <-s.box.wake:
			if d, ok := s.box.take(); ok {
				deliver(d)
				s.synced.Store(true)
			}
		}
	}
}

// Synced reports whether the first Delta has been delivered. It stays so while
// the API server is away.
func (s *Source) Synced() bool { return s.synced.Load() }

// underWay has the lists that are being read: a reflector that is told to stop
// leaves its own behind.
type underWay struct {
	sync.WaitGroup
	mu    sync.Mutex
	ended bool
}

// begin reports whether a list may begin. Done says that it has ended.
func (u *underWay) begin() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.ended {
		u.Add(1)
	}
	return !u.ended
}

// end waits for what is under way. Nothing begins after that.
func (u *underWay) end() {
	u.mu.Lock()
	u.ended = true
	u.mu.Unlock()
	u.Wait()
}

// list is one kind of objects to follow.
type list struct {
	kind  kind
	item  runtime.Object
	empty func() runtime.Object
	store cache.TransformingStore
	src   *Source
	// refused, if not nil, is told that the server does not serve the kind, or
	// not to us: then there is nothing to wait for. watched is told that it does.
	refused func(error)
	watched func()
}

func (s *Source) kinds() []*list {
	return []*list{
		{
			kind: services, src: s, item: &corev1.Service{}, empty: func() runtime.Object { return &corev1.ServiceList{} },
			store: newStore(services, s.box, func(m *mailbox) gathered[*corev1.Service] { return m.services }, s.trimmer.service, nil),
		},
		{
			kind: endpointSlices, src: s, item: &discoveryv1.EndpointSlice{}, empty: func() runtime.Object { return &discoveryv1.EndpointSliceList{} },
			store: newStore(endpointSlices, s.box,
				func(m *mailbox) gathered[*discoveryv1.EndpointSlice] { return m.endpointSlices }, s.trimmer.endpointSlice, nil),
		},
		{
			kind: nodes, src: s, item: &corev1.Node{}, empty: func() runtime.Object { return &corev1.NodeList{} },
			store: newStore(nodes, s.box, func(m *mailbox) gathered[*corev1.Node] { return m.nodes }, s.trimmer.node, sameNode),
		},
		{
			kind: serviceCIDRs, src: s, item: &networkingv1.ServiceCIDR{}, empty: func() runtime.Object { return &networkingv1.ServiceCIDRList{} },
			store: newStore(serviceCIDRs, s.box,
				func(m *mailbox) gathered[*networkingv1.ServiceCIDR] { return m.serviceCIDRs }, s.trimmer.serviceCIDR, nil),
		},
	}
}

func newStore[T metav1.Object](k kind, box *mailbox, pending func(*mailbox) gathered[T], trim func(T), same func(a, b T) bool) *store[T] {
	return &store[T]{kind: k, box: box, pending: pending, trim: trim, same: same, known: map[types.NamespacedName]seen[T]{}}
}

// sameNode says whether two trimmed Nodes are equal but for their versions. A
// kubelet writes its Node's status every few minutes.
func sameNode(a, b *corev1.Node) bool {
	c := *b
	c.ResourceVersion = a.ResourceVersion
	return equality.Semantic.DeepEqual(a, &c)
}

// follow keeps the store up to date until ctx is done.
func (l *list) follow(ctx context.Context) {
	if l.kind != serviceCIDRs {
		l.reflect(ctx)
		return
	}
	// Clusters older than 1.33 have no ServiceCIDRs, and a role made for
	// kube-proxy may not allow to read them.
	told, read := false, false
	for delay := refusedRetryMin; ; delay = min(2*delay, refusedRetryMax) {
		attemptCtx, cancel := context.WithCancel(ctx)
		attempt := *l
		attempt.refused = func(err error) {
			switch {
			case told:
			case read:
				l.src.log.WarnContext(ctx, "ServiceCIDRs can no longer be read, so what they were stays; "+
					"allow list and watch of servicecidrs.networking.k8s.io", "error", err)
			default:
				l.src.log.InfoContext(ctx, "ServiceCIDRs can't be read, so connections to addresses of no Service are not dropped; "+
					"a cluster since 1.33 serves them to who may list and watch servicecidrs of networking.k8s.io", "error", err)
			}
			told = true
			l.src.box.complete(l.kind)
			cancel()
		}
		attempt.watched = func() {
			if told {
				l.src.log.InfoContext(ctx, "ServiceCIDRs can be read now")
			}
			told, read, delay = false, true, refusedRetryMin
		}
		attempt.reflect(attemptCtx)
		cancel()
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
	}
}

// reflect lists and watches until ctx is done.
func (l *list) reflect(ctx context.Context) {
	logger := logr.FromContextOrDiscard(ctx)
	backoff := pauses()
	reflector := cache.NewReflectorWithOptions(&cache.ListWatch{
		ListWithContextFunc:  l.list,
		WatchFuncWithContext: l.watch,
	}, l.item, l.store, cache.ReflectorOptions{
		Name: string(l.kind), Logger: &logger, Backoff: &backoff,
		Clock: clockUntil{after: func(d time.Duration) <-chan time.Time { return after(ctx, d) }},
	})
	// As the reflector's own loop, which however hands errors to a function that
	// is shared by the whole process and makes everybody wait.
	_ = backoff.DelayWithReset(clock.RealClock{}, 2*time.Minute).Until(ctx, true, true, func(ctx context.Context) (bool, error) {
		if err := reflector.ListAndWatchWithContext(ctx); err != nil {
			l.src.log.DebugContext(ctx, "list or watch ended", "resource", string(l.kind), "error", err)
		}
		return false, nil
	})
}

// pauses are those between attempts: from 0.8 to 10 seconds, up to twice that by
// chance, and short again after two minutes without one. They are client-go's but
// for the longest, which is 60 seconds there: so late would a node learn of
// endpoints that are gone. When the API server of 5,000 nodes
// returns, their four kinds make some 1,300 requests a second for 20 seconds, in
// no common step. They are streams from the server's cache, which it admits as it
// is able to (API Priority and Fairness), and while nobody listens attempts cost it
// nothing.
func pauses() wait.Backoff {
	return wait.Backoff{Duration: 800 * time.Millisecond, Cap: 10 * time.Second, Steps: 10, Factor: 2, Jitter: 1}
}

// clockUntil is the real clock, but nothing waits on it for longer than there is
// use: a reflector that streams a list does not look at its context while it
// pauses after "connection refused" or 429 Too Many Requests.
type clockUntil struct {
	clock.RealClock
	after func(time.Duration) <-chan time.Time
}

// After returns a channel that has the time after d, or when it is of no use to
// wait longer.
func (c clockUntil) After(d time.Duration) <-chan time.Time { return c.after(d) }

// after returns a channel that has the time after d, or when ctx is done.
func after(ctx context.Context, d time.Duration) <-chan time.Time {
	over := make(chan time.Time, 1) // nobody may be there to take it
	ctx, cancel := context.WithTimeout(ctx, d)
	context.AfterFunc(ctx, func() {
		cancel()
		over <- time.Now()
	})
	return over
}

func (l *list) request(opts *metav1.ListOptions) *rest.Request {
	l.kind.narrow(opts, l.src.nodeName)
	return l.src.clients[l.kind.group()].Get().Resource(string(l.kind)).VersionedParams(opts, metav1.ParameterCodec)
}

func (l *list) list(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
	if !l.src.lists.begin() {
		return nil, context.Canceled
	}
	defer l.src.lists.Done()
	l.src.box.list(l.kind)
	objects := l.empty()
	err := l.request(&opts).Do(ctx).Into(objects)
	l.heard(ctx, verbList, err)
	if err != nil {
		return nil, err
	}
	// A page at a time, before the next one comes.
	l.src.trimmer.list(objects)
	return objects, nil
}

func (l *list) watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	if opts.SendInitialEvents != nil {
		l.src.box.list(l.kind)
	}
	stream, err := l.request(&opts).Watch(ctx)
	if err == nil || opts.SendInitialEvents == nil || !refusal(err) {
		// Whoever can't stream a list may still be able to list.
		l.heard(ctx, verbWatch, err)
	}
	return stream, err
}

// heard passes on what the server answered.
func (l *list) heard(ctx context.Context, verb string, err error) {
	switch {
	case ctx.Err() != nil:
	case l.refused != nil && refusal(err):
		l.src.contact.without(ctx, l.kind)
		l.refused(err)
	default:
		l.src.contact.heard(ctx, l.kind, verb, err)
		if l.watched != nil && verb == verbWatch && err == nil {
			l.watched()
		}
	}
}
