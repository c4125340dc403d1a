package statuspage

import (
	"fmt"
	"net/http"
	"time"
)

// Times of the stream of changes.
const (
	// checkPeriod is the time between looks for a change.
	checkPeriod = 100 * time.Millisecond
	// announcePeriod is the least time between two announcements.
	announcePeriod = 500 * time.Millisecond
	// refreshPeriod is the time after which the stream announces a change even if no Service has
	// changed, because the page also shows counters and ages.
	refreshPeriod = 5 * time.Second
	// writeTimeout bounds each write to a client.
	writeTimeout = 5 * time.Second
)

// version returns a number that changes when Services or the history change.
func (p *Page) version() uint64 { return p.options.ServicesVersion() + p.options.History.Version() }

// serveLive announces changes as server-sent events. The update path does not know of the
// clients: each stream compares version numbers.
func (p *Page) serveLive(w http.ResponseWriter, r *http.Request) {
	select {
	case p.streams <- struct{}{}:
		defer func() { <-p.streams }()
	default:
		w.Header().Set("Retry-After", "10")
		http.Error(w, fmt.Sprintf("there are %d open streams already: reload the page instead", maxStreams), http.StatusServiceUnavailable)
		return
	}
	control := http.NewResponseController(w)
	// The timeouts of the server are for requests that end.
	if err := control.SetReadDeadline(time.Time{}); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	ticker := time.NewTicker(checkPeriod)
	defer ticker.Stop()
	var announced uint64
	var last time.Time
	for first := true; ; first = false {
		version, now := p.version(), time.Now()
		if first || version != announced && now.Sub(last) >= announcePeriod || now.Sub(last) >= refreshPeriod {
			announced, last = version, now
			if control.SetWriteDeadline(now.Add(writeTimeout)) != nil {
				return
			}
			if _, err := fmt.Fprintf(w, "data: %d\n\n", version); err != nil || control.Flush() != nil {
				return
			}
		}
		select {
		case <-r.Context().Done():
			return
		case <-ticker.C:
		}
	}
}
