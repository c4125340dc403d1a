package apiserver_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/apiserver"
)

// maxRetryPause is the longest pause between two attempts.
const maxRetryPause = 20 * time.Second

// idleServer is an API server whose objects never change and that cannot stream lists.
func idleServer(r *http.Request) (*http.Response, error) {
	switch {
	case r.URL.Query().Get("sendInitialEvents") != "":
		return newResponse(r, http.StatusUnprocessableEntity,
			`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}`), nil
	case r.URL.Query().Get("watch") != "":
		reader, writer := io.Pipe()
		context.AfterFunc(r.Context(), func() { _ = writer.Close() })
		response := newResponse(r, http.StatusOK, "")
		response.Body = reader
		return response, nil
	}
	group, name := apiVersionAndKind(r)
	return newResponse(r, http.StatusOK, fmt.Sprintf(
		`{"kind":"%sList","apiVersion":%q,"metadata":{"resourceVersion":"5"},"items":[{"metadata":{"name":"a","resourceVersion":"4"}}]}`, name, group)), nil
}

// apiVersionAndKind returns the API version and kind of the requested resource.
func apiVersionAndKind(r *http.Request) (group, name string) {
	kind := map[string]string{
		"services": "v1 Service", "nodes": "v1 Node",
		"endpointslices": "discovery.k8s.io/v1 EndpointSlice", "servicecidrs": "networking.k8s.io/v1 ServiceCIDR",
	}[resourceOf(r)]
	_, _ = fmt.Sscan(kind, &group, &name)
	return group, name
}

// runSource runs a Source in a synctest bubble, which ends only when all goroutines of the
// Source have ended.
func runSource(t *testing.T, transport roundTripper, log *logRecorder) (deltas *atomic.Int64, stop func()) {
	t.Helper()
	deltas = new(atomic.Int64)
	source := must[*apiserver.Source](t)(apiserver.New(apiserver.Options{
		Config: &rest.Config{Host: "http://api", Transport: transport}, NodeName: "a", Logger: log.logger(),
	}))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- source.Run(ctx, func(kube.Delta) {
			if source.Synced() != (deltas.Load() > 0) {
				t.Errorf("Synced %v in Delta %d", source.Synced(), deltas.Load())
			}
			deltas.Add(1)
		})
	}()
	return deltas, func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run returned %v", err)
		}
	}
}

// bookmarkingServer is an API server whose objects never change. It sends bookmarks and ends a watch
// when the requested time is over.
func bookmarkingServer(r *http.Request) (*http.Response, error) {
	response, err := idleServer(r)
	seconds, parseErr := time.ParseDuration(r.URL.Query().Get("timeoutSeconds") + "s")
	if err != nil || parseErr != nil || response.StatusCode != http.StatusOK {
		return response, err
	}
	group, name := apiVersionAndKind(r)
	reader, writer := io.Pipe()
	response.Body = reader
	ctx, cancel := context.WithTimeout(r.Context(), seconds)
	context.AfterFunc(ctx, func() {
		cancel()
		_ = writer.Close()
	})
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Minute):
				_, _ = fmt.Fprintf(writer, `{"type":"BOOKMARK","object":{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"5"}}}`, name, group)
			}
		}
	}()
	return response, nil
}

// TestWatchDuration checks that a watch at a known version lasts for 30 to 60 minutes, and that the
// API server gets no other requests while nothing changes.
func TestWatchDuration(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var watches, lists atomic.Int64
		var log logRecorder
		_, stop := runSource(t, func(r *http.Request) (*http.Response, error) {
			switch query := r.URL.Query(); {
			case query.Get("watch") == "":
				lists.Add(1)
			case query.Get("sendInitialEvents") == "":
				watches.Add(1)
			}
			return bookmarkingServer(r)
		}, &log)
		const hours, resources = 24, 4
		time.Sleep(hours * time.Hour)
		if n := watches.Load(); n < hours*resources || n > (2*hours+1)*resources {
			t.Errorf("%d watches of %d resources in %d hours, want one or two an hour for each", n, resources, hours)
		}
		if n := lists.Load(); n != resources {
			t.Errorf("%d lists, want one for each of %d resources", n, resources)
		}
		stop()
	})
}

// TestLongOutage checks that an API server that is unavailable for hours is retried
// occasionally, logged at growing intervals, and used soon after it is back.
func TestLongOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		down.Store(true)
		var requests atomic.Int64
		var log logRecorder
		deltas, stop := runSource(t, func(r *http.Request) (*http.Response, error) {
			requests.Add(1)
			if down.Load() {
				return nil, errors.New("no route to host")
			}
			return idleServer(r)
		}, &log)
		time.Sleep(3 * time.Hour)
		if n := requests.Load(); n > 3*3600/10*4*2 {
			t.Errorf("%d requests in three hours, want a few per minute", n)
		}
		if deltas.Load() != 0 {
			t.Error("unexpected Delta")
		}
		down.Store(false)
		time.Sleep(maxRetryPause)
		if deltas.Load() != 1 {
			t.Errorf("%d Deltas after the API server is back, want 1", deltas.Load())
		}
		stop()
		for text, n := range map[string]int{"can't be reached": 1, "is back": 1, "are late": 5, "level=": 7} {
			if log.count(text) != n {
				t.Errorf("log has %q %d times, want %d:\n%s", text, log.count(text), n, log.text.String())
			}
		}
	})
}

// TestServerWithoutFieldSelector checks that the Source follows Services of an API server before
// Kubernetes 1.31, which refuses the field selector that leaves out headless Services.
func TestServerWithoutFieldSelector(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var refused, watches atomic.Int64
		var log logRecorder
		deltas, stop := runSource(t, func(r *http.Request) (*http.Response, error) {
			query := r.URL.Query()
			if strings.Contains(query.Get("fieldSelector"), "spec.clusterIP") {
				refused.Add(1)
				return newResponse(r, http.StatusBadRequest, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"BadRequest","code":400,`+
					`"message":"\"spec.clusterIP\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""}`), nil
			}
			if resourceOf(r) == "services" && query.Get("watch") != "" && query.Get("sendInitialEvents") == "" {
				watches.Add(1)
			}
			return idleServer(r)
		}, &log)
		time.Sleep(maxRetryPause)
		if deltas.Load() != 1 || watches.Load() != 1 || refused.Load() != 1 {
			t.Errorf("%d Deltas, %d watches of Services and %d refused requests, want one of each", deltas.Load(), watches.Load(), refused.Load())
		}
		stop()
		for text, n := range map[string]int{"can't leave out headless Services": 1, "level=": 1} {
			if log.count(text) != n {
				t.Errorf("log has %q %d times, want %d:\n%s", text, log.count(text), n, log.text.String())
			}
		}
	})
}

// TestServiceCIDRsServedLater checks that missing ServiceCIDRs are requested rarely, and
// delivered once they are served.
func TestServiceCIDRsServedLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var served atomic.Bool
		var requests atomic.Int64
		var log logRecorder
		deltas, stop := runSource(t, func(r *http.Request) (*http.Response, error) {
			if resourceOf(r) == "servicecidrs" && !served.Load() {
				requests.Add(1)
				return newResponse(r, http.StatusNotFound, "404 page not found"), nil
			}
			return idleServer(r)
		}, &log)
		time.Sleep(24 * time.Hour)
		if n := requests.Load(); n > 2*6*24+20 {
			t.Errorf("%d requests in a day, want a streamed list and a list every ten minutes", n)
		}
		if deltas.Load() != 1 {
			t.Errorf("%d Deltas, want only the first", deltas.Load())
		}
		served.Store(true)
		time.Sleep(11 * time.Minute)
		if deltas.Load() != 2 {
			t.Errorf("%d Deltas after ServiceCIDRs are served, want 2", deltas.Load())
		}
		stop()
		if n := log.count("level="); n != 2 {
			t.Errorf("%d log lines, want one about the denial and one about the recovery:\n%s", n, log.text.String())
		}
	})
}

// TestRunReturnsAtOnce checks that Run returns immediately when ctx is done, whatever state
// it is in.
func TestRunReturnsAtOnce(t *testing.T) {
	t.Parallel()
	for name, transport := range map[string]roundTripper{
		"watching":    idleServer,
		"unreachable": func(*http.Request) (*http.Response, error) { return nil, errors.New("no route to host") },
		"no response": func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		},
		"not found":          func(r *http.Request) (*http.Response, error) { return newResponse(r, http.StatusNotFound, ""), nil },
		"connection refused": func(*http.Request) (*http.Response, error) { return nil, syscall.ECONNREFUSED },
		"overloaded":         overloaded,
		"overloaded, with Retry-After": func(r *http.Request) (*http.Response, error) {
			response, err := overloaded(r)
			response.Header.Set("Retry-After", "5")
			return response, err
		},
		"overloaded within the stream": overloadedStream,
	} {
		for _, after := range []time.Duration{0, 500 * time.Millisecond, 10 * time.Second, 3 * time.Minute, time.Hour} {
			t.Run(fmt.Sprintf("%s/%s", name, after), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					var log logRecorder
					_, stop := runSource(t, transport, &log)
					time.Sleep(after)
					synctest.Wait()
					begin := time.Now()
					stop()
					if d := time.Since(begin); d > 0 {
						t.Errorf("Run returned after %s, want immediately", d)
					}
					if n := len(withoutReminders(log.text.String())); n > 5 {
						t.Errorf("%d log lines, want at most 5:\n%s", n, log.text.String())
					}
				})
			})
		}
	}
}

// TestRunReturnsWithoutServer is TestRunReturnsAtOnce for a real address on which no server
// listens.
func TestRunReturnsWithoutServer(t *testing.T) {
	t.Parallel()
	listener := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	var log logRecorder
	source := must[*apiserver.Source](t)(apiserver.New(apiserver.Options{
		Config: &rest.Config{Host: "http://" + listener.Addr().String()}, NodeName: "a", Logger: log.logger(),
	}))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- source.Run(ctx, func(kube.Delta) { t.Error("unexpected Delta") }) }()
	log.waitFor(t, "connection refused", 1)
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("Run returned %v", err)
		}
	case <-time.After(500 * time.Millisecond): // the first pause is 800 ms or longer
		t.Error("Run did not return")
	}
}

// overloaded is an API server that rejects all requests with 429 Too Many Requests.
func overloaded(r *http.Request) (*http.Response, error) {
	return newResponse(r, http.StatusTooManyRequests, tooManyRequests), nil
}

const tooManyRequests = `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"TooManyRequests","code":429,"message":"try again later"}`

// overloadedStream is an API server that sends 429 Too Many Requests as an event of each
// watch.
func overloadedStream(r *http.Request) (*http.Response, error) {
	if r.URL.Query().Get("watch") == "" {
		return idleServer(r)
	}
	return newResponse(r, http.StatusOK, `{"type":"ERROR","object":`+tooManyRequests+`}`), nil
}

// TestRetryBackoff checks that an API server that refuses connections or is overloaded is
// retried occasionally, without concurrent attempts, and asked for a streamed list when it
// is back.
func TestRetryBackoff(t *testing.T) {
	t.Parallel()
	for name, trouble := range map[string]roundTripper{
		"connection refused":           func(*http.Request) (*http.Response, error) { return nil, syscall.ECONNREFUSED },
		"overloaded":                   overloaded,
		"overloaded within the stream": overloadedStream,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var down atomic.Bool
				down.Store(true)
				var requests, streams, lists atomic.Int64
				var log logRecorder
				_, stop := runSource(t, func(r *http.Request) (*http.Response, error) {
					requests.Add(1)
					if down.Load() {
						return trouble(r)
					}
					switch {
					case r.URL.Query().Get("sendInitialEvents") != "":
						streams.Add(1)
					case r.URL.Query().Get("watch") == "":
						lists.Add(1)
					}
					return idleServer(r)
				}, &log)
				time.Sleep(time.Hour)
				if n := requests.Load(); n < 4*3600/60 || n > 4*3600/10 {
					t.Errorf("%d requests in an hour, want a few per minute for each of four resources", n)
				}
				down.Store(false)
				time.Sleep(maxRetryPause)
				if streams.Load() != 4 || lists.Load() != 4 {
					t.Errorf("%d streamed lists and %d lists after the server is back, want 4 and 4", streams.Load(), lists.Load())
				}
				stop()
			})
		})
	}
}

// TestRunWaitsForRequests checks that no request is in flight when Run returns.
func TestRunWaitsForRequests(t *testing.T) {
	t.Parallel()
	for name, lists := range map[string]bool{"a watch": false, "a list": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var inFlight atomic.Int64
				var log logRecorder
				_, stop := runSource(t, func(r *http.Request) (*http.Response, error) {
					if lists && r.URL.Query().Get("watch") != "" {
						return idleServer(r) // can't stream lists
					}
					inFlight.Add(1)
					defer inFlight.Add(-1)
					<-r.Context().Done()
					time.Sleep(time.Second)
					return nil, r.Context().Err()
				}, &log)
				time.Sleep(time.Minute)
				if n := inFlight.Load(); n != 4 {
					t.Fatalf("%d requests in flight, want one per resource", n)
				}
				stop()
				if n := inFlight.Load(); n != 0 {
					t.Errorf("%d requests in flight after Run returned", n)
				}
			})
		})
	}
}
