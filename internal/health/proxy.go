package health

import (
	"encoding/json"
	"net/http"
	"time"
)

// DefaultTimeout is the longest time that work may be pending on a healthy node: twice
// kube-proxy's sync period.
const DefaultTimeout = 60 * time.Second

// Progress describes how far the kernel is programmed.
type Progress struct {
	// LastSuccess is when the kernel last had the desired state; zero means never.
	LastSuccess time.Time
	// WaitingSince is when the oldest pending work arrived; zero means that no work is
	// pending.
	WaitingSince time.Time
}

// ProxyOptions configures a [Proxy]. The functions may be called from any goroutine and must
// not block.
type ProxyOptions struct {
	// Progress is called for every request.
	Progress func() Progress
	// Eligible reports whether load balancers should use this node, according to its Node
	// object.
	Eligible func() bool
	// APIServer returns the state of the connection to the API server for /healthz. Nil means
	// that there is no API server.
	APIServer func() APIServer
	// OnResponse, if not nil, is called with the path and the HTTP status of each response.
	OnResponse func(path string, status int)
	// Timeout defaults to [DefaultTimeout].
	Timeout time.Duration
}

// Proxy reports whether the node is programmed. Its methods may be called concurrently.
type Proxy struct{ options ProxyOptions }

// NewProxy returns a Proxy.
func NewProxy(options ProxyOptions) *Proxy {
	if options.Timeout == 0 {
		options.Timeout = DefaultTimeout
	}
	return &Proxy{options}
}

// Healthy reports whether no work has been pending for longer than the timeout.
func (p *Proxy) Healthy() bool {
	return p.healthy(p.options.Progress(), time.Now())
}

func (p *Proxy) healthy(progress Progress, now time.Time) bool {
	return progress.WaitingSince.IsZero() || now.Sub(progress.WaitingSince) < p.options.Timeout
}

// healthResponse is the body of /healthz and /livez, with kube-proxy's fields in kube-proxy's
// order.
type healthResponse struct {
	LastUpdated  time.Time               `json:"lastUpdated"`
	CurrentTime  time.Time               `json:"currentTime"`
	NodeEligible *bool                   `json:"nodeEligible,omitempty"`
	Healthy      bool                    `json:"healthy"`
	Status       map[string]familyStatus `json:"status,omitempty"`
	APIServer    *APIServer              `json:"apiServer,omitempty"` // Fairlead's own
}

// APIServer describes the connection to the API server. It does not affect the HTTP status,
// because programmed Services work without the API server.
type APIServer struct {
	Connected bool `json:"connected"`
	// LastResponse is when the API server last answered a request; zero means never.
	LastResponse time.Time `json:"lastResponse,omitzero"`
	// Failures lists the resources whose last request failed, with the reason.
	Failures []string `json:"failures,omitempty"`
}

type familyStatus struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// Handler serves /healthz, which returns 200 if the node is healthy and eligible, /livez, which
// returns 200 if it is healthy, and /readyz, which returns 200 if it is healthy and the kernel has
// had the desired state at least once. Otherwise they return 503. The body is a JSON object.
// kube-proxy has no /readyz and returns 404, so a probe of this path fails while kube-proxy
// listens on the address.
// Its field healthy does not depend on eligibility. lastUpdated is the current time if the
// status is 200, and the last success otherwise. The body of /healthz also describes the
// connection to the API server. Both IP families are programmed together, so
// they always have the same status.
func (p *Proxy) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		eligible := p.options.Eligible()
		var server *APIServer
		if p.options.APIServer != nil {
			s := p.options.APIServer()
			server = &s
		}
		p.respond(w, "/healthz", p.options.Progress(), &eligible, server)
	})
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		p.respond(w, "/livez", p.options.Progress(), nil, nil)
	})
	mux.HandleFunc(ReadyPath, func(w http.ResponseWriter, _ *http.Request) {
		progress := p.options.Progress()
		w.Header().Set(ReadyHeader, "fairlead")
		if progress.LastSuccess.IsZero() {
			progress.WaitingSince = time.Unix(0, 0) // nothing is programmed yet
		}
		p.respond(w, ReadyPath, progress, nil, nil)
	})
	return mux
}

// ReadyPath is the path that reports whether this node is programmed. ReadyHeader is a header that
// every response of this path has, so that clients can recognize Fairlead.
const (
	ReadyPath   = "/readyz"
	ReadyHeader = "Service-Proxy"
)

func (p *Proxy) respond(w http.ResponseWriter, path string, progress Progress, eligible *bool, server *APIServer) {
	now := time.Now()
	a := healthResponse{
		LastUpdated: progress.LastSuccess, CurrentTime: now,
		NodeEligible: eligible, Healthy: p.healthy(progress, now), APIServer: server,
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
	if err != nil { // a time after the year 9999
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	writeJSON(w, status, body)
}

func writeJSON(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(body) // fails only if the client is gone
}
