package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"strings"
	"sync"
	"time"
)

const (
	// requestTimeout is the timeout of a request.
	requestTimeout = 2 * time.Second
	// requestInterval is the time between requests of a front end.
	requestInterval = 2 * time.Millisecond
)

// request is the result of one request for http://backend.
type request struct {
	from    string // name of the front end
	start   time.Time
	address netip.Addr // address of the Service that the client connected to
	pod     string     // pod that answered
	err     error
}

// load sends sequential requests from each front end until stop is called.
type load struct {
	wg      sync.WaitGroup
	stopped chan struct{}

	mu        sync.Mutex
	completed []request     // in the order of completion
	changed   chan struct{} // closed and replaced when completed grows
}

func (c *cluster) startLoad(ctx context.Context) *load {
	l := &load{stopped: make(chan struct{}), changed: make(chan struct{})}
	for _, p := range c.podsOf(frontendApp) {
		client := &http.Client{
			Timeout: requestTimeout,
			Transport: &http.Transport{
				DisableKeepAlives: true, // one request per connection
				DialContext:       c.resolver(p.Host).dial,
			},
		}
		l.wg.Go(func() { l.run(ctx, p.Name, client) })
	}
	return l
}

func (l *load) run(ctx context.Context, from string, client *http.Client) {
	for {
		r := get(ctx, client, "http://"+backendApp+"/")
		r.from = from
		if ctx.Err() != nil {
			return
		}
		l.mu.Lock()
		l.completed = append(l.completed, r)
		close(l.changed)
		l.changed = make(chan struct{})
		l.mu.Unlock()
		select {
		case <-time.After(requestInterval):
		case <-l.stopped:
			return
		}
	}
}

// get makes one request for a URL.
func get(ctx context.Context, client *http.Client, url string) request {
	r := request{start: time.Now()}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			if addr, ok := info.Conn.RemoteAddr().(*net.TCPAddr); ok {
				r.address = addr.AddrPort().Addr().Unmap()
			}
		},
	})
	r.pod, r.err = func() (string, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return "", err
		}
		resp, err := client.Do(req)
		if err != nil {
			return "", err
		}
		body, err := io.ReadAll(resp.Body)
		text := strings.TrimSpace(string(body))
		if err = errors.Join(err, resp.Body.Close()); err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, text)
		}
		return text, err
	}()
	return r
}

// stop ends the load after the requests in flight, and returns all requests.
func (l *load) stop() []request {
	close(l.stopped)
	l.wg.Wait()
	return l.completed
}

// wait blocks until n requests that started at or after since are completed, and returns the first
// n of them.
func (l *load) wait(ctx context.Context, since time.Time, n int) ([]request, error) {
	var found []request
	seen := 0
	for {
		l.mu.Lock()
		for ; seen < len(l.completed) && len(found) < n; seen++ {
			if !l.completed[seen].start.Before(since) {
				found = append(found, l.completed[seen])
			}
		}
		grown := l.changed
		l.mu.Unlock()
		if len(found) == n {
			return found, nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
