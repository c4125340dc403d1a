package health

import (
	"encoding/json"
	"net/http"
	"time"
)

// DefaultTimeout is the longest time that work may wait on a healthy node: twice
// kube-proxy's sync period.
const DefaultTimeout = 60 * time.Second

// Progress says how far the programming of the kernel has come.
type Progress struct {
	// LastSuccess is when the kernel was last known to be as wanted; zero if it
	// never was.
	LastSuccess time.Time
	// WaitingSince is when the oldest work came up that has not succeeded yet;
	// zero if there is none.
	WaitingSince time.Time
}

// ProxyOptions are what a [Proxy] depends on. All functions are called from any
// goroutine and must not block.
type ProxyOptions struct {
	// Progress is asked at each request.
	Progress func() Progress
	// Eligible says whether load balancers should use this node, as far as its
	// Node object goes.
	Eligible func() bool
	// Answered, if not nil, is told the path and the HTTP status of each answer.
	OnResponse func(path string, status int)
	// Timeout is [DefaultTimeout] if it is zero.
	Timeout time.Duration
}

// Proxy is the health of the programming on this node. Its methods may be called
// from any goroutine.
type Proxy struct{ options ProxyOptions }

// NewProxy returns the health of a node.
func NewProxy(options ProxyOptions) *Proxy {
	if options.Timeout == 0 {
		options.Timeout = DefaultTimeout
	}
	return &Proxy{options}
}

// Healthy reports whether nothing has waited for too long.
func (p *Proxy) Healthy() bool {
	return p.healthy(p.options.Progress(), time.Now())
}

func (p *Proxy) healthy(progress Progress, now time.Time) bool {
	return progress.WaitingSince.IsZero() || now.Sub(progress.WaitingSince) < p.options.Timeout
}

// healthResponse is what /healthz and /livez say, with the fields and the order of
// kube-proxy's.
type healthResponse struct {
	LastUpdated  time.Time               `json:"lastUpdated"`
	CurrentTime  time.Time               `json:"currentTime"`
	NodeEligible *bool                   `json:"nodeEligible,omitempty"`
	Healthy      bool                    `json:"healthy"`
	Status       map[string]familyStatus `json:"status,omitempty"`
}

type familyStatus struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// Handler answers /healthz, which is 200 if the node is healthy and eligible, and
// /livez, which is 200 if it is healthy; both are 503 otherwise. The body is a
// JSON object. Its field healthy never counts eligibility; lastUpdated is now
// where the status is 200, and the last success otherwise. Both IP families are
// programmed together, so that they always have the same status.
func (p *Proxy) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		eligible := p.options.Eligible()
		p.respond(w, "/healthz", &eligible)
	})
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		p.respond(w, "/livez", nil)
	})
	return mux
}

func (p *Proxy) respond(w http.ResponseWriter, path string, eligible *bool) {
	progress, now := p.options.Progress(), time.Now()
	a := healthResponse{
		LastUpdated: progress.LastSuccess, CurrentTime: now,
		NodeEligible: eligible, Healthy: p.healthy(progress, now),
	}
	if !progress.LastSuccess.IsZero() {
		f := familyStatus{LastUpdated: progress.LastSuccess, Healthy: a.Healthy}
		a.Status = map[string]familyStatus{"IPv4": f, "IPv6": f}
	}
	status := http.StatusServiceUnavailable
	if a.Healthy && (eligible == nil || *eligible) {
		status = http.StatusOK
		a.LastUpdated = now
	}
	if p.options.OnResponse != nil {
		p.options.OnResponse(path, status)
	}
	body, err := json.Marshal(a)
	if err != nil { // times beyond the year 9999
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	writeJSON(w, status, body)
}

func writeJSON(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client has gone
}
