package compare

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"fairlead.io/fairlead/bench/cluster"
)

// TestUntilEvent checks that an update counts from the server's write to the watch.
func TestUntilEvent(t *testing.T) {
	t.Parallel()
	f, err := newLocalServerFactory(newContent(1, 1))
	if err != nil {
		t.Fatal(err)
	}
	s, err := f.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	slice := cluster.NewService(0, 1)
	if got := s.update(t.Context(), slice.Slice()).untilEvent(); got != 0 {
		t.Errorf("without a watch, the event was sent after %s", got)
	}
	web := httptest.NewServer(s.(*localServer).api)
	defer web.Close()
	const watch = "/apis/discovery.k8s.io/v1/endpointslices?watch=true&sendInitialEvents=true"
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, web.URL+watch, nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := web.Client().Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	events := json.NewDecoder(answer.Body)
	awaitEvent := func(want string) {
		t.Helper()
		for event := (struct{ Type string }{}); event.Type != want; {
			if err := events.Decode(&event); err != nil {
				t.Fatalf("wait for %s: %v", want, err)
			}
		}
	}
	awaitEvent("BOOKMARK")
	r := s.update(t.Context(), slice.Slice())
	awaitEvent("MODIFIED")
	if got, limit := r.untilEvent(), time.Since(r.sentAt); got <= 0 || got > limit {
		t.Errorf("the event was sent %s after the request, want a time up to %s", got, limit)
	}
}
