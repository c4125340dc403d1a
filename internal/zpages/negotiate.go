package zpages

import (
	"cmp"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// group is the API group of the structured form of /statusz and /flagz.
const group = "config.k8s.io"

// structured serves a page as text, or as an object of the API group if the client asks for it.
type structured struct {
	kind, component string
	text            func() string
	// fields returns the fields of the object except its type and metadata.
	fields func() map[string]any
}

// accepted is a clause of an Accept header.
type accepted struct {
	mediaType string
	params    map[string]string
	quality   float64
}

// parseAccept returns the clauses of an Accept header, the preferred one first.
func parseAccept(header string) []accepted {
	var clauses []accepted
	for text := range strings.SplitSeq(header, ",") {
		mediaType, params, err := mime.ParseMediaType(text)
		if err != nil {
			continue
		}
		quality := 1.0
		if q, err := strconv.ParseFloat(params["q"], 64); err == nil {
			quality = q
		}
		clauses = append(clauses, accepted{mediaType, params, quality})
	}
	slices.SortStableFunc(clauses, func(a, b accepted) int { return cmp.Compare(b.quality, a.quality) })
	return clauses
}

// ServeHTTP implements [http.Handler].
func (s structured) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	header := r.Header.Get("Accept")
	if strings.TrimSpace(header) == "" {
		s.serveText(w)
		return
	}
	for _, a := range parseAccept(header) {
		_, typed := a.params["as"]
		switch {
		case !typed && (a.mediaType == "text/plain" || a.mediaType == "text/*" || a.mediaType == "*/*"):
			s.serveText(w)
			return
		case !s.names(a.params):
		case a.mediaType == "application/json" || a.mediaType == "application/*" || a.mediaType == "*/*":
			s.serveObject(w, "application/json", a.params["v"], marshalJSON)
			return
		case a.mediaType == "application/yaml":
			s.serveObject(w, "application/yaml", a.params["v"], yaml.Marshal)
			return
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusNotAcceptable)
	// Writing fails only if the client has disconnected.
	_, _ = fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":%q,"reason":"NotAcceptable","code":406}`+"\n",
		"only the following media types are accepted: application/json, application/yaml, text/plain")
}

// names reports whether the parameters of a media type name the object in a version that exists.
func (s structured) names(params map[string]string) bool {
	return params["g"] == group && params["as"] == s.kind && (params["v"] == "v1beta1" || params["v"] == "v1alpha1")
}

func (s structured) serveText(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte(s.text())) // fails only if the client has disconnected
}

func marshalJSON(object any) ([]byte, error) {
	text, err := json.Marshal(object)
	return append(text, '\n'), err
}

func (s structured) serveObject(w http.ResponseWriter, mediaType, version string, marshal func(any) ([]byte, error)) {
	object := s.fields()
	object["kind"], object["apiVersion"] = s.kind, group+"/"+version
	object["metadata"] = map[string]any{"name": s.component}
	body, err := marshal(object)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", fmt.Sprintf("%s;g=%s;v=%s;as=%s", mediaType, group, version, s.kind))
	if version == "v1alpha1" {
		w.Header().Set("Warning", fmt.Sprintf(`299 - "This version of the %s endpoint is deprecated. Please use a newer version."`, strings.ToLower(s.kind)))
	}
	_, _ = w.Write(body) // fails only if the client has disconnected
}
