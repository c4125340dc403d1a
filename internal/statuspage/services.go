package statuspage

import (
	"cmp"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// serviceState is the state of a Kubernetes Service.
type serviceState string

// The states, from worst to best. A Service has the worst state of its ports.
const (
	failing     serviceState = "failing"      // a port is not programmed as desired
	problem     serviceState = "problem"      // a field cannot be programmed as written
	noEndpoints serviceState = "no-endpoints" // a port has no endpoints
	ready       serviceState = "ready"
)

func serviceStates() []serviceState { return []serviceState{failing, problem, noEndpoints, ready} }

// indexPeriod is the least time between two computations of the index while Services keep
// changing. indexLifetime is how long an index is kept without requests.
const (
	indexPeriod   = 500 * time.Millisecond
	indexLifetime = 30 * time.Second
)

// index contains all Services: the ones with errors and problems first, then by name.
type index struct {
	version  uint64
	built    time.Time
	services []indexed
	counts   map[serviceState]int
	ports    int
	failing  map[dataplane.Key]error
}

type indexed struct {
	*Service

	state serviceState
}

// rank orders Services that need attention first. Services without endpoints are common.
func (i indexed) rank() int {
	switch i.state {
	case failing:
		return 0
	case problem:
		return 1
	default:
		return 2
	}
}

// currentIndex returns an index that is at most indexPeriod older than the last change. It is kept
// while there are requests.
func (p *Page) currentIndex() *index {
	p.mu.Lock()
	defer p.mu.Unlock()
	version, now := p.version(), time.Now()
	if p.index == nil || p.index.version != version && now.Sub(p.index.built) >= indexPeriod {
		p.index = newIndex(p.options.Services(), p.options.Failing(), version, now)
	}
	p.lastUsed = now
	if p.forget == nil {
		p.forget = time.AfterFunc(indexLifetime, p.forgetIndex)
	}
	return p.index
}

// forgetIndex frees the index if there was no request for some time.
func (p *Page) forgetIndex() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if rest := indexLifetime - time.Since(p.lastUsed); rest > 0 {
		p.forget.Reset(rest)
		return
	}
	p.index, p.forget = nil, nil
}

func newIndex(services []Service, failingKeys map[dataplane.Key]error, version uint64, now time.Time) *index {
	x := &index{version: version, built: now, services: make([]indexed, 0, len(services)), counts: map[serviceState]int{}, failing: failingKeys}
	for i := range services {
		s := &services[i]
		slices.SortFunc(s.Ports, func(a, b *dataplane.Service) int { return a.Key.Compare(b.Key) })
		state := stateOf(s, failingKeys)
		x.counts[state]++
		x.ports += len(s.Ports)
		x.services = append(x.services, indexed{s, state})
	}
	slices.SortFunc(x.services, func(a, b indexed) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	return x
}

func stateOf(s *Service, failingKeys map[dataplane.Key]error) serviceState {
	state := ready
	if len(s.Problems) > 0 {
		state = problem
	}
	for _, port := range s.Ports {
		if len(failingKeys) > 0 && failingKeys[port.Key] != nil {
			return failing
		}
		if state == ready && len(port.Endpoints) == 0 {
			state = noEndpoints
		}
	}
	return state
}

// selection selects Services.
type selection struct {
	// query contains words that must occur in a Service's name, addresses or ports.
	query string
	// state is empty for all states.
	state serviceState
	// page starts at 1. limit is the number of Services on a page.
	page, limit int
}

// Numbers of Services on a page.
const (
	defaultLimit = 50
	maxLimit     = 1000
)

// newSelection reads a selection from the query of a URL. Invalid values count as not set.
func newSelection(query url.Values) selection {
	number := func(name string, fallback, most int) int {
		n, err := strconv.Atoi(query.Get(name))
		if err != nil || n < 1 {
			return fallback
		}
		return min(n, most)
	}
	s := selection{
		query: strings.TrimSpace(query.Get("q")), state: serviceState(query.Get("state")),
		page: number("page", 1, 1<<20), limit: number("limit", defaultLimit, maxLimit),
	}
	if !slices.Contains(serviceStates(), s.state) {
		s.state = ""
	}
	return s
}

// url returns the URL of the status page with this selection.
func (s selection) url() string {
	query := url.Values{}
	if s.query != "" {
		query.Set("q", s.query)
	}
	if s.state != "" {
		query.Set("state", string(s.state))
	}
	if s.page > 1 {
		query.Set("page", strconv.Itoa(s.page))
	}
	if s.limit != defaultLimit {
		query.Set("limit", strconv.Itoa(s.limit))
	}
	if len(query) == 0 {
		return "/"
	}
	return "/?" + query.Encode()
}

// selected contains the Services of one page of a selection.
type selected struct {
	selection

	services []indexed
	// matching is the number of Services of all pages, pages the number of pages.
	matching, pages int
	// byState counts the Services by state that match the query.
	byState map[serviceState]int
	failing map[dataplane.Key]error
}

func (x *index) find(s selection) selected {
	words := strings.Fields(strings.ToLower(s.query))
	result := selected{selection: s, byState: x.counts, failing: x.failing}
	matching := x.services
	if len(words) > 0 {
		matching, result.byState = nil, map[serviceState]int{}
		var buffer []byte
		for _, service := range x.services {
			var ok bool
			if ok, buffer = matches(service.Service, words, buffer); ok {
				matching = append(matching, service)
				result.byState[service.state]++
			}
		}
	}
	if s.state != "" {
		matching = slices.DeleteFunc(slices.Clone(matching), func(service indexed) bool { return service.state != s.state })
	}
	result.matching = len(matching)
	result.pages = max(1, (len(matching)+s.limit-1)/s.limit)
	result.page = min(s.page, result.pages)
	start := min((result.page-1)*s.limit, len(matching))
	result.services = matching[start:min(start+s.limit, len(matching))]
	return result
}

// matches reports whether a Service contains all words. It returns the buffer for the next call.
func matches(s *Service, words []string, buffer []byte) (bool, []byte) {
	buffer = append(append(append(buffer[:0], s.Namespace...), '/'), s.Name...)
	text := func() string { return string(buffer) }
	if containsAll(text(), words) {
		return true, buffer
	}
	for _, port := range s.Ports {
		buffer = append(append(buffer, ' '), port.Key.Port...)
		for _, f := range port.Frontends {
			buffer = append(append(buffer, ' '), strings.ToLower(f.String())...)
		}
		for _, endpoints := range [][]dataplane.Endpoint{port.Endpoints, port.LocalEndpoints} {
			for _, e := range endpoints {
				buffer = e.Addr.AppendTo(append(buffer, ' '))
			}
		}
	}
	return containsAll(text(), words), buffer
}

func containsAll(text string, words []string) bool {
	return !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(text, word) })
}

// serviceJSON is a Service as JSON.
type serviceJSON struct {
	Namespace string       `json:"namespace"`
	Name      string       `json:"name"`
	State     serviceState `json:"state"`
	Ports     []portJSON   `json:"ports"`
	Problems  []Problem    `json:"problems,omitempty"`
}

type portJSON struct {
	Port                  string   `json:"port,omitempty"`
	Family                string   `json:"family"`
	Kind                  string   `json:"kind"`
	Frontends             []string `json:"frontends"`
	Endpoints             []string `json:"endpoints"`
	ExternalTrafficPolicy string   `json:"externalTrafficPolicy,omitempty"`
	LocalEndpoints        []string `json:"localEndpoints,omitempty"`
	SourceRanges          []string `json:"sourceRanges,omitempty"`
	Affinity              string   `json:"affinity,omitempty"`
	Scheduler             string   `json:"scheduler,omitempty"`
	Error                 string   `json:"error,omitempty"`
}

type serviceListJSON struct {
	Matching int           `json:"matching"`
	Page     int           `json:"page"`
	Pages    int           `json:"pages"`
	Services []serviceJSON `json:"services"`
}

// serviceList returns the Services that the query of a request selects.
func (p *Page) serviceList(r *http.Request) serviceListJSON {
	found := p.currentIndex().find(newSelection(r.URL.Query()))
	list := serviceListJSON{Matching: found.matching, Page: found.page, Pages: found.pages, Services: []serviceJSON{}}
	for _, s := range found.services {
		service := serviceJSON{Namespace: s.Namespace, Name: s.Name, State: s.state, Ports: []portJSON{}, Problems: s.Problems}
		for _, port := range s.Ports {
			service.Ports = append(service.Ports, newPortJSON(port, found.failing[port.Key]))
		}
		list.Services = append(list.Services, service)
	}
	return list
}

func newPortJSON(s *dataplane.Service, err error) portJSON {
	port := portJSON{
		Port: s.Key.Port, Family: s.Key.Family.String(), Kind: s.Key.Kind.String(), Frontends: texts(s.Frontends), Endpoints: []string{},
		SourceRanges: texts(s.SourceRanges), Scheduler: s.Scheduler,
	}
	for _, e := range s.Endpoints {
		port.Endpoints = append(port.Endpoints, e.Addr.String())
	}
	if s.ExternalTrafficPolicyLocal {
		port.ExternalTrafficPolicy = "Local"
		for _, e := range s.LocalEndpoints {
			port.LocalEndpoints = append(port.LocalEndpoints, e.Addr.String())
		}
	}
	if s.Affinity > 0 {
		port.Affinity = s.Affinity.String()
	}
	if err != nil {
		port.Error = err.Error()
	}
	return port
}

func texts[T fmt.Stringer](values []T) []string {
	var list []string
	for _, v := range values {
		list = append(list, v.String())
	}
	return list
}
