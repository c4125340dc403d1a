package statuspage

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"fairlead.io/fairlead/internal/history"
)

// statusJSON is the state of the node as JSON.
type statusJSON struct {
	Node         string    `json:"node"`
	Mode         string    `json:"mode"`
	Version      string    `json:"version"`
	Source       string    `json:"source"`
	Started      time.Time `json:"started"`
	Time         time.Time `json:"time"`
	Healthy      bool      `json:"healthy"`
	Standby      bool      `json:"standby,omitempty"`
	Error        string    `json:"error,omitempty"`
	LastSuccess  time.Time `json:"lastSuccess,omitzero"`
	PendingSince time.Time `json:"pendingSince,omitzero"`

	Services servicesJSON `json:"services"`
	Latency  *latencyJSON `json:"latency,omitempty"`
	Totals   totalsJSON   `json:"totals"`

	APIServer       *APIServer       `json:"apiServer,omitempty"`
	OtherProxies    []OtherProxy     `json:"otherProxies,omitempty"`
	SettingProblems []SettingProblem `json:"settingProblems,omitempty"`
	NotListening    []string         `json:"notListening,omitempty"`
}

type servicesJSON struct {
	Total   int                  `json:"total"`
	Ports   int                  `json:"ports"`
	ByState map[serviceState]int `json:"byState"`
}

// latencyJSON summarizes the latency of the recorded changes.
type latencyJSON struct {
	Changes       int     `json:"changes"`
	MedianSeconds float64 `json:"medianSeconds"`
	P99Seconds    float64 `json:"p99Seconds"`
}

type totalsJSON struct {
	Commits         uint64    `json:"commits"`
	Changes         uint64    `json:"changes"`
	Failures        uint64    `json:"failures"`
	DriftRepairs    uint64    `json:"driftRepairs"`
	LastDriftRepair time.Time `json:"lastDriftRepair,omitzero"`
	TableRebuilds   uint64    `json:"tableRebuilds"`
}

func (p *Page) status() statusJSON {
	state, x, totals := p.options.State(), p.currentIndex(), p.options.History.Totals()
	s := statusJSON{
		Node: p.options.Node, Mode: p.options.Mode, Version: p.options.Version, Source: p.options.Source, Started: p.started.UTC(), Time: time.Now().UTC(),
		Healthy: state.Healthy, Standby: state.Standby, LastSuccess: utc(state.LastSuccess), PendingSince: utc(state.PendingSince),
		Services: servicesJSON{Total: len(x.services), Ports: x.ports, ByState: x.counts},
		Latency:  summarize(p.options.History.Changes(0)),
		Totals: totalsJSON{
			Commits: totals.Commits, Changes: totals.Changes, Failures: totals.Failures,
			DriftRepairs: totals.DriftRepairs, LastDriftRepair: utc(totals.LastDriftRepair), TableRebuilds: totals.Rebuilds,
		},
		APIServer: state.APIServer, OtherProxies: state.OtherProxies, SettingProblems: state.SettingProblems, NotListening: state.NotListening,
	}
	if state.Err != nil {
		s.Error = state.Err.Error()
	}
	return s
}

// utc returns a time in UTC, and leaves the zero time as it is.
func utc(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return t.UTC()
}

// summarize returns the latency of the changes that were programmed, nil without one.
func summarize(changes []history.Change) *latencyJSON {
	var all []time.Duration
	for _, c := range changes {
		if c.Latency > 0 {
			all = append(all, c.Latency)
		}
	}
	if len(all) == 0 {
		return nil
	}
	slices.Sort(all)
	const percent = 100
	return &latencyJSON{Changes: len(all), MedianSeconds: all[len(all)/2].Seconds(), P99Seconds: all[min(len(all)-1, len(all)*99/percent)].Seconds()}
}

// changeJSON is a change of a Service port as JSON.
type changeJSON struct {
	Time             time.Time      `json:"time"`
	Namespace        string         `json:"namespace"`
	Name             string         `json:"name"`
	Port             string         `json:"port,omitempty"`
	Family           string         `json:"family"`
	Kind             string         `json:"kind"`
	Action           history.Action `json:"action"`
	EndpointsBefore  int            `json:"endpointsBefore"`
	EndpointsAfter   int            `json:"endpointsAfter"`
	AddedEndpoints   []string       `json:"addedEndpoints,omitempty"`
	RemovedEndpoints []string       `json:"removedEndpoints,omitempty"`
	LatencySeconds   float64        `json:"latencySeconds,omitempty"`
	SinceTrigger     float64        `json:"sinceTriggerSeconds,omitempty"`
	Error            string         `json:"error,omitempty"`
}

func (p *Page) changeList(limit int) []changeJSON {
	list := []changeJSON{}
	for _, c := range p.options.History.Changes(limit) {
		list = append(list, changeJSON{
			Time: c.Time.UTC(), Namespace: c.Key.Namespace, Name: c.Key.Name, Port: c.Key.Port, Family: c.Key.Family.String(), Kind: c.Key.Kind.String(),
			Action: c.Action, EndpointsBefore: c.Before, EndpointsAfter: c.After, AddedEndpoints: texts(c.AddedEndpoints),
			RemovedEndpoints: texts(c.RemovedEndpoints), LatencySeconds: c.Latency.Seconds(), SinceTrigger: c.SinceTrigger.Seconds(), Error: c.Err,
		})
	}
	return list
}

// eventJSON is an event of the node as JSON.
type eventJSON struct {
	First           time.Time         `json:"first"`
	Last            time.Time         `json:"last"`
	Count           int               `json:"count"`
	Kind            history.EventKind `json:"kind"`
	Message         string            `json:"message"`
	Failed          bool              `json:"failed,omitempty"`
	DurationSeconds float64           `json:"durationSeconds,omitempty"`
}

func (p *Page) eventList(limit int) []eventJSON {
	list := []eventJSON{}
	for _, e := range p.options.History.Events(limit) {
		list = append(list, eventJSON{
			First: e.First.UTC(), Last: e.Last.UTC(), Count: e.Count, Kind: e.Kind, Message: e.Message, Failed: e.Failed, DurationSeconds: e.Duration.Seconds(),
		})
	}
	return list
}

// refusedJSON counts refused packets as JSON.
type refusedJSON struct {
	Family  string `json:"family"`
	Verdict string `json:"verdict"`
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
}

// refusedList returns the counters of refused packets, the largest first.
func (p *Page) refusedList() ([]refusedJSON, error) {
	list := []refusedJSON{}
	if p.options.RefusedPackets == nil {
		return list, nil
	}
	counts, err := p.options.RefusedPackets()
	for _, c := range counts {
		list = append(list, refusedJSON{Family: c.Family.String(), Verdict: c.Verdict, Reason: c.Reason, Packets: c.Packets})
	}
	slices.SortStableFunc(list, func(a, b refusedJSON) int {
		return cmp.Or(-cmp.Compare(a.Packets, b.Packets), strings.Compare(a.Reason, b.Reason), strings.Compare(a.Verdict, b.Verdict), strings.Compare(a.Family, b.Family))
	})
	return list, err
}
