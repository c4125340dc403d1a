// Package zpages serves the debugging pages that Kubernetes components have: /healthz with one
// check, /configz, /statusz, /flagz and /debug/flags/v. Paths, formats and content negotiation are
// kube-proxy's (k8s.io/apiserver/pkg/server/statusz and flagz, KEP-4827 and KEP-4828).
package zpages

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Options describes the program. Functions may be called from any goroutine.
type Options struct {
	// Component is the name of the program.
	Component string
	// Version is the program's version, and KubernetesVersion the Kubernetes release that it
	// corresponds to, such as v1.37.2.
	Version, KubernetesVersion string
	// Flags has the values of all flags.
	Flags map[string]string
	// Config returns the configuration as JSON, by API group. Nil disables /configz.
	Config func() (map[string]json.RawMessage, error)
	// SetVerbosity sets the verbosity of the log, like kube-proxy's flag --v. Nil disables
	// /debug/flags.
	SetVerbosity func(v uint64)
	// OnHealthCheck is called with the name of each check that /healthz has run.
	OnHealthCheck func(name string)
}

// pages serves the pages of one program.
type pages struct {
	Options

	started time.Time
}

// Install adds the pages to mux. paths lists the other paths that /statusz names.
func Install(mux *http.ServeMux, options Options, paths ...string) {
	p := &pages{Options: options, started: time.Now()}
	mux.HandleFunc("/healthz", p.healthz)
	mux.HandleFunc("/healthz/ping", func(w http.ResponseWriter, _ *http.Request) {
		p.OnHealthCheck(ping)
		writeText(w, http.StatusOK, "ok")
	})
	paths = append(slices.Clone(paths), "/flagz", "/healthz")
	if p.Config != nil {
		mux.HandleFunc("/configz", p.configz)
		paths = append(paths, "/configz")
	}
	slices.Sort(paths)
	mux.Handle("/statusz", structured{kind: "Statusz", text: func() string { return p.statuszText(paths) }, fields: func() map[string]any {
		return p.statusz(paths)
	}, component: p.Component})
	mux.Handle("/flagz", structured{kind: "Flagz", text: p.flagzText, fields: func() map[string]any {
		return map[string]any{"flags": p.Flags}
	}, component: p.Component})
	if p.SetVerbosity != nil {
		mux.HandleFunc("/debug/flags", flagIndex)
		mux.HandleFunc("/debug/flags/", flagIndex)
		mux.HandleFunc("/debug/flags/v", p.verbosity)
	}
}

// ping is the only check of /healthz. It succeeds if the program answers.
const ping = "ping"

// healthz answers "ok", or lists the checks if the query has verbose.
func (p *pages) healthz(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	list := "[+]ping ok\n"
	excluded := query["exclude"]
	if slices.Contains(excluded, ping) {
		list = "[+]ping excluded: ok\n"
	} else {
		p.OnHealthCheck(ping)
	}
	unknown := slices.DeleteFunc(slices.Clone(excluded), func(name string) bool { return name == ping })
	if len(unknown) > 0 {
		list += fmt.Sprintf("warn: some health checks cannot be excluded: no matches for %q\n", unknown)
	}
	text := "ok"
	if query.Has("verbose") {
		text = list + "healthz check passed\n"
	}
	writeText(w, http.StatusOK, text)
}

func writeText(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text) // fails only if the client has disconnected
}

func (p *pages) configz(w http.ResponseWriter, _ *http.Request) {
	config, err := p.Config()
	var body []byte
	if err == nil {
		body, err = json.Marshal(config)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(body) // fails only if the client has disconnected
}

// header begins the text of /statusz and /flagz.
func (p *pages) header(page string) string {
	return fmt.Sprintf("\n%s %s\nWarning: This endpoint is not meant to be machine parseable, has no formatting compatibility guarantees "+
		"and is for debugging purposes only.\n", p.Component, page)
}

// minorRelease returns the Kubernetes release as MAJOR.MINOR.
func (p *pages) minorRelease() string {
	parts := strings.Split(strings.TrimPrefix(p.KubernetesVersion, "v"), ".")
	return strings.Join(parts[:min(2, len(parts))], ".")
}

func (p *pages) uptime() int64 { return int64(time.Since(p.started) / time.Second) }

func (p *pages) statuszText(paths []string) string {
	const minute, hour = 60, 3600
	up := p.uptime()
	return p.header("statusz") + fmt.Sprintf("\nStarted: %s\nUp: %d hr %02d min %02d sec\nGo version: %s\nBinary version: %s\nEmulation version: %s\nPaths: %s\n",
		p.started.Format(time.UnixDate), up/hour, up/minute%minute, up%minute, runtime.Version(), p.Version, p.minorRelease(), strings.Join(paths, " "))
}

func (p *pages) statusz(paths []string) map[string]any {
	return map[string]any{
		"startTime": p.started.UTC().Format(time.RFC3339), "uptimeSeconds": p.uptime(), "goVersion": runtime.Version(),
		"binaryVersion": p.Version, "emulationVersion": p.minorRelease(), "paths": paths,
	}
}

func (p *pages) flagzText() string {
	var text strings.Builder
	text.WriteString(p.header("flagz"))
	for _, name := range slices.Sorted(maps.Keys(p.Flags)) {
		_, _ = fmt.Fprintf(&text, "%s=%s\n", name, p.Flags[name]) // writing to a Builder cannot fail
	}
	return text.String()
}

// flagIndex lists the flags below /debug/flags.
func flagIndex(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = io.WriteString(w, "<html>\n<head>\n<title>/debug/flags/</title>\n</head>\n<body>\n/debug/flags/<br>\n<br>\nflags:<br>\n<table>\n"+
		"<tr>v<br>\n</table>\n<br>\nfull flags configurable<br>\n</body>\n</html>\n") // fails only if the client has disconnected
}

// verbosity sets the verbosity of the log to the body of a PUT request.
func (p *pages) verbosity(w http.ResponseWriter, r *http.Request) {
	const maxBytes = 64
	answer := func(status int, text string) {
		w.Header().Set("Content-Type", "text/plain")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, text+"\n") // fails only if the client has disconnected
	}
	if r.Method != http.MethodPut {
		answer(http.StatusNotAcceptable, "unsupported http method")
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBytes))
	if err != nil {
		answer(http.StatusBadRequest, "error reading request body: "+err.Error())
		return
	}
	v, err := strconv.ParseUint(string(body), 10, 31)
	if err != nil {
		answer(http.StatusBadRequest, err.Error())
		return
	}
	p.SetVerbosity(v)
	answer(http.StatusOK, "successfully set klog.logging.verbosity to "+string(body))
}
