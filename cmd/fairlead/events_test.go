package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	eventsv1 "k8s.io/api/events/v1"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// eventRecorder records the Events that an API server receives.
type eventRecorder struct {
	mu     sync.Mutex
	events []eventsv1.Event
	errors []error
}

// wrap returns a handler that records Events in JSON and passes all requests on.
func (r *eventRecorder) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		if request.Method == http.MethodPost {
			var e eventsv1.Event
			body, err := io.ReadAll(request.Body)
			if err == nil {
				err = json.Unmarshal(body, &e)
			}
			r.mu.Lock()
			if r.events = append(r.events, e); err != nil {
				r.errors = append(r.errors, err)
			}
			r.mu.Unlock()
			request.Body = io.NopCloser(bytes.NewReader(body))
		}
		next.ServeHTTP(w, request)
	})
}

// check returns an error unless there is exactly one Event with each reason, and its note contains
// the text.
func (r *eventRecorder) check(notes map[string]string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	count, names := map[string]int{}, map[string]bool{}
	for _, e := range r.events {
		// A request that the end of the program interrupts is repeated with the same name.
		if !names[e.Name] {
			count[e.Reason]++
		}
		names[e.Name] = true
		want, ok := notes[e.Reason]
		if !ok || !strings.Contains(e.Note, want) || e.Regarding.Kind != "Node" || e.Regarding.Name != "node-a" {
			return fmt.Errorf("unexpected Event %s about %s %s: %s", e.Reason, e.Regarding.Kind, e.Regarding.Name, e.Note)
		}
	}
	for reason := range notes {
		if count[reason] != 1 {
			return fmt.Errorf("%d Events %s of %v, want 1", count[reason], reason, count)
		}
	}
	if len(r.errors) > 0 {
		return fmt.Errorf("Events that are no JSON: %v", r.errors)
	}
	return nil
}

// TestNodeEvents checks the Events about the Node: the replaced mode, and servers that cannot listen.
func TestNodeEvents(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	var recorder eventRecorder
	kubeconfig := n.serveAPIWith("a", recorder.wrap)
	args := []string{
		"run", "--kubeconfig=" + kubeconfig, "--kube-api-content-type=application/json", "--hostname-override=node-a", "--log-format=json",
		"--proxy-mode=iptables",
	}
	for i, server := range []string{"healthz", "metrics"} {
		address := netip.AddrPortFrom(n.Node.IPv4, uint16(9000+i))
		taken, err := n.Node.Listen(t.Context(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		args = append(args, "--"+server+"-bind-address="+address.String())
	}
	want := map[string]string{
		"Starting":                        "fairlead programs the Services of this node",
		"ProxyModeReplaced":               "--proxy-mode is iptables. Fairlead runs in mode nft with the defaults of the iptables mode",
		"FailedToStartProxierHealthcheck": "--healthz-bind-address: listen on 192.0.2.1:9000: ",
		"FailedToStartMetricServer":       "--metrics-bind-address: listen on 192.0.2.1:9001: ",
	}
	n.program = n.start(nil, args...)
	agenttest.Eventually(t, func() error { return recorder.check(want) })
	n.program.awaitLog(func(r record) bool { return r.Level == "WARN" && r.Msg == "kube-proxy's mode iptables is replaced" })
	n.stop()
	if err := recorder.check(want); err != nil {
		t.Error(err)
	}

	// The program sends the Event before it exits because of the same error.
	recorder.mu.Lock()
	recorder.events = nil
	recorder.mu.Unlock()
	code, log := n.runOnce(nil, append(args, "--bind-address-hard-fail", "--metrics-bind-address=127.0.0.1")...)
	if code != 1 || !strings.Contains(log, "fairlead: --healthz-bind-address: listen on 192.0.2.1:9000: ") {
		t.Errorf("exit code %d, log:\n%s\nwant 1 and the address", code, log)
	}
	recorder.mu.Lock()
	defer recorder.mu.Unlock()
	found := false
	for _, e := range recorder.events {
		found = found || e.Reason == "FailedToStartProxierHealthcheck"
	}
	if !found {
		t.Errorf("no Event FailedToStartProxierHealthcheck before the exit, only %v", recorder.events)
	}
}
