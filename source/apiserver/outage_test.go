package apiserver_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/source/apiserver"
)

// logRecorder records a log and can be read while it is written.
type logRecorder struct {
	mu   sync.Mutex
	text strings.Builder
}

func (r *logRecorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *logRecorder) count(text string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Count(r.text.String(), text)
}

// waitFor waits until the log has the text n times, and fails if it has it more often.
func (r *logRecorder) waitFor(t testing.TB, text string, n int) {
	t.Helper()
	deadline := time.Now().Add(40 * time.Second)
	for r.count(text) < n && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if got := r.count(text); got != n {
		r.mu.Lock()
		defer r.mu.Unlock()
		t.Fatalf("log has %q %d times, want %d:\n%s", text, got, n, r.text.String())
	}
}

func (r *logRecorder) logger() *slog.Logger { return slog.New(slog.NewTextHandler(r, nil)) }

// faultInjector makes requests fail.
type faultInjector struct {
	mu sync.Mutex
	// rule, if not nil, may answer a request instead of the server.
	rule     func(*http.Request) (*http.Response, error)
	requests []string // resource and query of each request
	next     http.RoundTripper
}

func (f *faultInjector) RoundTrip(r *http.Request) (*http.Response, error) {
	f.mu.Lock()
	rule := f.rule
	f.requests = append(f.requests, resourceOf(r)+"?"+r.URL.RawQuery)
	f.mu.Unlock()
	if rule != nil {
		if response, err := rule(r); response != nil || err != nil {
			return response, err
		}
	}
	return f.next.RoundTrip(r)
}

func (f *faultInjector) setRule(rule func(*http.Request) (*http.Response, error)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rule = rule
}

// countRequests returns the number of requests for the resource whose query contains text.
func (f *faultInjector) countRequests(resource, text string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, seen := range f.requests {
		if strings.HasPrefix(seen, resource+"?") && strings.Contains(seen, text) {
			n++
		}
	}
	return n
}

func resourceOf(r *http.Request) string { return r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:] }

func injectFaults(config *rest.Config) *faultInjector {
	f := &faultInjector{}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		f.next = next
		return f
	})
	return f
}

// TestLateList checks that nothing is delivered while a required list is missing.
func TestLateList(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	for _, late := range []string{"services", "endpointslices"} {
		t.Run(late, func(t *testing.T) {
			t.Parallel()
			ns := createNamespace(t, client)
			must[*corev1.Service](t)(client.CoreV1().Services(ns).Create(t.Context(), newService("web"), metav1.CreateOptions{}))
			must[*discoveryv1.EndpointSlice](t)(client.DiscoveryV1().EndpointSlices(ns).Create(t.Context(), newSlice("web-1", "web", "10.0.0.1"), metav1.CreateOptions{}))
			config := cluster.Config()
			f := injectFaults(config)
			release := make(chan struct{})
			f.setRule(func(r *http.Request) (*http.Response, error) {
				if resourceOf(r) == late {
					select {
					case <-release:
					case <-r.Context().Done():
						return nil, r.Context().Err()
					}
				}
				return nil, nil
			})
			var log logRecorder
			r := startSource(t, ns, apiserver.Options{Config: config, Logger: log.logger()})
			log.waitFor(t, `missing=[`+late+`]`, 1)
			log.waitFor(t, "nothing new is programmed", 1)
			if n := r.count(); n != 0 {
				t.Errorf("%d Deltas without the list of %s", n, late)
			}
			close(release)
			r.waitFor(t, "first Delta", hasFirstDelta)
			if d := r.deltas[0]; len(d.Services) != 1 || len(d.EndpointSlices) != 1 {
				t.Errorf("first Delta has %d Services and %d EndpointSlices, want all", len(d.Services), len(d.EndpointSlices))
			}
		})
	}
}

// TestServiceCIDRsUnavailable checks that the Source works with a server that does not
// serve ServiceCIDRs or does not allow reading them.
func TestServiceCIDRsUnavailable(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	t.Run("not allowed", func(t *testing.T) {
		t.Parallel()
		ns := createNamespace(t, client)
		must[*rbacv1.ClusterRole](t)(client.RbacV1().ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{
			ObjectMeta: metav1.ObjectMeta{Name: ns},
			Rules: []rbacv1.PolicyRule{
				{APIGroups: []string{""}, Resources: []string{"services", "nodes"}, Verbs: []string{"list", "watch"}},
				{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"list", "watch"}},
			},
		}, metav1.CreateOptions{}))
		must[*rbacv1.ClusterRoleBinding](t)(client.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: ns},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: ns},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: ns}},
		}, metav1.CreateOptions{}))
		config := cluster.Config()
		config.Impersonate.UserName = ns
		f := injectFaults(config)
		var log logRecorder
		r := startSource(t, ns, apiserver.Options{Config: config, Logger: log.logger()})
		// New roles may take effect with a delay.
		r.waitFor(t, "first Delta", hasFirstDelta)
		log.waitFor(t, "ServiceCIDRs can't be read", 1)
		if n := f.countRequests("servicecidrs", ""); n > 2 {
			t.Errorf("%d requests for ServiceCIDRs, want at most a stream and a list", n)
		}
		must[*corev1.Service](t)(client.CoreV1().Services(ns).Create(t.Context(), newService("web"), metav1.CreateOptions{}))
		r.waitFor(t, "a Service", func(r *receiver) bool { return r.services["web"] != nil })
	})
	t.Run("not served", func(t *testing.T) {
		t.Parallel()
		config := cluster.Config()
		injectFaults(config).setRule(func(r *http.Request) (*http.Response, error) {
			if resourceOf(r) != "servicecidrs" {
				return nil, nil
			}
			return newResponse(r, http.StatusNotFound, "404 page not found\n"), nil
		})
		var log logRecorder
		r := startSource(t, "none", apiserver.Options{Config: config, Logger: log.logger()})
		r.waitFor(t, "first Delta", hasFirstDelta)
		log.waitFor(t, "ServiceCIDRs can't be read", 1)
	})
}

// TestForbidden checks that missing rights are logged once.
func TestForbidden(t *testing.T) {
	t.Parallel()
	config := cluster.Config()
	config.Impersonate.UserName = "nobody"
	f := injectFaults(config)
	var log logRecorder
	r := startSource(t, "none", apiserver.Options{Config: config, Logger: log.logger()})
	log.waitFor(t, "resource=services", 1)
	for deadline := time.Now().Add(30 * time.Second); f.countRequests("services", "") < 6 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	log.waitFor(t, "resource=services", 1)
	if r.count() != 0 {
		t.Error("unexpected Delta")
	}
}

// TestListWithoutStreaming checks the fallback to lists on a server that cannot stream
// them.
func TestListWithoutStreaming(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	must[*corev1.Service](t)(client.CoreV1().Services(ns).Create(t.Context(), newService("web"), metav1.CreateOptions{}))
	config := cluster.Config()
	injectFaults(config).setRule(func(r *http.Request) (*http.Response, error) {
		if r.URL.Query().Get("sendInitialEvents") == "" {
			return nil, nil
		}
		return newResponse(r, http.StatusUnprocessableEntity, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422,`+
			`"message":"sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"}`), nil
	})
	var log logRecorder
	r := startSource(t, ns, apiserver.Options{Config: config, Logger: log.logger()})
	r.waitFor(t, "first Delta", hasFirstDelta)
	if svc := r.services["web"]; svc == nil || svc.ManagedFields != nil {
		t.Errorf("Service %v, want a trimmed Service", svc)
	}
	if err := client.CoreV1().Services(ns).Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.waitFor(t, "removal of the Service", func(r *receiver) bool { return r.services["web"] == nil })
	log.waitFor(t, "level=", 0)
}

// TestAPIServerRestart restarts the API server, so it does not run in parallel.
func TestAPIServerRestart(t *testing.T) {
	client := adminClient(t)
	ns := createNamespace(t, client)
	svcs, ctx := client.CoreV1().Services(ns), t.Context()
	must[*corev1.Service](t)(svcs.Create(ctx, newService("web"), metav1.CreateOptions{}))
	must[*corev1.Service](t)(svcs.Create(ctx, newService("stays"), metav1.CreateOptions{}))
	var log logRecorder
	r := startSource(t, ns, apiserver.Options{Logger: log.logger()})
	r.waitFor(t, "first Delta", hasFirstDelta)

	before := r.count()
	if err := cluster.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	log.waitFor(t, "API server can't be reached", 1)
	if n := r.count() - before; n != 0 {
		t.Errorf("%d Deltas while the API server is down", n)
	}
	if err := cluster.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	must[*corev1.Service](t)(svcs.Create(ctx, newService("new"), metav1.CreateOptions{}))
	if err := svcs.Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.waitFor(t, "the changes", func(r *receiver) bool { return r.services["new"] != nil && r.services["web"] == nil })
	log.waitFor(t, "API server is back", 1)
	log.waitFor(t, "API server can't be reached", 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range r.deltas[before:] {
		for _, svc := range d.Services {
			if svc.Name == "stays" {
				t.Error("an unchanged Service is delivered again")
			}
		}
		if len(d.DeletedServices) > 1 {
			t.Errorf("deleted %v, want only web", d.DeletedServices)
		}
	}
}

// TestExpiredWatch makes the API server forget changes while the Source is disconnected, so
// it does not run in parallel.
func TestExpiredWatch(t *testing.T) {
	client := adminClient(t)
	ns := createNamespace(t, client)
	svcs, ctx := client.CoreV1().Services(ns), t.Context()
	for _, name := range []string{"goes", "stays", "changes", "replaced"} {
		must[*corev1.Service](t)(svcs.Create(ctx, newService(name), metav1.CreateOptions{}))
	}
	config := cluster.Config()
	var cut sync.Mutex
	conns := map[net.Conn]struct{}{}
	down := false
	config.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		cut.Lock()
		defer cut.Unlock()
		if down {
			return nil, errors.Join(errors.New("network is unreachable"), conn.Close())
		}
		conns[conn] = struct{}{}
		return conn, nil
	}
	f := injectFaults(config)
	var log logRecorder
	r := startSource(t, ns, apiserver.Options{Config: config, Logger: log.logger()})
	r.waitFor(t, "first Delta", hasFirstDelta)
	old := r.services["replaced"].UID

	cut.Lock()
	down = true
	for conn := range conns {
		_ = conn.Close()
	}
	cut.Unlock()
	log.waitFor(t, "API server can't be reached", 1)
	before := r.count() // includes changes by other tests
	for _, name := range []string{"goes", "replaced"} {
		if err := svcs.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	must[*corev1.Service](t)(svcs.Create(ctx, newService("replaced"), metav1.CreateOptions{}))
	changed := must[*corev1.Service](t)(svcs.Get(ctx, "changes", metav1.GetOptions{}))
	changed.Spec.Ports[0].Port = 81
	must[*corev1.Service](t)(svcs.Update(ctx, changed, metav1.UpdateOptions{}))
	if err := cluster.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	if err := cluster.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	if err := cluster.Compact(ctx); err != nil {
		t.Fatal(err)
	}
	if n := r.count() - before; n != 0 {
		t.Errorf("%d Deltas while disconnected", n)
	}
	lists := f.countRequests("services", "sendInitialEvents=true")
	cut.Lock()
	down = false
	cut.Unlock()
	r.waitFor(t, "the changes", func(r *receiver) bool {
		return r.services["goes"] == nil && r.services["changes"].Spec.Ports[0].Port == 81 && r.services["replaced"].UID != old
	})
	if f.countRequests("services", "sendInitialEvents=true") == lists {
		t.Error("no new list was requested: the watch did not expire")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range r.deltas[before:] {
		for _, svc := range d.Services {
			if svc.Name == "stays" {
				t.Error("an unchanged Service is delivered again")
			}
		}
	}
}

// TestWatchGone makes the server end a watch with an event 410 Gone, as it does when a
// watch is too far behind.
func TestWatchGone(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	must[*corev1.Service](t)(client.CoreV1().Services(ns).Create(t.Context(), newService("web"), metav1.CreateOptions{}))
	config := cluster.Config()
	f := injectFaults(config)
	var once sync.Once
	f.setRule(func(r *http.Request) (response *http.Response, err error) {
		if resourceOf(r) != "services" {
			return nil, nil
		}
		once.Do(func() {
			response = newResponse(r, http.StatusOK, `{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure",`+
				`"reason":"Expired","code":410,"message":"too old resource version"}}`)
		})
		return response, nil
	})
	var log logRecorder
	r := startSource(t, ns, apiserver.Options{Config: config, Logger: log.logger()})
	r.waitFor(t, "first Delta", hasFirstDelta)
	if len(r.deltas[0].Services) != 1 {
		t.Errorf("first Delta has %d Services, want 1", len(r.deltas[0].Services))
	}
	log.waitFor(t, "level=", 0)
}
