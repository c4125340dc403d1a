package health_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/health"
)

func get(t *testing.T, handler http.Handler, path string) *httptest.ResponseRecorder {
	t.Helper()
	response := httptest.NewRecorder()
	handler.ServeHTTP(response, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
	return response
}

func TestProxyStatus(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		// Time since the last success and since work is pending; negative means never.
		success, waiting time.Duration
		eligible         bool
		healthz, livez   int
		readyz           int
	}{
		{"before the first success", -1, -1, true, 200, 200, 503},
		{"just in time for the first success", -1, time.Minute - 1, true, 200, 200, 503},
		{"late for the first success", -1, time.Minute, true, 503, 503, 503},
		{"before the first success, not eligible", -1, -1, false, 503, 200, 503},
		{"idle for an hour", time.Hour, -1, true, 200, 200, 200},
		{"just in time", time.Hour, time.Minute - 1, true, 200, 200, 200},
		{"late", time.Hour, time.Minute, true, 503, 503, 503},
		{"late in spite of successes in between", time.Second, time.Hour, true, 503, 503, 503},
		{"not eligible", time.Second, -1, false, 503, 200, 200},
		{"late and not eligible", time.Hour, time.Hour, false, 503, 503, 503},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ago := func(d time.Duration) time.Time {
					if d < 0 {
						return time.Time{}
					}
					return time.Now().Add(-d)
				}
				var responses []string
				proxy := health.NewProxy(health.ProxyOptions{
					Progress: func() health.Progress {
						return health.Progress{LastSuccess: ago(test.success), WaitingSince: ago(test.waiting)}
					},
					Eligible:   func() bool { return test.eligible },
					OnResponse: func(path string, status int) { responses = append(responses, fmt.Sprint(path, " ", status)) },
				})
				if got, want := proxy.Healthy(), test.livez == 200; got != want {
					t.Errorf("healthy: %t, want %t", got, want)
				}
				for path, want := range map[string]int{"/healthz": test.healthz, "/livez": test.livez, "/readyz": test.readyz, "/": 404, "/healthz/x": 404} {
					if got := get(t, proxy.Handler(), path); got.Code != want {
						t.Errorf("%s: status %d, want %d", path, got.Code, want)
					}
				}
				want := map[string]bool{fmt.Sprint("/healthz ", test.healthz): true, fmt.Sprint("/livez ", test.livez): true, fmt.Sprint("/readyz ", test.readyz): true}
				got := map[string]bool{}
				for _, a := range responses {
					got[a] = true
				}
				if diff := cmp.Diff(want, got); diff != "" || len(responses) != 3 {
					t.Errorf("OnResponse got %v (-want +got):\n%s", responses, diff)
				}
			})
		})
	}
}

// TestAPIServerStatus checks that /healthz describes the connection to the API server, and that the
// connection does not affect the status.
func TestAPIServerStatus(t *testing.T) {
	t.Parallel()
	connection := health.APIServer{Failures: []string{"services: unreachable"}}
	proxy := health.NewProxy(health.ProxyOptions{
		Progress:  func() health.Progress { return health.Progress{} },
		Eligible:  func() bool { return true },
		APIServer: func() health.APIServer { return connection },
	})
	check := func(path, want string, contains bool) {
		t.Helper()
		got := get(t, proxy.Handler(), path)
		if got.Code != http.StatusOK || strings.Contains(got.Body.String(), want) != contains {
			t.Errorf("%s: status %d, body %s, want %s (%v)", path, got.Code, got.Body, want, contains)
		}
	}
	check("/healthz", `"apiServer":{"connected":false,"failures":["services: unreachable"]}`, true)
	check("/livez", "apiServer", false)
	connection = health.APIServer{Connected: true, LastResponse: time.Unix(1, 0).UTC()}
	check("/healthz", `"apiServer":{"connected":true,"lastResponse":"1970-01-01T00:00:01Z"}`, true)
}

// TestProxyBodies compares the bodies, including the order of fields, with kube-proxy's.
func TestProxyBodies(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var progress health.Progress
		eligible := true
		proxy := health.NewProxy(health.ProxyOptions{
			Progress: func() health.Progress { return progress },
			Eligible: func() bool { return eligible },
		})
		stamp := func(at time.Time) string {
			text, err := json.Marshal(at)
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		}
		check := func(path, want string) {
			t.Helper()
			got := get(t, proxy.Handler(), path)
			if diff := cmp.Diff(want, got.Body.String()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", path, diff)
			}
			wantHeader := http.Header{"Content-Type": {"application/json"}, "X-Content-Type-Options": {"nosniff"}}
			if diff := cmp.Diff(wantHeader, got.Header()); diff != "" {
				t.Errorf("%s: header (-want +got):\n%s", path, diff)
			}
		}
		now := stamp(time.Now())
		check("/healthz", `{"lastUpdated":`+now+`,"currentTime":`+now+`,"nodeEligible":true,"healthy":true}`)
		check("/livez", `{"lastUpdated":`+now+`,"currentTime":`+now+`,"healthy":true}`)

		success := stamp(time.Now())
		progress.LastSuccess = time.Now()
		time.Sleep(time.Hour)
		now = stamp(time.Now())
		status := `"status":{"IPv4":{"lastUpdated":` + success + `,"healthy":true},"IPv6":{"lastUpdated":` + success + `,"healthy":true}}}`
		check("/healthz", `{"lastUpdated":`+now+`,"currentTime":`+now+`,"nodeEligible":true,"healthy":true,`+status)
		check("/livez", `{"lastUpdated":`+now+`,"currentTime":`+now+`,"healthy":true,`+status)

		// Eligibility does not affect the field healthy.
		eligible = false
		check("/healthz", `{"lastUpdated":`+success+`,"currentTime":`+now+`,"nodeEligible":false,"healthy":true,`+status)
		eligible = true

		progress.WaitingSince = time.Now()
		time.Sleep(time.Hour)
		now = stamp(time.Now())
		status = `"status":{"IPv4":{"lastUpdated":` + success + `,"healthy":false},"IPv6":{"lastUpdated":` + success + `,"healthy":false}}}`
		check("/healthz", `{"lastUpdated":`+success+`,"currentTime":`+now+`,"nodeEligible":true,"healthy":false,`+status)
		check("/livez", `{"lastUpdated":`+success+`,"currentTime":`+now+`,"healthy":false,`+status)
	})
}
