package apiserver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/apiserver"
)

// startEvents runs Events until the returned function is called, or the test ends.
func startEvents(t testing.TB, opts apiserver.EventOptions) (events *apiserver.Events, stop func()) {
	t.Helper()
	events = must[*apiserver.Events](t)(apiserver.NewEvents(opts))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- events.Run(ctx) }()
	stop = func() {
		if ctx.Err() != nil {
			return
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run returned %v", err)
		}
	}
	t.Cleanup(stop)
	return events, stop
}

// waitForEvents waits for n Events about the object, found like kubectl describe finds
// them.
func waitForEvents(t testing.TB, client kubernetes.Interface, ns string, object metav1.Object, n int) []corev1.Event {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		list := must[*corev1.EventList](t)(client.CoreV1().Events(ns).List(t.Context(), metav1.ListOptions{
			// The API server may report a repaired cluster IP.
			FieldSelector: fmt.Sprintf("involvedObject.uid=%s,involvedObject.name=%s,reportingComponent!=ipallocator-repair-controller", object.GetUID(), object.GetName()),
		}))
		if len(list.Items) >= n || time.Now().After(deadline) {
			if len(list.Items) != n {
				t.Errorf("%d Events about %s, want %d: %v", len(list.Items), object.GetName(), n, list.Items)
			}
			return list.Items
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestEvents checks the Events that kubectl describe service shows.
func TestEvents(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	node := must[*corev1.Node](t)(client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}))
	svc := must[*corev1.Service](t)(client.CoreV1().Services(ns).Create(t.Context(), newService("web"), metav1.CreateOptions{}))
	opts := apiserver.EventOptions{Config: cluster.Config(), NodeName: ns}
	events, stop := startEvents(t, opts)
	delta := kube.Delta{Services: []*corev1.Service{svc}, Node: node}
	events.Apply(delta)
	events.Apply(kube.Delta{})

	name := serviceNameIn(ns, "web")
	key := dataplane.Key{Namespace: ns, Name: "web", Port: "http", Family: dataplane.IPv4}
	problem := kube.Problem{Service: name, Field: "spec.clusterIP", Message: "is taken: " + strings.Repeat("long ", 300)}
	report := func(events *apiserver.Events) {
		events.Problem(problem)
		events.Problem(kube.Problem{Service: name, EndpointSlice: "web-1", Field: "ports[0].name", Message: "missing"})
		events.Problem(kube.Problem{Service: serviceNameIn(ns, "unknown"), Field: "x", Message: "y"})
		for range 3 {
			events.NotProgrammed(key, errors.New("no space left on device"))
			events.HealthCheckFailed(ns, "web", 30000, errors.New("address already in use"))
		}
	}
	report(events)
	found := map[string]corev1.Event{}
	for _, event := range waitForEvents(t, client, ns, svc, 4) {
		found[event.Reason+" "+event.Message] = event
		if event.Type != corev1.EventTypeWarning || event.ReportingController != "fairlead" || event.ReportingInstance != "fairlead-"+ns ||
			event.Action == "" || event.InvolvedObject.Kind != "Service" || event.EventTime.IsZero() {
			t.Errorf("Event %+v", event)
		}
		if len(event.Message) > 1024 {
			t.Errorf("message of %d bytes", len(event.Message))
		}
	}
	for _, want := range []string{
		"ServiceNotProgrammedAsWritten EndpointSlice web-1: ports[0].name: missing",
		"FailedToProgramService node " + ns + ": " + key.String() + ": no space left on device",
		"FailedToStartServiceHealthcheck node " + ns + ` failed to start healthcheck "` + name.String() + `" on port 30000: address already in use`,
	} {
		if _, ok := found[want]; !ok {
			t.Errorf("no Event %q in %v", want, found)
		}
	}
	starting := waitForEvents(t, client, "default", node, 1)
	if len(starting) == 1 && (starting[0].Reason != "Starting" || starting[0].Type != corev1.EventTypeNormal) {
		t.Errorf("Event of the Node %+v", starting[0])
	}
	stop()

	// Another node reports the same problem, and this node reports it again after a restart.
	opts.NodeName = "other"
	other, stop := startEvents(t, opts)
	other.Apply(delta)
	other.Problem(problem)
	stop()
	opts.NodeName = ns
	again, stop := startEvents(t, opts)
	again.Apply(delta)
	report(again)
	stop()
	for _, event := range waitForEvents(t, client, ns, svc, 4) {
		shared := event.Reason == apiserver.ReasonNotAsWritten
		if (event.Series == nil) != shared {
			t.Errorf("%s: series %v", event.Reason, event.Series)
		}
	}

	// A deleted Event is written again when its problem recurs.
	if err := client.EventsV1().Events(ns).DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	last, stop := startEvents(t, opts)
	last.Apply(delta)
	report(last)
	stop()
	waitForEvents(t, client, ns, svc, 4)
}

// roundTripper implements an API server with a function.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func newResponse(r *http.Request, code int, body string) *http.Response {
	return &http.Response{
		StatusCode: code, Request: r, Body: io.NopCloser(strings.NewReader(body)),
		Header: http.Header{"Content-Type": {"application/json"}}, ProtoMajor: 1, ProtoMinor: 1,
	}
}

func manyServices(n int) kube.Delta {
	var d kube.Delta
	for i := range n {
		svc := newService(fmt.Sprintf("web-%d", i))
		svc.Namespace, svc.UID = "shop", types.UID(fmt.Sprint(i))
		d.Services = append(d.Services, svc)
	}
	return d
}

// TestEventRateLimit checks that many failing Services cause a limited number of Events.
func TestEventRateLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var sent atomic.Int64
		var logs bytes.Buffer
		config := &rest.Config{Host: "http://api", Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			sent.Add(1)
			return newResponse(r, http.StatusCreated, `{"apiVersion":"events.k8s.io/v1","kind":"Event"}`), nil
		})}
		events, stop := startEvents(t, apiserver.EventOptions{Config: config, NodeName: "n", Logger: slog.New(slog.NewTextHandler(&logs, nil))})
		const n = 10_000
		events.Apply(manyServices(n))
		begin := time.Now()
		reportAll := func() {
			for i := range n {
				events.NotProgrammed(dataplane.Key{Namespace: "shop", Name: fmt.Sprintf("web-%d", i), Family: dataplane.IPv4}, errors.New("no space"))
			}
		}
		reportAll()
		if d := time.Since(begin); d != 0 {
			t.Errorf("NotProgrammed blocked for %s", d)
		}
		synctest.Wait()
		if got := sent.Load(); got > 11 {
			t.Errorf("%d Events at once, want at most the burst of 10", got)
		}
		time.Sleep(time.Minute)
		if got := sent.Load(); got < 300 || got > 311 {
			t.Errorf("%d Events in a minute, want 5 per second", got)
		}
		time.Sleep(10 * time.Minute)
		got := sent.Load()
		if got < 1000 || got > 1020 {
			t.Errorf("%d Events in total, want the size of the queue", got)
		}
		stop()
		if !strings.Contains(logs.String(), "dropped=") {
			t.Errorf("log does not report the dropped Events: %s", &logs)
		}
	})
}

// TestServerEvents checks that the Events about servers that cannot listen are sent although the
// program ends at once.
func TestServerEvents(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var bodies string
		config := &rest.Config{Host: "http://api", Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			body, err := io.ReadAll(r.Body)
			mu.Lock()
			defer mu.Unlock()
			bodies += string(body)
			return newResponse(r, http.StatusCreated, `{"apiVersion":"events.k8s.io/v1","kind":"Event"}`), err
		})}
		events, stop := startEvents(t, apiserver.EventOptions{Config: config, NodeName: "n"})
		for range 3 {
			events.HealthzServerFailed(errors.New("healthz: address already in use"))
			events.MetricsServerFailed(errors.New("metrics: address already in use"))
		}
		stop()
		for _, want := range []string{"FailedToStartProxierHealthcheck", "FailedToStartMetricServer", "healthz: address", "metrics: address"} {
			if n := strings.Count(bodies, want); n != 1 {
				t.Errorf("%q is in %d Events, want 1:\n%s", want, n, bodies)
			}
		}
	})
}

// TestEventSeries checks that a problem reported for hours is one Event, and that a
// recurrence updates the Event's series.
func TestEventSeries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var requests []string
		config := &rest.Config{Host: "http://api", Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			body := must[[]byte](t)(io.ReadAll(r.Body))
			if r.Method == http.MethodPatch {
				requests = append(requests, "PATCH "+string(body[:strings.Index(string(body), ",")]))
			} else {
				requests = append(requests, r.Method)
			}
			return newResponse(r, http.StatusOK, `{"apiVersion":"events.k8s.io/v1","kind":"Event"}`), nil
		})}
		events, _ := startEvents(t, apiserver.EventOptions{Config: config, NodeName: "n"})
		events.Apply(manyServices(1))
		report := func() {
			events.NotProgrammed(dataplane.Key{Namespace: "shop", Name: "web-0", Family: dataplane.IPv4}, errors.New("no space"))
		}
		for range 300 {
			report()
			time.Sleep(30 * time.Second)
		}
		time.Sleep(20 * time.Minute)
		report()
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := fmt.Sprint(requests); got != `[POST POST PATCH {"series":{"count":2]` {
			t.Errorf("requests %s, want Starting, the Event, and its series", got)
		}
	})
}

// TestEventsDuringOutage checks that Events wait for the API server, but delay the end of
// the program only briefly.
func TestEventsDuringOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		down.Store(true)
		var sent atomic.Int64
		config := &rest.Config{Host: "http://api", Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			if down.Load() {
				return nil, errors.New("no route to host")
			}
			sent.Add(1)
			return newResponse(r, http.StatusCreated, `{"apiVersion":"events.k8s.io/v1","kind":"Event"}`), nil
		})}
		events, stop := startEvents(t, apiserver.EventOptions{Config: config, NodeName: "n"})
		events.Apply(manyServices(3))
		problem := func(i int) {
			events.Problem(kube.Problem{Service: serviceNameIn("shop", fmt.Sprintf("web-%d", i)), Field: "f"})
		}
		problem(0)
		time.Sleep(5 * time.Minute)
		down.Store(false)
		time.Sleep(time.Minute)
		if got := sent.Load(); got != 2 {
			t.Errorf("%d Events after the API server is back, want 2", got)
		}
		down.Store(true)
		problem(1)
		begin := time.Now()
		stop()
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("Run returned %s after cancel", d)
		}
	})
}

// TestEventsFlush checks that queued Events are written when the program ends.
func TestEventsFlush(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var sent atomic.Int64
		config := &rest.Config{Host: "http://api", Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			time.Sleep(100 * time.Millisecond)
			sent.Add(1)
			return newResponse(r, http.StatusCreated, `{"apiVersion":"events.k8s.io/v1","kind":"Event"}`), nil
		})}
		events, stop := startEvents(t, apiserver.EventOptions{Config: config, NodeName: "n"})
		events.Apply(manyServices(3))
		for i := range 3 {
			events.Problem(kube.Problem{Service: serviceNameIn("shop", fmt.Sprintf("web-%d", i)), Field: "f"})
		}
		stop()
		if got := sent.Load(); got != 4 {
			t.Errorf("%d Events, want 4", got)
		}
	})
}

// TestEventsDenied checks that missing rights are logged once.
func TestEventsDenied(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	svc := must[*corev1.Service](t)(client.CoreV1().Services(ns).Create(t.Context(), newService("web"), metav1.CreateOptions{}))
	config := cluster.Config()
	config.Impersonate.UserName = "nobody"
	var logs bytes.Buffer
	events, stop := startEvents(t, apiserver.EventOptions{Config: config, NodeName: "n", Logger: slog.New(slog.NewTextHandler(&logs, nil))})
	events.Apply(kube.Delta{Services: []*corev1.Service{svc}})
	events.Problem(kube.Problem{Service: serviceNameIn(ns, "web"), Field: "f"})
	stop()
	if n := strings.Count(logs.String(), "allow create and patch"); n != 1 {
		t.Errorf("missing rights are logged %d times, want once: %s", n, &logs)
	}
}
