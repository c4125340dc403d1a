package apiserver_test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/apiserver"
)

// scriptedServer is an API server whose objects and faults a test sets. Its watches send
// bookmarks every minute.
type scriptedServer struct {
	mu      sync.Mutex
	version int
	// objects has the JSON of the objects by resource and name.
	objects map[string]map[string]string
	// override, if not nil, may answer a request instead of the server.
	override behavior
	// unfinished removes the closing bookmark from streams; stuck stops all events of
	// watches.
	unfinished, stuck bool
	// nextEvents are the first events of the next watch of Services, as type and object.
	nextEvents    [][2]string
	watches       map[*io.PipeWriter]string
	requestCounts map[string]int // by resource and verb
}

func newScripted() *scriptedServer {
	s := &scriptedServer{version: 100, objects: map[string]map[string]string{}, watches: map[*io.PipeWriter]string{}, requestCounts: map[string]int{}}
	for _, resource := range []string{"services", "endpointslices", "nodes", "servicecidrs"} {
		s.objects[resource] = map[string]string{}
		s.put(resource, "a", "uid-a", 50)
	}
	return s
}

// put stores an object without sending a watch event.
func (s *scriptedServer) put(resource, name, uid string, version int) {
	s.objects[resource][name] = fmt.Sprintf(`{"metadata":{"name":%q,"uid":%q,"resourceVersion":"%d"}}`, name, uid, version)
}

func (s *scriptedServer) update(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// countRequests returns the number of requests for Services with the verb.
func (s *scriptedServer) countRequests(verb string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requestCounts["services "+verb]
}

// closeWatches ends all watches.
func (s *scriptedServer) closeWatches() {
	for w := range s.watches {
		_ = w.Close()
	}
	clear(s.watches)
}

func (s *scriptedServer) serve(r *http.Request) (*http.Response, error) {
	resource, verb := resourceOf(r), "list"
	switch query := r.URL.Query(); {
	case query.Get("sendInitialEvents") != "":
		verb = "stream"
	case query.Get("watch") != "":
		verb = "watch"
	case query.Get("limit") == "1":
		verb = "version"
	}
	s.mu.Lock()
	s.requestCounts["services "+verb]++
	fault := s.override
	s.mu.Unlock()
	if fault != nil {
		if response, err := fault(r, verb); response != nil || err != nil {
			return response, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	group, name := apiVersionAndKind(r)
	var items []string
	_, requested, one := strings.Cut(strings.Split(r.URL.Query().Get("fieldSelector"), ",")[0], "metadata.name=")
	for _, key := range slices.Sorted(maps.Keys(s.objects[resource])) {
		if one && key != requested {
			continue
		}
		items = append(items, s.objects[resource][key])
	}
	if verb == "list" || verb == "version" {
		return newResponse(r, http.StatusOK, fmt.Sprintf(`{"kind":"%sList","apiVersion":%q,"metadata":{"resourceVersion":"%d"},"items":[%s]}`,
			name, group, s.version, strings.Join(items, ","))), nil
	}
	reader, writer := io.Pipe()
	s.watches[writer] = resource
	response := newResponse(r, http.StatusOK, "")
	response.Body = reader
	var lines []string
	if verb == "stream" {
		for _, item := range items {
			lines = append(lines, fmt.Sprintf(`{"type":"ADDED","object":{"kind":%q,"apiVersion":%q,%s}`, name, group, item[1:]))
		}
		if !s.unfinished {
			lines = append(lines, fmt.Sprintf(`{"type":"BOOKMARK","object":{"kind":%q,"apiVersion":%q,"metadata":`+
				`{"resourceVersion":"%d","annotations":{"k8s.io/initial-events-end":"true"}}}}`, name, group, s.version))
		}
	}
	if verb == "watch" && resource == "services" {
		for _, e := range s.nextEvents {
			object := e[1]
			if e[0] != "ERROR" {
				object = fmt.Sprintf(`{"kind":%q,"apiVersion":%q,%s`, name, group, object[1:])
			}
			lines = append(lines, fmt.Sprintf(`{"type":%q,"object":%s}`, e[0], object))
		}
		s.nextEvents = nil
	}
	go s.sendEvents(r.Context(), writer, lines, name, group)
	return response, nil
}

// sendEvents writes a watch until it is closed or the client ends it.
func (s *scriptedServer) sendEvents(ctx context.Context, w *io.PipeWriter, lines []string, name, group string) {
	// If ctx is done, stop may prevent the AfterFunc from running.
	defer func() { _ = w.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = w.Close() })
	defer stop()
	for _, line := range lines {
		_, _ = io.WriteString(w, line)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Minute):
		}
		s.mu.Lock()
		bookmark := fmt.Sprintf(`{"type":"BOOKMARK","object":{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"%d"}}}`, name, group, s.version)
		_, open := s.watches[w]
		stuck := s.stuck
		s.mu.Unlock()
		if !open {
			return
		}
		if !stuck {
			_, _ = io.WriteString(w, bookmark)
		}
	}
}

// deltaRecorder records the Deltas of a Source in a synctest bubble.
type deltaRecorder struct {
	*apiserver.Source

	mu       sync.Mutex
	services map[string]types.UID
	slices   map[string]types.UID
	node     bool
	unknown  bool
	cidrs    int
	deltas   int
}

func (f *deltaRecorder) deliver(d kube.Delta) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.deltas++
	for _, name := range d.DeletedServices {
		delete(f.services, name.Name)
	}
	for _, svc := range d.Services {
		f.services[svc.Name] = svc.UID
	}
	for _, name := range d.DeletedEndpointSlices {
		delete(f.slices, name.Name)
	}
	for _, slice := range d.EndpointSlices {
		f.slices[slice.Name] = slice.UID
	}
	f.node, f.unknown = f.node || d.Node != nil, d.NodeUnknown
	f.cidrs += len(d.ServiceCIDRs)
}

func (f *deltaRecorder) deltaCount() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.deltas
}

func (f *deltaRecorder) serviceUID(service string) types.UID {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.services[service]
}

func (f *deltaRecorder) serviceCount() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.services)
}

// runScripted runs a Source in a synctest bubble.
func runScripted(t *testing.T, server *scriptedServer, log *logRecorder, opts apiserver.Options) (f *deltaRecorder, stop func()) {
	t.Helper()
	opts.Config, opts.NodeName, opts.Logger = &rest.Config{Host: "http://api", Transport: roundTripper(server.serve)}, "a", log.logger()
	f = &deltaRecorder{
		Source: must[*apiserver.Source](t)(apiserver.New(opts)), services: map[string]types.UID{}, slices: map[string]types.UID{},
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx, f.deliver) }()
	return f, func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run returned %v", err)
		}
		server.update(server.closeWatches)
	}
}

// requireLine checks that one line of the log has all texts.
func (r *logRecorder) requireLine(t *testing.T, texts ...string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for line := range strings.Lines(r.text.String()) {
		if !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) }) {
			return
		}
	}
	t.Errorf("no log line with all of %q:\n%s", texts, r.text.String())
}

// TestOptionalLists checks that failing or unanswered requests for optional lists do not
// block the first Delta, and that the lists are delivered later.
func TestOptionalLists(t *testing.T) {
	t.Parallel()
	hang := func(r *http.Request, _ string) (*http.Response, error) {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	for _, resource := range []string{"servicecidrs", "nodes"} {
		for name, fault := range map[string]behavior{"500": respondStatus(500, "InternalError"), "401": respondStatus(401, "Unauthorized"), "hangs": hang} {
			t.Run(resource+"/"+name, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					server := newScripted()
					server.override = fault.forResource(resource)
					var log logRecorder
					f, stop := runScripted(t, server, &log, apiserver.Options{})
					time.Sleep(16 * time.Second)
					synctest.Wait() // orders the Source's writes before the reads below
					if f.deltaCount() != 1 || f.unknown != (resource == "nodes") {
						t.Fatalf("%d Deltas, Node unknown %v:\n%s", f.deltaCount(), f.unknown, log.text.String())
					}
					if name == "hangs" {
						log.requireLine(t, "is late", "resource="+resource)
					} else {
						log.requireLine(t, "is late", "resource="+resource, resource+": "+name)
					}
					time.Sleep(15 * time.Minute)
					log.requireLine(t, "still fail", resource+": ")
					server.update(func() { server.put("services", "later", "uid", 101); server.closeWatches() })
					server.update(func() { server.override = nil })
					time.Sleep(3 * time.Minute)
					synctest.Wait()
					if !f.node || f.unknown || f.cidrs != 1 {
						t.Errorf("Node %v, unknown %v, %d ServiceCIDRs after the server has recovered", f.node, f.unknown, f.cidrs)
					}
					stop()
				})
			})
		}
	}
}

// TestUnfinishedStream checks that a streamed list without its closing bookmark is
// abandoned after a minute, and that the following lists are not streamed.
func TestUnfinishedStream(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newScripted()
		server.unfinished = true
		var log logRecorder
		f, stop := runScripted(t, server, &log, apiserver.Options{})
		time.Sleep(65 * time.Second)
		if f.deltaCount() == 0 {
			t.Fatalf("no Delta:\n%s", log.text.String())
		}
		log.requireLine(t, "did not finish a streamed list", "resource=services")
		streams := server.countRequests("stream")
		server.update(func() {
			server.override = respondStatus(410, "Gone").forResource("services", "watch")
			server.put("services", "later", "uid", 101)
			server.closeWatches()
		})
		time.Sleep(time.Second)
		server.update(func() { server.override = nil })
		time.Sleep(30 * time.Second)
		if f.serviceUID("later") == "" || server.countRequests("stream") != streams {
			t.Errorf("Service %q, %d streams after the first", f.serviceUID("later"), server.countRequests("stream")-streams)
		}
		stop()
	})
}

// TestSilentWatch checks that a watch without events and bookmarks is restarted.
func TestSilentWatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newScripted()
		var log logRecorder
		f, stop := runScripted(t, server, &log, apiserver.Options{})
		time.Sleep(5*time.Minute + 30*time.Second)
		if log.count("level=") != 0 || server.countRequests("watch") != 0 {
			t.Errorf("%d watches after the stream:\n%s", server.countRequests("watch"), log.text.String())
		}
		server.update(func() { server.stuck = true; server.version = 105; server.put("services", "later", "uid", 104) })
		time.Sleep(10 * time.Minute)
		log.requireLine(t, "neither events nor bookmarks", "resource=services")
		if f.serviceUID("later") == "" {
			t.Errorf("the change is not delivered:\n%s", log.text.String())
		}
		stop()
	})
}

// TestVersionsGoBackwards checks that after a restore of the API server's data its current
// objects are delivered, although the watch continues without an error.
func TestVersionsGoBackwards(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newScripted()
		server.put("services", "lost", "uid-lost", 99)
		server.put("services", "same", "uid-old", 60)
		var log logRecorder
		f, stop := runScripted(t, server, &log, apiserver.Options{})
		time.Sleep(time.Minute)
		if f.serviceUID("lost") == "" {
			t.Fatal("the Service is not delivered")
		}
		server.update(func() {
			server.version = 70
			delete(server.objects["services"], "lost")
			server.put("services", "same", "uid-new", 60)
			server.put("services", "now", "uid-now", 70)
			server.closeWatches()
		})
		time.Sleep(time.Minute)
		if f.serviceUID("lost") != "" || f.serviceUID("now") == "" || f.serviceUID("same") != "uid-new" {
			t.Errorf("delivered Services %v:\n%s", f.services, log.text.String())
		}
		log.requireLine(t, "went backwards", "resource=services", "before=100", "now=70")
		// Versions may have grown beyond the known ones before the watch continues.
		server.update(func() {
			server.version = 200
			server.put("services", "now", "uid-now", 65)
			server.put("services", "same", "uid-old", 60)
			server.closeWatches()
		})
		time.Sleep(time.Minute)
		if f.serviceUID("same") != "uid-old" || log.count("is programmed\" resource=services before=70 now=65") != 1 {
			t.Errorf("delivered Services %v:\n%s", f.services, log.text.String())
		}
		lists := server.countRequests("stream")
		server.update(func() { server.closeWatches() })
		time.Sleep(time.Minute)
		if server.countRequests("stream") != lists {
			t.Error("listed again although versions did not go backwards")
		}
		stop()
	})
}

// TestVersionsGoBackwardsBehindEvents checks that versions are compared with the state before the
// watch: the first events of the watch may have higher versions than all lost ones.
func TestVersionsGoBackwardsBehindEvents(t *testing.T) {
	t.Parallel()
	const later = `{"metadata":{"name":"later","uid":"uid-later","resourceVersion":"190"}}`
	modify := func(s *scriptedServer) {
		s.put("services", "web", "uid-lost", 90)
		s.nextEvents = [][2]string{{"MODIFIED", s.objects["services"]["web"]}}
	}
	for name, tt := range map[string]struct {
		lose    func(*scriptedServer) // makes the change that is lost
		between func(*scriptedServer) // runs before the change is lost
		denied  bool                  // the restored server denies the first watch
	}{
		"a changed object": {lose: modify},
		"a changed object, listed again": {lose: modify, between: func(s *scriptedServer) {
			s.nextEvents = [][2]string{{"ERROR", `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410}`}}
		}},
		"a changed object, listed instead of watched": {lose: modify, denied: true},
		"a deleted object": {lose: func(s *scriptedServer) {
			s.nextEvents = [][2]string{{"DELETED", strings.Replace(s.objects["services"]["web"], `"60"`, `"95"`, 1)}}
			delete(s.objects["services"], "web")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newScripted()
				server.put("services", "web", "uid-web", 60)
				var log logRecorder
				f, stop := runScripted(t, server, &log, apiserver.Options{})
				time.Sleep(time.Minute)
				server.update(func() { tt.lose(server); server.closeWatches() })
				time.Sleep(2 * time.Minute)
				server.update(func() {
					if tt.between != nil {
						tt.between(server)
					}
					server.closeWatches()
				})
				time.Sleep(2 * time.Minute)
				if f.serviceUID("web") == "uid-web" || log.count("went backwards") > 0 {
					t.Fatalf("the change is not delivered:\n%s", log.text.String())
				}
				server.update(func() {
					server.version = 200
					server.put("services", "web", "uid-web", 60)
					server.objects["services"]["later"] = later
					server.nextEvents = [][2]string{{"ADDED", later}}
					var denied atomic.Bool
					server.override = func(r *http.Request, verb string) (*http.Response, error) {
						if verb == "watch" && resourceOf(r) == "services" && tt.denied && denied.CompareAndSwap(false, true) {
							return newResponse(r, http.StatusForbidden, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403}`), nil
						}
						return nil, r.Context().Err()
					}
					server.closeWatches()
				})
				time.Sleep(time.Minute)
				if f.serviceUID("web") != "uid-web" || f.serviceUID("later") != "uid-later" {
					t.Errorf("delivered Services %v:\n%s", f.services, log.text.String())
				}
				log.requireLine(t, "went backwards", "resource=services")
				stop()
			})
		})
	}
}

// TestVersionsGoBackwardsOnSlowServer checks that versions are compared even if the server
// answers the watch late.
func TestVersionsGoBackwardsOnSlowServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newScripted()
		server.put("services", "lost", "uid-lost", 99)
		var log logRecorder
		f, stop := runScripted(t, server, &log, apiserver.Options{})
		time.Sleep(time.Minute)
		server.update(func() {
			server.version = 70
			delete(server.objects["services"], "lost")
			server.override = func(r *http.Request, verb string) (*http.Response, error) {
				if verb == "watch" && resourceOf(r) == "services" {
					time.Sleep(45 * time.Second)
				}
				return nil, r.Context().Err()
			}
			server.closeWatches()
		})
		time.Sleep(75 * time.Second) // before the first bookmark of the new watch
		if f.serviceUID("lost") != "" {
			t.Errorf("a Service missing from the server is not deleted:\n%s", log.text.String())
		}
		log.requireLine(t, "went backwards", "resource=services", "before=100", "now=70")
		stop()
	})
}

// TestMassRemoval checks that removals are held when a list lacks most objects, until a
// second list a minute later confirms them.
func TestMassRemoval(t *testing.T) {
	t.Parallel()
	const delay = time.Minute
	many := func(server *scriptedServer) {
		for i := range 20 {
			server.put("services", fmt.Sprint("service-", i), fmt.Sprint("uid-", i), 60+i)
			server.put("endpointslices", fmt.Sprint("slice-", i), fmt.Sprint("uid-", i), 60+i)
		}
	}
	few := func(server *scriptedServer) { server.put("services", "web", "uid-web", 60) }
	for _, tt := range []struct {
		name        string
		before      func(*scriptedServer)
		delay       time.Duration
		held, final int // Services while removals are held, and at the end
		returns     bool
	}{
		{name: "lost", before: many, delay: delay, held: 21, final: 1},
		{name: "complete again", before: many, delay: delay, held: 21, final: 21, returns: true},
		{name: "off", before: many, held: 1, final: 1},
		{name: "small", before: few, delay: delay, held: 2, final: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newScripted()
				tt.before(server)
				var log logRecorder
				var reported []string
				f, stop := runScripted(t, server, &log, apiserver.Options{
					MassRemovalDelay: tt.delay,
					OnMassRemoval: func(resource string, removed, before int) {
						reported = append(reported, fmt.Sprint(resource, removed, before))
					},
				})
				time.Sleep(10 * time.Second)
				server.update(func() {
					objects := server.objects
					server.objects = map[string]map[string]string{"nodes": objects["nodes"], "services": {}, "endpointslices": {}}
					server.put("services", "a", "another-cluster", 50) // like default/kubernetes
					server.version = 60                                // the watch can't continue
					server.closeWatches()
					if tt.returns {
						time.AfterFunc(delay/2, func() { server.update(func() { server.objects = objects; server.version = 200 }) })
					}
				})
				time.Sleep(delay / 2)
				if n := f.serviceCount(); n != tt.held || (f.serviceUID("a") == "uid-a") != (tt.delay > 0) {
					t.Errorf("%d Services while removals are held, want %d; the first is %s\n%s", n, tt.held, f.serviceUID("a"), log.text.String())
				}
				time.Sleep(delay + 5*time.Second)
				if n := f.serviceCount(); n != tt.final || (f.serviceUID("a") == "uid-a") != tt.returns {
					t.Errorf("%d Services at the end, want %d; the first is %s\n%s", n, tt.final, f.serviceUID("a"), log.text.String())
				}
				switch {
				case tt.delay == 0:
					log.waitFor(t, "lacks", 0)
				case tt.returns:
					log.requireLine(t, "lacks more than half", "resource=services", "removed=21")
					log.requireLine(t, "complete again", "resource=endpointslices")
				default:
					log.requireLine(t, "still lacks", "resource=services")
				}
				if (len(reported) > 0) != (tt.delay > 0) {
					t.Errorf("reported %v", reported)
				}
				stop()
			})
		})
	}
}

// TestMassRemovalAtStart checks that the first list is compared with the Services that an
// earlier run left in the kernel.
func TestMassRemovalAtStart(t *testing.T) {
	t.Parallel()
	programmed := func() map[types.NamespacedName]struct{} {
		names := map[types.NamespacedName]struct{}{}
		for i := range 20 {
			names[types.NamespacedName{Name: fmt.Sprint("service-", i)}] = struct{}{}
		}
		return names
	}
	synctest.Test(t, func(t *testing.T) {
		server := newScripted()
		var log logRecorder
		f, stop := runScripted(t, server, &log, apiserver.Options{MassRemovalDelay: time.Minute, ProgrammedServices: programmed})
		time.Sleep(50 * time.Second)
		if f.deltaCount() != 0 {
			t.Errorf("%d Deltas while the first list is held", f.deltaCount())
		}
		log.requireLine(t, "lacks more than half", "resource=services", "removed=20")
		time.Sleep(30 * time.Second)
		if n := f.serviceCount(); n != 1 {
			t.Errorf("%d Services after the second list, want 1:\n%s", n, log.text.String())
		}
		stop()
	})
}
