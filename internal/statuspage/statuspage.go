// Package statuspage serves a read-only page with the state of the node: its Services, the last
// changes, failures, repairs and refused packets. The same data is available as JSON.
//
// The page needs no script. With its script, it follows changes: the server announces that
// something has changed, at most twice a second, and the script fetches the page again.
//
// Without requests, the page computes and stores nothing. A request with 10,000 Services
// takes milliseconds, because the server selects the rows.
package statuspage

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"path"
	"strings"
	stdsync "sync"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/history"
)

// Options are the options of [New]. Functions may be called from several goroutines.
type Options struct {
	// Node is the name of the node, Source describes where objects come from.
	Node, Mode, Version, Source string
	// State returns the state of the node.
	State func() State
	// Services returns all Services, in any order. The result is shared and must not change.
	Services func() []Service
	// ServicesVersion returns a number that changes when the result of Services may have changed.
	ServicesVersion func() uint64
	// Failing returns the keys that are not programmed as desired.
	Failing func() map[dataplane.Key]error
	// RefusedPackets returns the kernel's counters. Nil means that the kernel does not count
	// refused packets.
	RefusedPackets func() ([]RefusedPackets, error)
	History        *history.Recorder
}

// Service is a Kubernetes Service.
type Service struct {
	Namespace, Name string
	// Ports contains the desired Services of its ports, families and kinds of frontends.
	Ports []*dataplane.Service
	// Problems contains the fields that cannot be programmed as written.
	Problems []Problem
}

// Problem describes a field that cannot be programmed as written.
type Problem struct {
	// EndpointSlice is the object with the field, empty for the Service.
	EndpointSlice string `json:"endpointSlice,omitempty"`
	Field         string `json:"field"`
	Message       string `json:"message"`
}

// State is the state of the node.
type State struct {
	// Healthy reports that no work is pending for too long. Standby reports that another instance
	// programs the node.
	Healthy, Standby bool
	// LastSuccess is the time of the last successful commit, PendingSince of the oldest change that
	// is not programmed. Zero means none.
	LastSuccess, PendingSince time.Time
	// Err is the error of the last commit if it failed as a whole.
	Err error
	// APIServer is nil without an API server.
	APIServer *APIServer
	// OtherProxies are the rules of other Service proxies.
	OtherProxies []OtherProxy
	// SettingProblems are kernel settings of the node that break Services.
	SettingProblems []SettingProblem
	// NotListening contains the servers whose address another process holds.
	NotListening []string
}

// APIServer describes the connection to the API server.
type APIServer struct {
	Connected    bool      `json:"connected"`
	LastResponse time.Time `json:"lastResponse,omitzero"`
	Failures     []string  `json:"failures,omitempty"`
}

// OtherProxy describes rules of another Service proxy.
type OtherProxy struct {
	Mode   string `json:"mode"`
	Rules  string `json:"rules"`
	Effect string `json:"effect"`
}

// SettingProblem is a kernel setting that breaks Services.
type SettingProblem struct {
	Setting     string `json:"setting"`
	Consequence string `json:"consequence"`
	Fix         string `json:"fix"`
}

// RefusedPackets counts packets that the kernel dropped or rejected for one reason.
type RefusedPackets struct {
	Family  dataplane.Family
	Verdict string
	Reason  string
	Packets uint64
}

// Page serves the status page. Its methods are safe for concurrent use.
type Page struct {
	options Options
	started time.Time
	streams chan struct{} // has a value for each open stream

	mu       stdsync.Mutex
	index    *index // nil if there was no request for some time
	lastUsed time.Time
	forget   *time.Timer
}

// maxStreams is the maximum number of clients that follow changes. Others poll.
const maxStreams = 16

// New returns a Page.
func New(options Options) *Page {
	return &Page{options: options, started: time.Now(), streams: make(chan struct{}, maxStreams)}
}

//go:embed page.css page.js icon.svg
var assets embed.FS

// contentSecurityPolicy allows only the page's own style sheet, script, icon and requests.
const contentSecurityPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// Handler returns the handler of the page and of the JSON below /api/. It answers only GET and
// HEAD, and only if the client names the server by an IP address or as localhost. A website that
// resolves its own name to this node (DNS rebinding) therefore cannot read the page.
func (p *Page) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", p.servePage)
	mux.HandleFunc("GET /live", p.serveLive)
	mux.HandleFunc("GET /api/status", p.serveJSON(func(*http.Request) (any, error) { return p.status(), nil }))
	mux.HandleFunc("GET /api/services", p.serveJSON(func(r *http.Request) (any, error) { return p.serviceList(r), nil }))
	mux.HandleFunc("GET /api/changes", p.serveJSON(func(*http.Request) (any, error) { return p.changeList(0), nil }))
	mux.HandleFunc("GET /api/events", p.serveJSON(func(*http.Request) (any, error) { return p.eventList(0), nil }))
	mux.HandleFunc("GET /api/refused-packets", p.serveJSON(func(*http.Request) (any, error) { return p.refusedList() }))
	for _, name := range []string{"page.css", "page.js", "icon.svg"} {
		mux.HandleFunc("GET /"+name, serveAsset(name))
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Content-Security-Policy", contentSecurityPolicy)
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Referrer-Policy", "no-referrer")
		header.Set("Cross-Origin-Resource-Policy", "same-origin")
		header.Set("Cache-Control", "no-store")
		switch {
		case !isAllowedHost(r.Host):
			http.Error(w, "the host of the URL must be an IP address or localhost", http.StatusMisdirectedRequest)
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			header.Set("Allow", "GET, HEAD")
			http.Error(w, "the status page is read-only", http.StatusMethodNotAllowed)
		default:
			mux.ServeHTTP(w, r)
		}
	})
}

// isAllowedHost reports whether a Host header is localhost or an IP address, with or without a
// port.
func isAllowedHost(host string) bool {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	}
	if strings.EqualFold(name, "localhost") {
		return true
	}
	_, err = netip.ParseAddr(name)
	return err == nil
}

// serveAsset serves an embedded file.
func serveAsset(name string) http.HandlerFunc {
	content, err := assets.ReadFile(name)
	sum := sha256.Sum256(content)
	tag := `"` + hex.EncodeToString(sum[:8]) + `"`
	return func(w http.ResponseWriter, r *http.Request) {
		if err != nil { // the file is embedded
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Cache-Control", "no-cache")
		w.Header().Set("ETag", tag)
		w.Header().Set("Content-Type", mime.TypeByExtension(path.Ext(name)))
		if r.Header.Get("If-None-Match") == tag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		_, _ = w.Write(content) // fails only if the client has disconnected
	}
}

// serveJSON returns a handler that writes the result of read.
func (p *Page) serveJSON(read func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		value, err := read(r)
		var body []byte
		if err == nil {
			body, err = json.MarshalIndent(value, "", "  ")
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(append(body, '\n')) // fails only if the client has disconnected
	}
}
