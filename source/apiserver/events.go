package apiserver

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"log/slog"
	"sync"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/kube"
)

// The reasons of Events.
const (
	// ReasonNotAsWritten is of a Service that does not get all that its objects
	// ask for, see [kube.Problem].
	ReasonNotAsWritten = "ServiceNotProgrammedAsWritten"
	// ReasonNotProgrammed is of a Service that the node's kernel does not take.
	ReasonNotProgrammed = "FailedToProgramService"
	// ReasonHealthCheck is of a health-check node port that cannot be listened
	// on. kube-proxy uses the same word.
	ReasonHealthCheck = "FailedToStartServiceHealthcheck"
	// ReasonStarting is of the Node when the program starts, as of kube-proxy.
	ReasonStarting = "Starting"
	// ReasonOtherProxy is of a Node on which another Service proxy's rules are.
	ReasonOtherProxy = "OtherServiceProxy"
	// ReasonMassRemoval is of a Node that holds removals back because a list of the
	// API server lacks most objects, see [Options.MassRemovalDelay].
	ReasonMassRemoval = "MassRemovalHeld"
	// ReasonTableRebuilt is of a Node on which an nftables table could not be
	// repaired in place.
	ReasonTableRebuilt = "TableRebuilt"
)

const (
	reportingController = "fairlead"
	// eventsPerSecond and eventsBurst bound what one node sends.
	eventsPerSecond = 5
	eventsBurst     = 10
	// maxQueuedReports is the number of Events that wait to be sent. What is reported
	// beyond is dropped: it is in the log.
	maxQueuedReports = 1000
	// maxRecentReports is the number of reports that are recognized when they come
	// again.
	maxRecentReports = 8192
	// persistenceWindow is the time within which a report that comes again says that
	// something persists; later it says that it has come back.
	persistenceWindow = 10 * time.Minute
	// flushTimeout is the time that is left for Events when the program ends.
	flushTimeout = 2 * time.Second
	// eventRetryMin and eventRetryMax bound the pause while the API server is away.
	eventRetryMin = time.Second
	eventRetryMax = 30 * time.Second
	// eventRequestTimeout is how long one attempt waits.
	eventRequestTimeout = 30 * time.Second
	// maxNoteBytes and maxInstanceBytes are the limits of the API, in bytes.
	maxNoteBytes     = 1024
	maxInstanceBytes = 128
)

// EventOptions say where Events are written, and in whose name.
type EventOptions struct {
	// Config says how to reach the API server, see [Config]. Events have limits
	// of their own, so that they cannot hold up a [Source].
	Config *rest.Config
	// NodeName is the name of this node.
	NodeName string
	// Version is the program's, for the user agent. It may be empty.
	Version string
	// Logger takes what is unusual. Nil discards it.
	Logger *slog.Logger
}

// Events writes Kubernetes Events about Services and about this node, as
// events.k8s.io/v1. Its methods may be called by several goroutines at once; none
// of them blocks but Run.
//
// What is reported again while it persists is not written again. A problem that
// all nodes have alike is one Event, whoever comes first. At most five Events a
// second are sent, and a thousand wait; what is reported beyond that is dropped,
// and the number logged.
type Events struct {
	client   *rest.RESTClient
	log      *slog.Logger
	nodeName string
	limiter  flowcontrol.RateLimiter
	wake     chan struct{}

	mu      sync.Mutex
	started bool
	// node is this Node, with its UID once started, and early what was reported of it
	// before.
	node        corev1.ObjectReference
	beforeStart []report
	serviceUIDs map[types.NamespacedName]types.UID
	queue       []report
	// recent has when each report was last made, by its number, and order
	// the numbers from the oldest.
	recent       map[uint64]reportHistory
	recentOrder  []uint64
	dropped      int
	deniedLogged bool // logged
}

// report is an Event to write.
type report struct {
	regarding corev1.ObjectReference
	at        time.Time
	name      string
	eventType string
	reason    string
	action    string
	note      string
	// shared says that other nodes report the same.
	shared bool
	// count is how many times it came up, so far.
	count int32
}

// reportHistory is what is known of a report that was made.
type reportHistory struct {
	last  time.Time
	count int32
}

// NewEvents returns an Events. It starts nothing and does not speak to the server.
// The error says what in the configuration cannot be used.
func NewEvents(opts EventOptions) (*Events, error) {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	config := rest.CopyConfig(opts.Config)
	config.QPS, config.RateLimiter = -1, nil
	if config.Timeout == 0 {
		config.Timeout = eventRequestTimeout
	}
	group := eventsv1.SchemeGroupVersion
	clients, err := newClients(config, opts.Version, group)
	if err != nil {
		return nil, err
	}
	return &Events{
		client:   clients[group],
		log:      log,
		nodeName: opts.NodeName,
		// Without a Node object the name stands for the UID, as with a kubelet.
		node:        corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: opts.NodeName, UID: types.UID(opts.NodeName)},
		limiter:     flowcontrol.NewTokenBucketRateLimiter(eventsPerSecond, eventsBurst),
		wake:        make(chan struct{}, 1),
		serviceUIDs: map[types.NamespacedName]types.UID{},
		recent:      map[uint64]reportHistory{},
	}, nil
}

// Apply takes the UIDs of objects from what a source delivers. It must see each
// Delta before problems of its objects are reported. With the first one the Event
// Starting is written about the Node.
func (e *Events) Apply(d kube.Delta) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, name := range d.DeletedServices {
		delete(e.serviceUIDs, name)
	}
	for _, svc := range d.Services {
		e.serviceUIDs[types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}] = svc.UID
	}
	if e.started {
		return
	}
	e.started = true
	if d.Node != nil {
		e.node.UID = d.Node.UID
	}
	now := time.Now()
	e.enqueueLocked(report{
		regarding: e.node, at: now, name: fmt.Sprintf("%s.%x", e.nodeName, now.UnixNano()), eventType: corev1.EventTypeNormal,
		reason: ReasonStarting, action: "StartFairlead", note: "fairlead programs the Services of this node",
	})
	for _, r := range e.beforeStart {
		e.warnLocked(e.node, r)
	}
	e.beforeStart = nil
}

// OtherProxy reports that rules of another Service proxy are on this node, what they
// still do, and the command that removes them.
func (e *Events) OtherProxy(rules, effect, remove string) {
	r := report{
		reason: ReasonOtherProxy, action: "LookForOtherProxies",
		note: fmt.Sprintf("rules of %s are on this node. Fairlead's go first, but %s. Remove them with kube-proxy --cleanup, or with: %s",
			rules, effect, remove),
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.started {
		e.beforeStart = append(e.beforeStart, r)
		return
	}
	e.warnLocked(e.node, r)
}

// MassRemoval reports that a list of the API server lacks most of the objects that are
// programmed, and that this node waits for another list before it removes them.
func (e *Events) MassRemoval(resource string, removed, before int, delay time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	// A first list that is held is not delivered, so this cannot wait for the UID.
	e.warnLocked(e.node, report{
		reason: ReasonMassRemoval, action: "ListObjects",
		note: fmt.Sprintf("list of %s from the API server lacks %d of %d that are programmed. They stay, and are listed once more after %s. "+
			"Check that this is the right cluster and that etcd has its data; --mass-removal-delay sets the time",
			resource, removed, before, delay),
	})
}

// TableRebuilt reports that an nftables table could not be repaired in place.
func (e *Events) TableRebuilt(table, reason string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.warnLocked(e.node, report{
		reason: ReasonTableRebuilt, action: "RepairTable",
		note: fmt.Sprintf("nftables table %s was rebuilt, because %s. Established connections continue, session affinity starts over", table, reason),
	})
}

// Problem reports what a Service asks for and does not get.
func (e *Events) Problem(p kube.Problem) {
	note := p.Field + ": " + p.Message
	if p.EndpointSlice != "" {
		note = "EndpointSlice " + p.EndpointSlice + ": " + note
	}
	e.warnService(p.Service, p.UID, report{reason: ReasonNotAsWritten, action: "ReadService", note: note, shared: true})
}

// NotProgrammed reports that a Service could not be programmed. It may be called
// on every attempt.
func (e *Events) NotProgrammed(key dataplane.Key, err error) {
	e.warnService(types.NamespacedName{Namespace: key.Namespace, Name: key.Name}, "", report{
		reason: ReasonNotProgrammed, action: "ProgramService", note: fmt.Sprintf("node %s: %s: %v", e.nodeName, key, err),
	})
}

// HealthCheckFailed reports that the health-check node port of a Service cannot be
// listened on. It may be called on every attempt.
func (e *Events) HealthCheckFailed(namespace, name string, port uint16, err error) {
	service := types.NamespacedName{Namespace: namespace, Name: name}
	e.warnService(service, "", report{
		reason: ReasonHealthCheck, action: "StartServiceHealthcheck",
		note: fmt.Sprintf("node %s failed to start healthcheck %q on port %d: %v", e.nodeName, service, port, err),
	})
}

// warnService completes and queues a report about a Service, unless it is nothing new.
// Without a UID it takes that of the last Delta.
func (e *Events) warnService(service types.NamespacedName, uid types.UID, r report) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if uid == "" {
		uid = e.serviceUIDs[service]
	}
	if uid == "" {
		return // gone, and so are its Events for who looks for them
	}
	e.warnLocked(corev1.ObjectReference{
		APIVersion: "v1", Kind: "Service", Namespace: service.Namespace, Name: service.Name, UID: uid,
	}, r)
}

// warnLocked is warn for any object. The caller holds mu.
func (e *Events) warnLocked(object corev1.ObjectReference, r report) {
	now := time.Now()
	r.regarding = object
	r.at, r.eventType = now, corev1.EventTypeWarning
	r.note = truncate(r.note, maxNoteBytes)
	number := fnv.New64a()
	_, _ = fmt.Fprintf(number, "%s %s %s", object.UID, r.reason, r.note) // a hash takes everything
	n := number.Sum64()
	r.name = fmt.Sprintf("%s.%016x", object.Name, n)
	before, again := e.recent[n]
	if again && now.Sub(before.last) < persistenceWindow {
		e.recent[n] = reportHistory{now, before.count}
		return
	}
	r.count = before.count + 1
	if !e.enqueueLocked(r) {
		return
	}
	if !again {
		if len(e.recentOrder) >= maxRecentReports {
			delete(e.recent, e.recentOrder[0])
			e.recentOrder = e.recentOrder[1:]
		}
		e.recentOrder = append(e.recentOrder, n)
	}
	e.recent[n] = reportHistory{now, r.count}
}

// truncate cuts the text between two characters.
func truncate(text string, size int) string {
	if len(text) <= size {
		return text
	}
	const more = "…"
	text = text[:size-len(more)]
	for text != "" {
		if r, n := utf8.DecodeLastRuneInString(text); r != utf8.RuneError || n != 1 {
			break
		}
		text = text[:len(text)-1]
	}
	return text + more
}

// enqueueLocked is for those who hold the lock. It reports false if there is no room.
func (e *Events) enqueueLocked(r report) bool {
	if len(e.queue) >= maxQueuedReports {
		e.dropped++
		return false
	}
	e.queue = append(e.queue, r)
	select {
	case e.wake <- struct{}{}:
	default:
	}
	return true
}

// dequeue removes and returns the oldest report, if there is one, and how many were
// dropped since the queue was last empty if it is empty now.
func (e *Events) dequeue() (r report, ok bool, dropped int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.queue) == 0 {
		e.queue = nil // lets go of an array that was long
		dropped, e.dropped = e.dropped, 0
		return report{}, false, dropped
	}
	r = e.queue[0]
	e.queue = e.queue[1:]
	return r, true, 0
}

// Run writes what is reported. It blocks until ctx is done, then takes two seconds
// at most for what is left, and returns nil. Run must be called only once.
func (e *Events) Run(ctx context.Context) error {
	for e.waitForReports(ctx) {
		e.sendQueued(ctx)
	}
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	e.sendQueued(flush)
	return nil
}

// waitForReports waits for reports and reports false when ctx is done.
func (e *Events) waitForReports(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-e.wake:
		return ctx.Err() == nil
	}
}

// sendQueued writes what is queued until there is nothing left or ctx is done.
func (e *Events) sendQueued(ctx context.Context) {
	for ctx.Err() == nil {
		r, ok, dropped := e.dequeue()
		if dropped > 0 {
			e.log.WarnContext(ctx, "too many Events at once, some are in the log only", "dropped", dropped)
		}
		if !ok {
			return
		}
		if !e.writeWithRetry(ctx, r) {
			// The end has come. It is the first to be flushed.
			e.mu.Lock()
			e.queue = append([]report{r}, e.queue...)
			e.mu.Unlock()
		}
	}
}

// writeWithRetry writes an Event, or finds that it is not to be written. It reports false
// if ctx was done before.
func (e *Events) writeWithRetry(ctx context.Context, r report) bool {
	for pause := eventRetryMin; ; pause = min(2*pause, eventRetryMax) {
		if err := e.limiter.Wait(ctx); err != nil {
			return false
		}
		err := e.writeOnce(ctx, r)
		switch {
		case err == nil:
			return true
		case ctx.Err() != nil:
			return false
		case isDenied(err) || apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err):
			e.logDenied(ctx, r, err)
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}

// writeOnce creates the Event, or says of the one that there is that it happened
// again.
func (e *Events) writeOnce(ctx context.Context, r report) error {
	if r.count > 1 {
		err := e.updateSeries(ctx, r)
		if !apierrors.IsNotFound(err) {
			return err
		}
	}
	err := e.createEvent(ctx, r)
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	if r.shared && r.count <= 1 {
		return nil // another node has said so
	}
	r.count = max(r.count, 2) // from before the program was started
	return e.updateSeries(ctx, r)
}

func (e *Events) createEvent(ctx context.Context, r report) error {
	event := &eventsv1.Event{
		ObjectMeta:          metav1.ObjectMeta{Name: r.name, Namespace: eventNamespace(r)},
		EventTime:           metav1.NewMicroTime(r.at),
		ReportingController: reportingController,
		ReportingInstance:   truncate(reportingController+"-"+e.nodeName, maxInstanceBytes),
		Action:              r.action,
		Reason:              r.reason,
		Regarding:           r.regarding,
		Note:                r.note,
		Type:                r.eventType,
	}
	return e.client.Post().Namespace(event.Namespace).Resource("events").Body(event).Do(ctx).Error()
}

func (e *Events) updateSeries(ctx context.Context, r report) error {
	patch, err := json.Marshal(map[string]any{
		"series": eventsv1.EventSeries{Count: r.count, LastObservedTime: metav1.NewMicroTime(r.at)},
	})
	if err != nil {
		return fmt.Errorf("write a patch for Event %s: %w", r.name, err)
	}
	return e.client.Patch(types.MergePatchType).Namespace(eventNamespace(r)).Resource("events").Name(r.name).Body(patch).Do(ctx).Error()
}

// eventNamespace returns the namespace of an Event: that of its object, or, as the API
// has it, default.
func eventNamespace(r report) string {
	if r.regarding.Namespace == "" {
		return metav1.NamespaceDefault
	}
	return r.regarding.Namespace
}

// logDenied logs, once, that Events are not allowed. That a namespace is gone or
// about to go is no news.
func (e *Events) logDenied(ctx context.Context, r report, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	gone := apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause)
	if gone || e.deniedLogged {
		return
	}
	e.deniedLogged = true
	e.log.WarnContext(ctx, "API server refuses an Event, this is not logged again: allow create and patch of events.events.k8s.io",
		"reason", r.reason, "namespace", eventNamespace(r), "error", err)
}
