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

// moody is an API server that can be told how to behave. Streams end when it
// changes its mind.
type moody struct {
	mu      sync.Mutex
	mood    mood
	changed chan struct{}
	asked   map[string]int // by resource
}

// mood answers a request in the server's place, unless it returns nothing. verb is
// list, watch or stream.
type mood func(r *http.Request, verb string) (*http.Response, error)

func (m *moody) become(mood mood) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.changed != nil {
		close(m.changed)
	}
	m.mood, m.asked, m.changed = mood, map[string]int{}, make(chan struct{})
}

func (m *moody) requests(resource string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.asked[resource]
}

func (m *moody) serve(r *http.Request) (*http.Response, error) {
	verb := "list"
	switch {
	case r.URL.Query().Get("sendInitialEvents") != "":
		verb = "stream"
	case r.URL.Query().Get("watch") != "":
		verb = "watch"
	}
	m.mu.Lock()
	mood, changed := m.mood, m.changed
	m.asked[resourceOf(r)]++
	m.mu.Unlock()
	if response, err := mood(r, verb); response != nil || err != nil {
		return response, err
	}
	if verb == "list" {
		return tinyServer(r)
	}
	reader, writer := io.Pipe()
	response := answer(r, http.StatusOK, "")
	response.Body = reader
	go func() {
		if verb == "stream" {
			group, name := kindOf(r)
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

// well is a server that does all it is asked for, and unstreamed one that can't
// stream lists.
func well(*http.Request, string) (*http.Response, error) { return nil, nil }

func unstreamed(r *http.Request, verb string) (*http.Response, error) {
	if verb == "stream" {
		return failed(r, http.StatusUnprocessableEntity, "Invalid"), nil
	}
	return nil, nil
}

func gone(*http.Request, string) (*http.Response, error) { return nil, syscall.ECONNREFUSED }

// says answers requests with a status.
func says(code int, reason string) mood {
	return func(r *http.Request, _ string) (*http.Response, error) { return failed(r, code, reason), nil }
}

// of has a mood for one resource only, and for some verbs if there are any.
func (m mood) of(resource string, verbs ...string) mood {
	return func(r *http.Request, verb string) (*http.Response, error) {
		if resourceOf(r) == resource && (len(verbs) == 0 || strings.Contains(strings.Join(verbs, " "), verb)) {
			return m(r, verb)
		}
		return nil, nil
	}
}

func failed(r *http.Request, code int, reason string) *http.Response {
	return answer(r, code, fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d,"message":"no"}`, reason, code))
}

// TestLog says what an operator reads while the API server passes from mood to
// mood, each of which lasts for an hour: each thing once, and the last word is right.
func TestLog(t *testing.T) {
	t.Parallel()
	const (
		unreachable = "API server can't be reached"
		unwell      = "API server does not answer as it should"
		back        = "API server is back"
		unknown     = "API server does not accept the credentials"
		known       = "API server accepts the credentials again"
		refuses     = "API server refuses a request"
		allows      = "API server allows a request that it had refused"
		cidrs       = "ServiceCIDRs can't be read"
		cidrsGone   = "ServiceCIDRs can no longer be read"
		cidrsBack   = "ServiceCIDRs can be read now"
		late        = "lists of the API server are late"
	)
	forbidden, unauthorized, notFound := says(403, "Forbidden"), says(401, "Unauthorized"), says(404, "NotFound")
	for _, tt := range []struct {
		name  string
		moods []mood
		want  []string // the beginnings of the messages, in order
	}{
		{"well", []mood{well}, nil},
		{"without streams", []mood{unstreamed}, nil},
		{"away", []mood{gone, well}, []string{unreachable, late, back}},
		{"away later", []mood{well, gone, well}, []string{unreachable, back}},
		{"away twice", []mood{well, gone, well, gone, well}, []string{unreachable, back, unreachable, back}},
		{"internal errors", []mood{well, says(500, "InternalError"), well}, []string{unwell, back}},
		{"overloaded", []mood{well, says(429, "TooManyRequests"), well}, []string{unwell, back}},
		{"unavailable after it was away", []mood{well, gone, says(503, "ServiceUnavailable"), well}, []string{unreachable, unwell, back}},
		{"a wrong token", []mood{unauthorized, well}, []string{unknown, late, known}},
		{"a token that expires", []mood{unstreamed, unauthorized, unstreamed}, []string{unknown, known}},
		{"away, then a wrong token", []mood{well, gone, unauthorized, gone, well}, []string{unreachable, unknown, back, unreachable, back, known}},
		{"forbidden", []mood{forbidden.of("services"), well}, []string{refuses, late, allows}},
		{"forbidden, without streams", []mood{forbidden.of("services"), unstreamed}, []string{refuses, late, allows}},
		{"list only", []mood{forbidden.of("services", "watch", "stream"), well}, []string{refuses, allows}},
		{
			"first list, then watch",
			[]mood{forbidden.of("services"), forbidden.of("services", "watch", "stream"), well},
			[]string{refuses, late, allows, refuses, allows},
		},
		{"ServiceCIDRs later", []mood{notFound.of("servicecidrs"), well}, []string{cidrs, cidrsBack}},
		{"ServiceCIDRs and back", []mood{well, notFound.of("servicecidrs"), well}, []string{cidrsGone, cidrsBack}},
		{"ServiceCIDRs listed only", []mood{forbidden.of("servicecidrs", "watch", "stream"), well}, []string{cidrs, cidrsBack}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var server moody
				server.become(tt.moods[0])
				var log record
				_, stop := run(t, server.serve, &log)
				for _, m := range tt.moods[1:] {
					time.Sleep(time.Hour)
					server.become(m)
				}
				time.Sleep(time.Hour)
				stop()
				lines := withoutReminders(log.text.String())
				ok := len(lines) == len(tt.want)
				for i := range tt.want {
					ok = ok && strings.Contains(lines[i], `msg="`+tt.want[i])
				}
				if !ok {
					t.Errorf("log is\n%s\nwant\n%s", log.text.String(), strings.Join(tt.want, "\n"))
				}
			})
		})
	}
}

// withoutReminders returns the lines of a log without those that say again, or of
// all requests, what was said before.
func withoutReminders(text string) (lines []string) {
	late := false
	for line := range strings.Lines(text) {
		again := strings.Contains(line, "API server still fails") || late && strings.Contains(line, "are late")
		late = late || strings.Contains(line, "are late")
		if !again {
			lines = append(lines, line)
		}
	}
	return lines
}

// TestLogOfOneKind says the same where the order depends on which kind asks first.
func TestLogOfOneKind(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		moods [4]mood
		want  [4]string
	}{
		{
			"a token without rights",
			[4]mood{well, says(401, "Unauthorized"), says(403, "Forbidden").of("services"), well},
			[4]string{"does not accept the credentials", "refuses a request", "accepts the credentials again", "allows a request"},
		},
		{
			"away, then no ServiceCIDRs",
			[4]mood{well, gone, says(404, "NotFound").of("servicecidrs"), well},
			[4]string{"can't be reached", "ServiceCIDRs can no longer be read", "is back", "ServiceCIDRs can be read now"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var server moody
				server.become(tt.moods[0])
				var log record
				_, stop := run(t, server.serve, &log)
				for _, m := range tt.moods[1:] {
					time.Sleep(time.Hour)
					server.become(m)
				}
				time.Sleep(time.Hour)
				stop()
				for _, want := range tt.want {
					if log.count(want) != 1 || len(withoutReminders(log.text.String())) != len(tt.want) {
						t.Errorf("log is\n%s\nwant once each of %q", log.text.String(), tt.want)
					}
				}
			})
		})
	}
}

// TestUnauthorized says that whom the API server does not know is not told to
// allow something.
func TestUnauthorized(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var server moody
		server.become(says(401, "Unauthorized").of("servicecidrs"))
		var log record
		deltas, stop := run(t, server.serve, &log)
		time.Sleep(time.Hour)
		if n := deltas.Load(); n != 1 {
			t.Errorf("%d Deltas, want one: ServiceCIDRs are not waited for", n)
		}
		if n := log.count("token or client certificate"); n != 1 {
			t.Errorf("the log says %d times what to look at:\n%s", n, log.text.String())
		}
		if n := log.count("Allow list"); n != 0 {
			t.Errorf("the log asks for rights:\n%s", log.text.String())
		}
		server.become(well)
		time.Sleep(longestPause)
		if n := log.count("accepts the credentials again"); n != 1 {
			t.Errorf("the log says %d times that they are accepted:\n%s", n, log.text.String())
		}
		stop()
	})
}

// TestCredentials says that the log names what was not accepted, and no secret.
func TestCredentials(t *testing.T) {
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
			tt.config.Transport = roundTripper(func(r *http.Request) (*http.Response, error) { return failed(r, 401, "Unauthorized"), nil })
			var log record
			follow(t, "none", apiserver.Options{Config: &tt.config, Logger: log.logger()})
			log.waitFor(t, tt.want, 1)
			if log.count("secret") != 0 {
				t.Errorf("the log has the secret:\n%s", log.text.String())
			}
		})
	}
}

// TestServiceCIDRsAskedSoon says that after ServiceCIDRs were read, a refusal is
// again believed for half a minute only, as the first one.
func TestServiceCIDRsAskedSoon(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var server moody
		refuse := says(403, "Forbidden").of("servicecidrs")
		server.become(refuse)
		var log record
		_, stop := run(t, server.serve, &log)
		time.Sleep(time.Hour)
		server.become(well)
		time.Sleep(time.Hour)
		server.become(refuse)
		time.Sleep(longestPause + 31*time.Second)
		if n := server.requests("servicecidrs"); n != 3 {
			t.Errorf("%d requests, want a watch, and a stream and a list after 30 seconds", n)
		}
		stop()
	})
}
