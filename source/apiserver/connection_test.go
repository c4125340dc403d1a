package apiserver_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/source/apiserver"
)

// switchableServer is an API server whose behavior a test can change. A change ends its
// streams.
type switchableServer struct {
	mu            sync.Mutex
	behavior      behavior
	changed       chan struct{}
	requestCounts map[string]int // by resource
}

// behavior answers a request instead of the server, unless it returns nothing. verb is
// list, watch or stream.
type behavior func(r *http.Request, verb string) (*http.Response, error)

func (m *switchableServer) setBehavior(b behavior) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.changed != nil {
		close(m.changed)
	}
	m.behavior, m.requestCounts, m.changed = b, map[string]int{}, make(chan struct{})
}

func (m *switchableServer) countRequests(resource string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.requestCounts[resource]
}

func (m *switchableServer) serve(r *http.Request) (*http.Response, error) {
	verb := "list"
	switch {
	case r.URL.Query().Get("sendInitialEvents") != "":
		verb = "stream"
	case r.URL.Query().Get("watch") != "":
		verb = "watch"
	}
	m.mu.Lock()
	behavior, changed := m.behavior, m.changed
	m.requestCounts[resourceOf(r)]++
	m.mu.Unlock()
	if response, err := behavior(r, verb); response != nil || err != nil {
		return response, err
	}
	if verb == "list" {
		return idleServer(r)
	}
	reader, writer := io.Pipe()
	response := newResponse(r, http.StatusOK, "")
	response.Body = reader
	go func() {
		if verb == "stream" {
			group, name := apiVersionAndKind(r)
			_, _ = fmt.Fprintf(writer, `{"type":"BOOKMARK","object":{"kind":%q,"apiVersion":%q,"metadata":`+
				`{"resourceVersion":"5","annotations":{"k8s.io/initial-events-end":"true"}}}}`, name, group)
		}
		select {
		case <-changed:
		case <-r.Context().Done():
		}
		_ = writer.Close()
	}()
	return response, nil
}

// healthy handles all requests.
func healthy(*http.Request, string) (*http.Response, error) { return nil, nil }

// noStreaming rejects streamed lists.
func noStreaming(r *http.Request, verb string) (*http.Response, error) {
	if verb == "stream" {
		return statusResponse(r, http.StatusUnprocessableEntity, "Invalid"), nil
	}
	return nil, nil
}

// connectionRefused fails all requests.
func connectionRefused(*http.Request, string) (*http.Response, error) {
	return nil, syscall.ECONNREFUSED
}

// respondStatus answers all requests with a status.
func respondStatus(code int, reason string) behavior {
	return func(r *http.Request, _ string) (*http.Response, error) { return statusResponse(r, code, reason), nil }
}

// forResource limits a behavior to one resource, and to some verbs if there are any.
func (m behavior) forResource(resource string, verbs ...string) behavior {
	return func(r *http.Request, verb string) (*http.Response, error) {
		if resourceOf(r) == resource && (len(verbs) == 0 || strings.Contains(strings.Join(verbs, " "), verb)) {
			return m(r, verb)
		}
		return nil, nil
	}
}

func statusResponse(r *http.Request, code int, reason string) *http.Response {
	return newResponse(r, code, fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d,"message":"no"}`, reason, code))
}

// TestConnectionLog checks the log while the API server changes its behavior every hour:
// each change is logged once, and the last message is correct.
func TestConnectionLog(t *testing.T) {
	t.Parallel()
	const (
		unreachable     = "API server can't be reached"
		serverErrors    = "API server returns errors"
		back            = "API server is back"
		unauthenticated = "API server does not accept the credentials"
		authenticated   = "API server accepts the credentials again"
		denies          = "API server denies a request"
		allows          = "API server allows a request that it denied before"
		cidrs           = "ServiceCIDRs can't be read"
		cidrsGone       = "ServiceCIDRs can no longer be read"
		cidrsBack       = "ServiceCIDRs can be read now"
		late            = "lists from the API server are late"
	)
	forbidden, unauthorized, notFound := respondStatus(403, "Forbidden"), respondStatus(401, "Unauthorized"), respondStatus(404, "NotFound")
	for _, tt := range []struct {
		name      string
		behaviors []behavior
		want      []string // message prefixes, in order
	}{
		{"healthy", []behavior{healthy}, nil},
		{"without streams", []behavior{noStreaming}, nil},
		{"unreachable", []behavior{connectionRefused, healthy}, []string{unreachable, late, back}},
		{"unreachable later", []behavior{healthy, connectionRefused, healthy}, []string{unreachable, back}},
		{"unreachable twice", []behavior{healthy, connectionRefused, healthy, connectionRefused, healthy}, []string{unreachable, back, unreachable, back}},
		{"internal errors", []behavior{healthy, respondStatus(500, "InternalError"), healthy}, []string{serverErrors, back}},
		{"overloaded", []behavior{healthy, respondStatus(429, "TooManyRequests"), healthy}, []string{serverErrors, back}},
		{"unavailable after unreachable", []behavior{healthy, connectionRefused, respondStatus(503, "ServiceUnavailable"), healthy}, []string{unreachable, serverErrors, back}},
		{"a wrong token", []behavior{unauthorized, healthy}, []string{unauthenticated, late, authenticated}},
		{"a token that expires", []behavior{noStreaming, unauthorized, noStreaming}, []string{unauthenticated, authenticated}},
		{"unreachable, then a wrong token", []behavior{healthy, connectionRefused, unauthorized, connectionRefused, healthy}, []string{unreachable, unauthenticated, back, unreachable, back, authenticated}},
		{"forbidden", []behavior{forbidden.forResource("services"), healthy}, []string{denies, late, allows}},
		{"forbidden, without streams", []behavior{forbidden.forResource("services"), noStreaming}, []string{denies, late, allows}},
		{"list only", []behavior{forbidden.forResource("services", "watch", "stream"), healthy}, []string{denies, allows}},
		{
			"first list, then watch",
			[]behavior{forbidden.forResource("services"), forbidden.forResource("services", "watch", "stream"), healthy},
			[]string{denies, late, allows, denies, allows},
		},
		{"ServiceCIDRs later", []behavior{notFound.forResource("servicecidrs"), healthy}, []string{cidrs, cidrsBack}},
		{"ServiceCIDRs denied and allowed again", []behavior{healthy, notFound.forResource("servicecidrs"), healthy}, []string{cidrsGone, cidrsBack}},
		{"ServiceCIDRs listed only", []behavior{forbidden.forResource("servicecidrs", "watch", "stream"), healthy}, []string{cidrs, cidrsBack}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var server switchableServer
				server.setBehavior(tt.behaviors[0])
				var log logRecorder
				_, stop := runSource(t, server.serve, &log)
				for _, m := range tt.behaviors[1:] {
					time.Sleep(time.Hour)
					server.setBehavior(m)
				}
				time.Sleep(time.Hour)
				stop()
				lines := withoutReminders(log.text.String())
				ok := len(lines) == len(tt.want)
				for i := range tt.want {
					ok = ok && strings.Contains(lines[i], `msg="`+tt.want[i])
				}
				if !ok {
					t.Errorf("log\n%s\nwant\n%s", log.text.String(), strings.Join(tt.want, "\n"))
				}
			})
		})
	}
}

// withoutReminders returns the lines of a log except repetitions and summaries of earlier
// messages.
func withoutReminders(text string) (lines []string) {
	late := false
	for line := range strings.Lines(text) {
		again := strings.Contains(line, "requests to the API server still fail") || late && strings.Contains(line, "are late")
		late = late || strings.Contains(line, "are late")
		if !again {
			lines = append(lines, line)
		}
	}
	return lines
}

// TestConnectionLogInAnyOrder is TestConnectionLog for messages whose order depends on
// which resource is requested first.
func TestConnectionLogInAnyOrder(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name      string
		behaviors [4]behavior
		want      [4]string
	}{
		{
			"a token without rights",
			[4]behavior{healthy, respondStatus(401, "Unauthorized"), respondStatus(403, "Forbidden").forResource("services"), healthy},
			[4]string{"does not accept the credentials", "denies a request", "accepts the credentials again", "allows a request"},
		},
		{
			"unreachable, then no ServiceCIDRs",
			[4]behavior{healthy, connectionRefused, respondStatus(404, "NotFound").forResource("servicecidrs"), healthy},
			[4]string{"can't be reached", "ServiceCIDRs can no longer be read", "is back", "ServiceCIDRs can be read now"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var server switchableServer
				server.setBehavior(tt.behaviors[0])
				var log logRecorder
				_, stop := runSource(t, server.serve, &log)
				for _, m := range tt.behaviors[1:] {
					time.Sleep(time.Hour)
					server.setBehavior(m)
				}
				time.Sleep(time.Hour)
				stop()
				for _, want := range tt.want {
					if log.count(want) != 1 || len(withoutReminders(log.text.String())) != len(tt.want) {
						t.Errorf("log\n%s\nwant once each of %q", log.text.String(), tt.want)
					}
				}
			})
		})
	}
}

// TestUnauthorized checks that after rejected credentials the log does not ask for RBAC
// rights.
func TestUnauthorized(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var server switchableServer
		server.setBehavior(respondStatus(401, "Unauthorized").forResource("servicecidrs"))
		var log logRecorder
		deltas, stop := runSource(t, server.serve, &log)
		time.Sleep(time.Hour)
		if n := deltas.Load(); n != 1 {
			t.Errorf("%d Deltas, want 1 without waiting for ServiceCIDRs", n)
		}
		if n := log.count("token or client certificate"); n != 1 {
			t.Errorf("the log has the fix %d times, want once:\n%s", n, log.text.String())
		}
		if n := log.count("Allow list"); n != 0 {
			t.Errorf("the log asks for RBAC rights:\n%s", log.text.String())
		}
		server.setBehavior(healthy)
		time.Sleep(maxRetryPause)
		if n := log.count("accepts the credentials again"); n != 1 {
			t.Errorf("the log reports accepted credentials %d times, want once:\n%s", n, log.text.String())
		}
		stop()
	})
}

// TestCredentialsLog checks that the log describes the rejected credentials without a
// secret.
func TestCredentialsLog(t *testing.T) {
	t.Parallel()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		config rest.Config
		want   string
	}{
		{"none", rest.Config{}, "credentials=none "},
		{"a token", rest.Config{BearerToken: "secret"}, "credentials=token "},
		{"a file", rest.Config{BearerToken: "secret", BearerTokenFile: token}, `credentials="token in ` + token + `" `},
		{"a password", rest.Config{Username: "eve", Password: "secret"}, `credentials="password of eve" `},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.config.Host = "http://api"
			tt.config.Transport = roundTripper(func(r *http.Request) (*http.Response, error) { return statusResponse(r, 401, "Unauthorized"), nil })
			var log logRecorder
			startSource(t, "none", apiserver.Options{Config: &tt.config, Logger: log.logger()})
			log.waitFor(t, tt.want, 1)
			if log.count("secret") != 0 {
				t.Errorf("the log contains the secret:\n%s", log.text.String())
			}
		})
	}
}

// TestServiceCIDRsRetryDelayResets checks that after a successful watch of ServiceCIDRs,
// the first retry after a denial is again after 30 seconds.
func TestServiceCIDRsRetryDelayResets(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var server switchableServer
		refuse := respondStatus(403, "Forbidden").forResource("servicecidrs")
		server.setBehavior(refuse)
		var log logRecorder
		_, stop := runSource(t, server.serve, &log)
		time.Sleep(time.Hour)
		server.setBehavior(healthy)
		time.Sleep(time.Hour)
		server.setBehavior(refuse)
		time.Sleep(maxRetryPause + 31*time.Second)
		if n := server.countRequests("servicecidrs"); n != 3 {
			t.Errorf("%d requests, want a watch, then a stream and a list after 30 seconds", n)
		}
		stop()
	})
}
