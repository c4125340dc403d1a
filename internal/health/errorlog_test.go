package health_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"fairlead.io/fairlead/internal/health"
)

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestErrorLogLimitsRepeats checks that messages of net/http go to the logger, each only once
// even if many clients with different addresses cause it.
func TestErrorLogLimitsRepeats(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var log lockedBuffer
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- health.Serve(ctx, health.ServeOptions{
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/panic" {
					panic("from the handler")
				}
				w.WriteHeader(http.StatusOK)
				w.WriteHeader(http.StatusOK) // net/http logs this
			}),
			Listen: func(context.Context, string, string) (net.Listener, error) { return listener, nil },
			Logger: slog.New(slog.NewJSONHandler(&log, nil)),
		})
	}()
	for range 20 {
		for _, path := range []string{"/panic", "/"} {
			conn, err := net.Dial("tcp", listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{} // by level
	for line := range strings.Lines(log.String()) {
		var record struct{ Level, Error string }
		if err := json.Unmarshal([]byte(line), &record); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		texts[record.Level] += record.Error + "\n"
	}
	for level, want := range map[string][]string{
		"ERROR": {"from the handler"}, "WARN": {"superfluous"},
	} {
		for _, text := range want {
			if got := strings.Count(texts[level], text); got != 1 {
				t.Errorf("%s: %q is logged %d times, want once:\n%s", level, text, got, texts[level])
			}
		}
	}
}
