package agent

import (
	"maps"
	"slices"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/history"
	"fairlead.io/fairlead/internal/statuspage"
)

// newStatusPage returns the status page. It reads the state of the components on request.
func (a *Agent) newStatusPage() *statuspage.Page {
	options := statuspage.Options{
		Node: a.config.Tracker.NodeName, Mode: a.config.Mode, Version: a.version, Source: a.sourceName,
		State: a.pageState, Services: a.dispatcher.services, ServicesVersion: a.dispatcher.results.Load,
		Failing: func() map[dataplane.Key]error { return a.pipeline.Syncer.Status().Failing }, History: a.history,
	}
	if a.counters != nil {
		options.RefusedPackets = a.refusedPackets
	}
	return statuspage.New(options)
}

// services returns all Services with their problems.
func (d *dispatcher) services() []statuspage.Service {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []statuspage.Service
	for s := range d.pipeline.Services() {
		service := statuspage.Service{Namespace: s.Name.Namespace, Name: s.Name.Name, Ports: s.Ports}
		for _, p := range s.Problems {
			service.Problems = append(service.Problems, statuspage.Problem{EndpointSlice: p.EndpointSlice, Field: p.Field, Message: p.Message})
		}
		all = append(all, service)
	}
	return all
}

// pageState returns the state of the node.
func (a *Agent) pageState() statuspage.State {
	status := a.pipeline.Syncer.Status()
	state := statuspage.State{
		Healthy: a.nodeHealth.Healthy(), Standby: a.standby.isStandby(), LastSuccess: status.LastSuccess, PendingSince: status.PendingSince, Err: status.Err,
	}
	if a.apiConnection != nil {
		c := a.apiConnection()
		state.APIServer = &statuspage.APIServer{Connected: c.Connected, LastResponse: c.LastResponse, Failures: c.Failures}
	}
	a.dispatcher.mu.Lock()
	rules, expected := a.dispatcher.otherProxies, a.dispatcher.proxyName != ""
	a.dispatcher.mu.Unlock()
	for _, r := range rules {
		if !expected {
			state.OtherProxies = append(state.OtherProxies, statuspage.OtherProxy{Mode: string(r.Mode), Rules: r.String(), Effect: r.Effect()})
		}
	}
	for _, p := range a.nodeSettings.Problems() {
		state.SettingProblems = append(state.SettingProblems, statuspage.SettingProblem{Setting: p.Setting, Consequence: p.Consequence, Fix: p.Fix})
	}
	listening := a.listenerStates()
	for _, server := range slices.Sorted(maps.Keys(listening)) {
		if !listening[server] {
			state.NotListening = append(state.NotListening, server)
		}
	}
	return state
}

func (a *Agent) refusedPackets() ([]statuspage.RefusedPackets, error) {
	counts, err := a.counters.readRefused()
	refused := make([]statuspage.RefusedPackets, 0, len(counts))
	for _, c := range counts {
		refused = append(refused, statuspage.RefusedPackets{Family: c.Family, Verdict: string(c.Verdict), Reason: c.Reason, Packets: c.Packets})
	}
	return refused, err
}

// recordReload records a change of the configuration file.
func (a *Agent) recordReload(err error) {
	a.metrics.RecordReload(err)
	if err != nil {
		a.history.RecordEvent(history.Reload, true, "the configuration file is invalid: "+err.Error())
		return
	}
	a.history.RecordEvent(history.Reload, false, "the configuration file was reloaded")
}
