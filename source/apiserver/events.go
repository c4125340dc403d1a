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

// Event reasons.
const (
	// ReasonNotAsWritten is for a Service with a field that cannot be programmed as
	// written, see [kube.Problem].
	ReasonNotAsWritten = "ServiceNotProgrammedAsWritten"
	// ReasonNotProgrammed is for a Service that the node's kernel rejects.
	ReasonNotProgrammed = "FailedToProgramService"
	// ReasonHealthCheck is for a health-check node port on which the program cannot listen.
	// kube-proxy uses the same reason.
	ReasonHealthCheck = "FailedToStartServiceHealthcheck"
	// ReasonStarting is for the Node when the program starts. kube-proxy uses the same
	// reason.
	ReasonStarting = "Starting"
	// ReasonHealthz is for a Node whose health server cannot listen, and ReasonMetrics for a
	// Node whose metrics server cannot. kube-proxy uses the same reasons.
	ReasonHealthz = "FailedToStartProxierHealthcheck"
	ReasonMetrics = "FailedToStartMetricServer"
	// ReasonOtherProxy is for a Node that has rules of another Service proxy.
	ReasonOtherProxy = "OtherServiceProxy"
	// ReasonModeReplaced is for a Node whose configuration asks for a mode of kube-proxy that
	// Fairlead replaces by another one.
	ReasonModeReplaced = "ProxyModeReplaced"
	// ReasonMassRemoval is for a Node that holds removals because a list from the API
	// server lacks most objects, see [Options.MassRemovalDelay].
	ReasonMassRemoval = "MassRemovalHeld"
	// ReasonTableRebuilt is for a Node on which an nftables table could not be repaired in
	// place.
	ReasonTableRebuilt = "TableRebuilt"
	// ReasonFlowOffload is for a Node on which connections are not offloaded to a flowtable,
	// although this is configured.
	ReasonFlowOffload = "FlowOffloadFailed"
)

const (
	reportingController = "fairlead"
	actionStart         = "StartFairlead"
	// eventsPerSecond and eventsBurst limit the Events of one node.
	eventsPerSecond = 5
	eventsBurst     = 10
	// maxQueuedReports is the number of Events that can wait to be sent. Further reports
	// are dropped; they are in the log.
	maxQueuedReports = 1000
	// maxRecentReports is the number of reports that are recognized when repeated.
	maxRecentReports = 8192
	// persistenceWindow is how long a repeated report counts as the same persisting
	// problem. After that it counts as a recurrence and updates the Event's series.
	persistenceWindow = 10 * time.Minute
	// flushTimeout limits the time to send queued Events when the program ends.
	flushTimeout = 2 * time.Second
	// eventRetryMin and eventRetryMax bound the delay between attempts while the API server
	// is unavailable.
	eventRetryMin = time.Second
	eventRetryMax = 30 * time.Second
	// eventRequestTimeout is the timeout of one request.
	eventRequestTimeout = 30 * time.Second
	// maxNoteBytes and maxInstanceBytes are limits of the Event API.
	maxNoteBytes     = 1024
	maxInstanceBytes = 128
)

// EventOptions configures [Events].
type EventOptions struct {
	// Config is the connection to the API server, see [Config]. Events have rate limits of
	// their own and do not delay a [Source].
	Config *rest.Config
	// NodeName is the name of this node.
	NodeName string
	// Version is the program's version for the user agent. It may be empty.
	Version string
	// Logger receives warnings. Nil discards them.
	Logger *slog.Logger
}

// Events writes Kubernetes Events (events.k8s.io/v1) about Services and this node. Its
// methods are safe for concurrent use, and only Run blocks.
//
// A problem that persists is written once, even if it is reported repeatedly. If several
// nodes report the same problem of a Service, the first one writes the Event. Events are
// limited to five a second; up to a thousand are queued. Further reports are dropped, and
// their number is logged.
type Events struct {
	client   *rest.RESTClient
	log      *slog.Logger
	nodeName string
	limiter  flowcontrol.RateLimiter
	wake     chan struct{}

	mu      sync.Mutex
	started bool
	// node refers to this Node; its UID is known once started. beforeStart has the reports
	// about the Node from before.
	node        corev1.ObjectReference
	beforeStart []report
	serviceUIDs map[types.NamespacedName]types.UID
	queue       []report
	// recent has the last time of each report, by its hash, and recentOrder the hashes in
	// order of their first report.
	recent       map[uint64]reportHistory
	recentOrder  []uint64
	dropped      int
	deniedLogged bool
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
	// shared means that other nodes report the same problem.
	shared bool
	// count is the number of occurrences so far.
	count int32
}

// reportHistory has the last time and the number of occurrences of a report.
type reportHistory struct {
	last  time.Time
	count int32
}

// NewEvents returns an Events. It starts nothing and sends no requests. It returns an error
// if the client configuration is invalid.
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
		client:   clients[group].RESTClient,
		log:      log,
		nodeName: opts.NodeName,
		// Until the Node object is known, its name is used as the UID, as a kubelet does.
		node:        corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: opts.NodeName, UID: types.UID(opts.NodeName)},
		limiter:     flowcontrol.NewTokenBucketRateLimiter(eventsPerSecond, eventsBurst),
		wake:        make(chan struct{}, 1),
		serviceUIDs: map[types.NamespacedName]types.UID{},
		recent:      map[uint64]reportHistory{},
	}, nil
}

// Apply stores the UIDs of delivered objects. It must be called with each Delta before
// problems of its objects are reported. The first call reports the Event Starting about the
// Node.
func (e *Events) Apply(d kube.Delta) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, name := range d.DeletedServices {
		delete(e.serviceUIDs, name)
	}
	if len(e.serviceUIDs) == 0 { // the first list
		e.serviceUIDs = make(map[types.NamespacedName]types.UID, len(d.Services)+len(d.ConvertedServices))
	}
	for _, svc := range d.Services {
		e.serviceUIDs[types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}] = svc.UID
	}
	for _, svc := range d.ConvertedServices {
		e.serviceUIDs[svc.Name()] = svc.UID()
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
		reason: ReasonStarting, action: actionStart, note: "fairlead programs the Services of this node",
	})
	for _, r := range e.beforeStart {
		e.warnLocked(e.node, r)
	}
	e.beforeStart = nil
}

// OtherProxy reports that this node has rules of another Service proxy, with their effect.
func (e *Events) OtherProxy(rules, effect string) {
	e.warnNode(report{
		reason: ReasonOtherProxy, action: "LookForOtherProxies",
		note: fmt.Sprintf("this node has rules of %s. Fairlead's rules come first, but %s. Remove the rules with fairlead cleanup --kube-proxy, or with kube-proxy --cleanup",
			rules, effect),
	})
}

// ModeReplaced reports that the configuration of this node asks for a mode of kube-proxy that
// Fairlead replaces by another one.
func (e *Events) ModeReplaced(notice string) {
	e.warnNode(report{reason: ReasonModeReplaced, action: actionStart, note: notice})
}

// HealthzServerFailed reports that the health server cannot listen. It may be called for each
// attempt.
func (e *Events) HealthzServerFailed(err error) { e.serverFailed(ReasonHealthz, err) }

// MetricsServerFailed reports that the metrics server cannot listen. It may be called for each
// attempt.
func (e *Events) MetricsServerFailed(err error) { e.serverFailed(ReasonMetrics, err) }

// serverFailed does not wait for the Node's UID, because the error may end the program.
func (e *Events) serverFailed(reason string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.warnLocked(e.node, report{reason: reason, action: actionStart, note: err.Error()})
}

// warnNode reports a problem of this node, once its UID is known.
func (e *Events) warnNode(r report) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.started {
		e.beforeStart = append(e.beforeStart, r)
		return
	}
	e.warnLocked(e.node, r)
}

// MassRemoval reports that a list from the API server lacks most of the programmed objects,
// and that this node waits for another list before it removes them.
func (e *Events) MassRemoval(resource string, removed, before int, delay time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	// The first Delta waits for a held list, so this report can't wait for the Node's UID.
	e.warnLocked(e.node, report{
		reason: ReasonMassRemoval, action: "ListObjects",
		note: fmt.Sprintf("list of %s from the API server lacks %d of %d programmed objects. They stay in place until another list after %s confirms the removal. "+
			"Check that this is the right cluster and that etcd has its data; --mass-removal-delay sets the delay",
			resource, removed, before, delay),
	})
}

// TableRebuilt reports that an nftables table could not be repaired in place.
func (e *Events) TableRebuilt(table, reason string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.warnLocked(e.node, report{
		reason: ReasonTableRebuilt, action: "RepairTable",
		note: fmt.Sprintf("nftables table %s was rebuilt because %s. Established connections continue; session affinity is lost", table, reason),
	})
}

// FlowOffloadFailed reports that connections are not offloaded to a flowtable. Services are not
// affected.
func (e *Events) FlowOffloadFailed(err error) {
	e.warnNode(report{
		reason: ReasonFlowOffload, action: "ProgramFlowtable",
		note: fmt.Sprintf("connections are not offloaded to a flowtable; Services are not affected: %v", err),
	})
}

// Problem reports a field of a Service that cannot be programmed.
func (e *Events) Problem(p kube.Problem) {
	note := p.Field + ": " + p.Message
	if p.EndpointSlice != "" {
		note = "EndpointSlice " + p.EndpointSlice + ": " + note
	}
	e.warnService(p.Service, p.UID, report{reason: ReasonNotAsWritten, action: "ReadService", note: note, shared: true})
}

// NotProgrammed reports that a Service could not be programmed. It may be called for each
// attempt.
func (e *Events) NotProgrammed(key dataplane.Key, err error) {
	e.warnService(types.NamespacedName{Namespace: key.Namespace, Name: key.Name}, "", report{
		reason: ReasonNotProgrammed, action: "ProgramService", note: fmt.Sprintf("node %s: %s: %v", e.nodeName, key, err),
	})
}

// HealthCheckFailed reports that the program cannot listen on the health-check node port of
// a Service. It may be called for each attempt.
func (e *Events) HealthCheckFailed(namespace, name string, port uint16, err error) {
	service := types.NamespacedName{Namespace: namespace, Name: name}
	e.warnService(service, "", report{
		reason: ReasonHealthCheck, action: "StartServiceHealthcheck",
		note: fmt.Sprintf("node %s failed to start healthcheck %q on port %d: %v", e.nodeName, service, port, err),
	})
}

// warnService queues a report about a Service unless it is a repetition. If uid is empty,
// it uses the UID from the last Delta.
func (e *Events) warnService(service types.NamespacedName, uid types.UID, r report) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if uid == "" {
		uid = e.serviceUIDs[service]
	}
	if uid == "" {
		return // The Service is deleted; kubectl describe can't show its Events.
	}
	e.warnLocked(corev1.ObjectReference{
		APIVersion: "v1", Kind: "Service", Namespace: service.Namespace, Name: service.Name, UID: uid,
	}, r)
}

// warnLocked queues a report about any object unless it is a repetition. The caller holds
// mu.
func (e *Events) warnLocked(object corev1.ObjectReference, r report) {
	now := time.Now()
	r.regarding = object
	r.at, r.eventType = now, corev1.EventTypeWarning
	r.note = truncate(r.note, maxNoteBytes)
	number := fnv.New64a()
	_, _ = fmt.Fprintf(number, "%s %s %s", object.UID, r.reason, r.note) // writing to a hash can't fail
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

// truncate cuts text to at most size bytes, between two characters.
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

// enqueueLocked adds a report to the queue. It reports false if the queue is full. The
// caller holds mu.
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

// dequeue removes and returns the oldest report. If the queue is empty, it reports false
// and returns the number of reports dropped since the queue was last empty.
func (e *Events) dequeue() (r report, ok bool, dropped int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.queue) == 0 {
		e.queue = nil // frees the backing array
		dropped, e.dropped = e.dropped, 0
		return report{}, false, dropped
	}
	r = e.queue[0]
	e.queue = e.queue[1:]
	return r, true, 0
}

// Run writes reported Events. It blocks until ctx is done, then takes at most two seconds
// to send queued Events, and returns nil. Run must be called only once.
func (e *Events) Run(ctx context.Context) error {
	for e.waitForReports(ctx) {
		e.sendQueued(ctx)
	}
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	e.sendQueued(flush)
	return nil
}

// waitForReports waits until a report is queued. It reports false when ctx is done.
func (e *Events) waitForReports(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-e.wake:
		return ctx.Err() == nil
	}
}

// sendQueued writes the queued reports until the queue is empty or ctx is done.
func (e *Events) sendQueued(ctx context.Context) {
	for ctx.Err() == nil {
		r, ok, dropped := e.dequeue()
		if dropped > 0 {
			e.log.WarnContext(ctx, "too many Events, some were dropped and are only in the log", "dropped", dropped)
		}
		if !ok {
			return
		}
		if !e.writeWithRetry(ctx, r) {
			// ctx is done. The flush starts with this report.
			e.mu.Lock()
			e.queue = append([]report{r}, e.queue...)
			e.mu.Unlock()
		}
	}
}

// writeWithRetry writes an Event or drops it if the server denies it. It reports false if
// ctx is done before that.
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

// writeOnce creates the Event, or updates its series if the Event exists.
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
		return nil // another node has written it
	}
	r.count = max(r.count, 2) // written before the program restarted
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
		return fmt.Errorf("encode patch for Event %s: %w", r.name, err)
	}
	return e.client.Patch(types.MergePatchType).Namespace(eventNamespace(r)).Resource("events").Name(r.name).Body(patch).Do(ctx).Error()
}

// eventNamespace returns the namespace of an Event: the object's namespace, or default for
// cluster-scoped objects as the Event API requires.
func eventNamespace(r report) string {
	if r.regarding.Namespace == "" {
		return metav1.NamespaceDefault
	}
	return r.regarding.Namespace
}

// logDenied logs once that the server denies Events. It ignores errors about namespaces
// that are deleted or terminating.
func (e *Events) logDenied(ctx context.Context, r report, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	namespaceGone := apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause)
	if namespaceGone || e.deniedLogged {
		return
	}
	e.deniedLogged = true
	e.log.WarnContext(ctx, "API server denies an Event: allow create and patch of events.events.k8s.io; further denials are not logged",
		"reason", r.reason, "namespace", eventNamespace(r), "error", err)
}
