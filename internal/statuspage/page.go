package statuspage

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	g "maragu.dev/gomponents"
	h "maragu.dev/gomponents/html"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/history"
)

// Numbers of rows on the page. The JSON has all of them.
const (
	shownChanges   = 10
	shownEvents    = 5
	shownEndpoints = 100
	shownProblems  = 50
)

// servePage writes the page. The script fetches it again and replaces the elements with the
// attribute data-live.
func (p *Page) servePage(w http.ResponseWriter, r *http.Request) {
	found := p.currentIndex().find(newSelection(r.URL.Query()))
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_ = p.document(found).Render(w) // fails only if the client has disconnected
}

func (p *Page) document(found selected) g.Node {
	status := p.status()
	return h.Doctype(h.HTML(
		h.Lang("en"),
		h.Head(
			h.Meta(h.Charset("utf-8")),
			h.Meta(h.Name("viewport"), h.Content("width=device-width, initial-scale=1")),
			h.Meta(h.Name("color-scheme"), h.Content("light dark")),
			h.TitleEl(g.Text("Fairlead on "+p.options.Node)),
			h.Link(h.Rel("icon"), h.Href("/icon.svg"), h.Type("image/svg+xml")),
			h.Link(h.Rel("stylesheet"), h.Href("/page.css")),
			h.Script(h.Src("/page.js"), h.Defer()),
		),
		h.Body(
			h.Header(h.Div(
				h.Class("bar"),
				h.H1(h.Span(h.Class("product"), g.Text("Fairlead")), g.Text(" "), h.Span(h.Class("node"), g.Text(p.options.Node))),
				live("health", "p", healthNode(status)),
				h.P(h.ID("connection"), h.Class("connection"), h.Role("status")),
			)),
			h.Main(
				live("facts", "dl", factsNode(status)),
				live("alerts", "div", alertsNode(status)),
				h.Div(
					h.Class("columns"),
					h.Section(
						h.Class("wide"), h.Aria("labelledby", "changes-title"),
						h.H2(h.ID("changes-title"), g.Text("Recent changes")),
						live("changes", "div", p.changesNode(status)),
					),
					h.Section(
						h.Aria("labelledby", "events-title"),
						h.H2(h.ID("events-title"), g.Text("Node events")),
						live("events", "div", p.eventsNode()),
					),
					h.Section(
						h.Aria("labelledby", "refused-title"),
						h.H2(h.ID("refused-title"), g.Text("Refused packets")),
						live("refused", "div", p.refusedNode()),
					),
				),
				h.Section(
					h.Aria("labelledby", "services-title"),
					h.Div(h.Class("title"), h.H2(h.ID("services-title"), g.Text("Services")), filterNode(found)),
					live("services", "div", servicesNode(found)),
				),
			),
			h.Footer(
				h.P(
					g.Text("The same data as JSON: "),
					links("/api/status", "/api/services", "/api/changes", "/api/events", "/api/refused-packets"),
				),
				h.P(g.Text("Times are in UTC. Fairlead "+p.options.Version+", source "+p.options.Source+".")),
			),
		),
	))
}

// live returns an element that the script replaces.
func live(id, element string, content g.Node) g.Node {
	return g.El(element, h.ID(id), h.Class(id), h.Data("live", ""), content)
}

func links(paths ...string) g.Node {
	nodes := g.Group{}
	for i, path := range paths {
		nodes = append(nodes, g.If(i > 0, g.Text(" ")), h.A(h.Href(path), g.Text(path)))
	}
	return nodes
}

// badge returns a word with a color. The word alone carries the meaning.
func badge(class, text string) g.Node { return h.Span(h.Class("badge "+class), g.Text(text)) }

func healthNode(s statusJSON) g.Node {
	switch {
	case s.Standby:
		return badge("warn", "Standby")
	case s.LastSuccess.IsZero():
		return badge("warn", "Starting")
	case !s.Healthy || s.Error != "":
		return badge("bad", "Unhealthy")
	default:
		return badge("good", "Healthy")
	}
}

// factsNode shows the key figures.
func factsNode(s statusJSON) g.Node {
	latency, slowest := "–", "no changes yet"
	if s.Latency != nil {
		latency = durationText(seconds(s.Latency.MedianSeconds))
		slowest = "median; p99 " + durationText(seconds(s.Latency.P99Seconds))
	}
	repairs := "since " + timeText(s.Started)
	if !s.Totals.LastDriftRepair.IsZero() {
		repairs = "last at " + timeText(s.Totals.LastDriftRepair)
	}
	programmed := "not yet"
	if !s.LastSuccess.IsZero() {
		programmed = timeText(s.LastSuccess)
	}
	detail := "mode " + s.Mode
	if !s.PendingSince.IsZero() {
		detail = "a change waits since " + timeText(s.PendingSince)
	}
	bad := s.Services.ByState[failing] + s.Services.ByState[problem]
	return g.Group{
		fact("Services", numberText(uint64(s.Services.Total)), numberText(uint64(s.Services.Ports))+" ports by family and kind", ""),             //nolint:gosec // not negative
		fact("With problems", numberText(uint64(bad)), numberText(uint64(s.Services.ByState[noEndpoints]))+" without endpoints", alarm(bad > 0)), //nolint:gosec // not negative
		fact("API to kernel", latency, slowest, ""),
		fact("Drift repairs", numberText(s.Totals.DriftRepairs), repairs, ""),
		fact("Last programmed", programmed, detail, alarm(s.Error != "")),
	}
}

func alarm(is bool) string {
	if is {
		return "bad"
	}
	return ""
}

func fact(title, value, detail, class string) g.Node {
	return h.Div(h.Dt(g.Text(title)), h.Dd(h.Class("value "+class), g.Text(value)), h.Dd(h.Class("detail"), g.Text(detail)))
}

// alertsNode lists the problems of the node.
func alertsNode(s statusJSON) g.Node {
	var list g.Group
	add := func(class, title, text string) {
		list = append(list, h.Li(h.Class(class), h.Strong(g.Text(title)), g.Text(" "+text)))
	}
	if s.Standby {
		add("warn", "Standby.", "Another Fairlead programs this node. This one takes over when it ends.")
	}
	if s.Error != "" {
		add("bad", "The last commit failed.", s.Error)
	}
	if a := s.APIServer; a != nil && !a.Connected {
		text := "Programmed Services keep working."
		if !a.LastResponse.IsZero() {
			text += " The last response was at " + timeText(a.LastResponse) + "."
		}
		add("warn", "The API server does not answer.", strings.Join(append([]string{text}, a.Failures...), " "))
	}
	for _, o := range s.OtherProxies {
		add("warn", "Rules of another Service proxy: "+o.Rules+".", o.Effect+".")
	}
	for _, problem := range s.SettingProblems {
		add("warn", problem.Setting+":", problem.Consequence+". Fix: "+problem.Fix)
	}
	for _, server := range s.NotListening {
		add("warn", "The server "+server+" does not listen.", "Another process holds its address.")
	}
	if len(list) == 0 {
		return nil
	}
	return g.Group{h.H2(h.Class("hidden"), g.Text("Problems of the node")), h.Ul(list...)}
}

// filterNode returns the form that selects Services. It is not replaced, so it keeps the focus.
func filterNode(found selected) g.Node {
	return h.Form(
		h.ID("filter"), h.Role("search"), h.Method("get"), h.Action("/"),
		h.Label(h.Class("hidden"), h.For("q"), g.Text("Filter Services by name, address or port")),
		h.Input(
			h.ID("q"), h.Name("q"), h.Type("search"), h.Value(found.query), h.AutoComplete("off"), g.Attr("spellcheck", "false"),
			h.Placeholder("Filter by name, address, port"),
		),
		g.If(found.state != "", h.Input(h.Type("hidden"), h.Name("state"), h.Value(string(found.state)))),
		h.Button(h.Type("submit"), g.Text("Filter")),
	)
}

func stateText(s serviceState) string {
	switch s {
	case failing:
		return "Failing"
	case problem:
		return "Problem"
	case noEndpoints:
		return "No endpoints"
	case ready:
		return "Ready"
	default:
		return "All"
	}
}

func stateClass(s serviceState) string {
	return map[serviceState]string{failing: "bad", problem: "bad", noEndpoints: "warn", ready: "good"}[s]
}

func servicesNode(found selected) g.Node {
	total := 0
	for _, n := range found.byState {
		total += n
	}
	tab := func(state serviceState, count int) g.Node {
		other := found.selection
		other.state, other.page = state, 1
		return h.A(
			h.Href(other.url()), g.If(state == found.state, h.Aria("current", "true")),
			g.Text(stateText(state)+" "), h.Span(h.Class("count"), g.Text(numberText(uint64(count)))), //nolint:gosec // not negative
		)
	}
	tabs := g.Group{tab("", total)}
	for _, state := range serviceStates() {
		if found.byState[state] > 0 || state == found.state {
			tabs = append(tabs, tab(state, found.byState[state]))
		}
	}
	nodes := g.Group{h.Nav(h.Class("tabs"), h.Aria("label", "State"), tabs)}
	if found.matching == 0 {
		return append(nodes, h.P(h.Class("empty"), g.Text("No Service matches.")))
	}
	return append(nodes, h.Table(
		h.Class("services-table"), h.Aria("labelledby", "services-title"),
		h.THead(h.Tr(column("Service"), column("State"), column("Frontends"), column("Endpoints"))),
		h.TBody(g.Map(found.services, found.serviceRow)),
	), pagerNode(found))
}

func column(title string) g.Node { return h.Th(h.Scope("col"), g.Text(title)) }

func (f selected) serviceRow(s indexed) g.Node {
	return h.Tr(
		h.Th(h.Scope("row"), h.Span(h.Class("namespace"), g.Text(s.Namespace+"/"), g.El("wbr")), g.Text(s.Name)),
		h.Td(badge(stateClass(s.state), stateText(s.state)), f.reasonsNode(s)),
		h.Td(h.Data("label", "Frontends"), h.Ul(h.Class("plain"), g.Group(frontendNodes(s)))),
		h.Td(h.Data("label", "Endpoints"), endpointsNode(s)),
	)
}

// reasonsNode lists why a Service is not programmed as written.
func (f selected) reasonsNode(s indexed) g.Node {
	var reasons []string
	for _, port := range s.Ports {
		if err := f.failing[port.Key]; err != nil {
			reasons = append(reasons, port.Key.String()+": "+err.Error())
		}
	}
	for _, problem := range s.Problems {
		text := problem.Field + ": " + problem.Message
		if problem.EndpointSlice != "" {
			text = "EndpointSlice " + problem.EndpointSlice + ": " + text
		}
		reasons = append(reasons, text)
	}
	if len(reasons) == 0 {
		return nil
	}
	more := len(reasons) - shownProblems
	reasons = reasons[:min(len(reasons), shownProblems)]
	if more > 0 {
		reasons = append(reasons, fmt.Sprintf("and %d more", more))
	}
	return h.Ul(h.Class("plain reasons"), g.Map(reasons, func(reason string) g.Node { return h.Li(g.Text(reason)) }))
}

// frontendNodes lists the frontends. Cluster IPs come first and have no mark.
func frontendNodes(s indexed) []g.Node {
	var nodes []g.Node
	for kind := dataplane.ClusterIP; kind <= dataplane.LoadBalancer; kind++ {
		for _, port := range s.Ports {
			if port.Key.Kind != kind {
				continue
			}
			for _, f := range port.Frontends {
				text := f.String()
				if kind == dataplane.NodePort {
					text = fmt.Sprintf("%d/%s %s", f.Addr.Port(), f.Protocol, port.Key.Family)
				}
				nodes = append(nodes, h.Li(
					h.Code(g.Text(text)), g.If(port.Key.Port != "", h.Span(h.Class("note"), g.Text(" "+port.Key.Port))),
					g.If(kind != dataplane.ClusterIP, h.Span(h.Class("kind"), g.Text(kindText(kind)))),
				))
			}
		}
	}
	return nodes
}

func kindText(kind dataplane.Kind) string {
	switch kind {
	case dataplane.NodePort:
		return "node port"
	case dataplane.ExternalIP:
		return "external IP"
	case dataplane.LoadBalancer:
		return "load balancer"
	default:
		return "cluster IP"
	}
}

// endpointsNode shows the number of endpoints, and the endpoints of each port on demand.
func endpointsNode(s indexed) g.Node {
	type group struct {
		title     string
		endpoints []dataplane.Endpoint
	}
	var groups []group
	seen := map[string]bool{}
	most := 0
	for _, port := range s.Ports {
		name := strings.TrimSpace(port.Key.Port + " " + port.Key.Family.String())
		if !seen[name] {
			seen[name] = true
			groups = append(groups, group{name, port.Endpoints})
		}
		if port.ExternalTrafficPolicyLocal && !seen[name+" local"] {
			seen[name+" local"] = true
			groups = append(groups, group{name + ", clients outside of the cluster", port.LocalEndpoints})
		}
		most = max(most, len(port.Endpoints))
	}
	if most == 0 {
		return h.Span(h.Class("none"), g.Text("none"))
	}
	return h.Details(
		h.Data("key", s.Namespace+"/"+s.Name),
		h.Summary(g.Text(numberText(uint64(most)))), //nolint:gosec // not negative
		g.Map(groups, func(group group) g.Node {
			more := len(group.endpoints) - shownEndpoints
			return g.Group{
				h.P(h.Class("note"), g.Text(group.title)),
				h.Ul(
					h.Class("plain"),
					g.Map(group.endpoints[:min(len(group.endpoints), shownEndpoints)], func(e dataplane.Endpoint) g.Node {
						return h.Li(h.Code(g.Text(e.Addr.String())), g.If(e.Local, h.Span(h.Class("kind"), g.Text("local"))))
					}),
					g.If(more > 0, h.Li(h.Class("note"), g.Text(fmt.Sprintf("and %d more", more)))),
					g.If(len(group.endpoints) == 0, h.Li(h.Class("none"), g.Text("none"))),
				),
			}
		}),
	)
}

func pagerNode(found selected) g.Node {
	if found.pages == 1 {
		return nil
	}
	link := func(page int, rel, text string) g.Node {
		if page < 1 || page > found.pages {
			return h.Span(h.Class("off"), g.Text(text))
		}
		other := found.selection
		other.page = page
		return h.A(h.Href(other.url()), h.Rel(rel), g.Text(text))
	}
	first := (found.page-1)*found.limit + 1
	return h.Nav(
		h.Class("pager"), h.Aria("label", "Pages"),
		link(found.page-1, "prev", "Previous"),
		h.Span(g.Text(fmt.Sprintf("%s–%s of %s", numberText(uint64(first)), numberText(uint64(first+len(found.services)-1)), numberText(uint64(found.matching))))), //nolint:gosec // not negative
		link(found.page+1, "next", "Next"),
	)
}

func (p *Page) changesNode(status statusJSON) g.Node {
	changes := p.options.History.Changes(shownChanges)
	if len(changes) == 0 {
		return h.P(h.Class("empty"), g.Text("No Service has changed since "+timeText(status.Started)+"."))
	}
	return h.Table(
		h.Class("changes-table"), h.Aria("labelledby", "changes-title"),
		h.THead(h.Tr(column("Time"), column("Service"), column("Change"), h.Th(h.Scope("col"), h.Class("number"), g.Text("Latency")))),
		h.TBody(g.Map(changes, func(c history.Change) g.Node {
			return h.Tr(
				h.Data("key", c.Time.Format(time.RFC3339Nano)+" "+c.Key.String()),
				h.Td(timeNode(c.Time)),
				h.Th(h.Scope("row"), h.Span(h.Class("namespace"), g.Text(c.Key.Namespace+"/"), g.El("wbr")), g.Text(c.Key.Name),
					h.Span(h.Class("note"), g.Text(" "+portText(c.Key)))),
				h.Td(changeNode(c)),
				h.Td(h.Class("number"), h.Data("label", "Latency"), latencyNode(c)),
			)
		})),
	)
}

// portText describes a key within its Service.
func portText(k dataplane.Key) string {
	text := strings.TrimSpace(k.Port + " " + k.Family.String())
	if k.Kind != dataplane.ClusterIP {
		text += ", " + kindText(k.Kind)
	}
	return text
}

func changeNode(c history.Change) g.Node {
	switch c.Action {
	case history.Failed:
		return g.Group{badge("bad", "failed"), g.Text(" " + c.Err)}
	case history.Added:
		return g.Text("added, " + countText(c.After))
	case history.Removed:
		return g.Text("removed")
	case history.Updated:
	}
	if len(c.AddedEndpoints)+len(c.RemovedEndpoints) == 0 {
		return g.Text("settings or frontends changed")
	}
	nodes := g.Group{g.Text(countText(c.Before) + " → " + strconv.Itoa(c.After))}
	for _, e := range c.AddedEndpoints {
		nodes = append(nodes, g.Text(" "), h.Code(h.Class("plus"), g.Text("+"+e.String())))
	}
	for _, e := range c.RemovedEndpoints {
		nodes = append(nodes, g.Text(" "), h.Code(h.Class("minus"), g.Text("−"+e.String())))
	}
	return nodes
}

func countText(endpoints int) string {
	if endpoints == 1 {
		return "1 endpoint"
	}
	return strconv.Itoa(endpoints) + " endpoints"
}

func latencyNode(c history.Change) g.Node {
	if c.Latency == 0 {
		return g.Text("–")
	}
	return g.Group{
		g.Text(durationText(c.Latency)),
		g.If(c.SinceTrigger > 0, h.Span(h.Class("note"), h.Title("since the EndpointSlice controller saw the change"), g.Text(" ("+durationText(c.SinceTrigger)+")"))),
	}
}

func (p *Page) eventsNode() g.Node {
	events := p.options.History.Events(shownEvents)
	if len(events) == 0 {
		return h.P(h.Class("empty"), g.Text("No events yet."))
	}
	return h.Table(
		h.THead(h.Class("hidden"), h.Tr(column("Time"), column("Event"))),
		h.TBody(g.Map(events, func(e history.Event) g.Node {
			return h.Tr(
				h.Td(timeNode(e.Last)),
				h.Td(
					badge(map[bool]string{true: "bad", false: "neutral"}[e.Failed], string(e.Kind)), g.Text(" "+e.Message),
					g.If(e.Count > 1, h.Span(h.Class("note"), g.Text(fmt.Sprintf(" %d times since %s", e.Count, timeText(e.First))))),
					g.If(e.Duration > 0, h.Span(h.Class("note"), g.Text(" in "+durationText(e.Duration)))),
				),
			)
		})),
	)
}

func (p *Page) refusedNode() g.Node {
	counts, err := p.refusedList()
	if err != nil {
		return h.P(h.Class("empty"), g.Text("The counters cannot be read: "+err.Error()))
	}
	var unused []string
	counts = slices.DeleteFunc(counts, func(c refusedJSON) bool {
		if c.Packets == 0 && !slices.Contains(unused, c.Reason) {
			unused = append(unused, c.Reason)
		}
		return c.Packets == 0
	})
	unused = slices.DeleteFunc(unused, func(reason string) bool {
		return slices.ContainsFunc(counts, func(c refusedJSON) bool { return c.Reason == reason })
	})
	nodes := g.Group{}
	if len(counts) > 0 {
		nodes = append(nodes, h.Table(
			h.THead(h.Tr(column("Reason"), column("Verdict"), column("Family"), h.Th(h.Scope("col"), h.Class("number"), g.Text("Packets")))),
			h.TBody(g.Map(counts, func(c refusedJSON) g.Node {
				return h.Tr(
					h.Th(h.Scope("row"), g.Text(reasonText(c.Reason))), h.Td(g.Text(c.Verdict)), h.Td(g.Text(c.Family)),
					h.Td(h.Class("number"), g.Text(numberText(c.Packets))),
				)
			})),
		))
	}
	if len(unused) > 0 {
		slices.Sort(unused)
		for i, reason := range unused {
			unused[i] = reasonText(reason)
		}
		nodes = append(nodes, h.P(h.Class("empty"), g.Text("No packets: "+strings.Join(unused, ", ")+".")))
	}
	if len(nodes) == 0 {
		return h.P(h.Class("empty"), g.Text("The kernel does not count refused packets in this mode."))
	}
	return nodes
}

// reasonText writes the reason of a counter as words.
func reasonText(reason string) string { return strings.ReplaceAll(reason, "-", " ") }

func timeNode(t time.Time) g.Node {
	return h.Time(h.DateTime(t.UTC().Format(time.RFC3339Nano)), h.Title(t.UTC().Format("2006-01-02 15:04:05.000 MST")), g.Text(timeText(t)))
}

// timeText writes a time of the last day as a clock time, and an older one with its date.
func timeText(t time.Time) string {
	const day = 24 * time.Hour
	if time.Since(t) < day {
		return t.UTC().Format("15:04:05")
	}
	return t.UTC().Format("2 Jan 15:04")
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// durationText writes a duration with two or three digits.
func durationText(d time.Duration) string {
	value, unit := d.Seconds(), "s"
	switch {
	case d < time.Millisecond:
		value, unit = value*1e6, "µs"
	case d < time.Second:
		value, unit = value*1e3, "ms"
	}
	precision := 0
	const small = 10
	if value < small && unit != "µs" {
		precision = 1
	}
	return strconv.FormatFloat(value, 'f', precision, 64) + " " + unit
}

// numberText writes a number with separators between groups of three digits.
func numberText(n uint64) string {
	text := strconv.FormatUint(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
