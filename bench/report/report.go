package report

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"fairlead.io/fairlead/bench/result"
)

// Merge combines reports into one. Environments of the same name must be the same machine, kernel
// and API server, and a measurement must not occur twice. Merge keeps the ratios of each report
// and adds none, because only measurements of the same run can be compared.
func Merge(reports ...*result.Report) (*result.Report, error) {
	if len(reports) == 0 {
		return nil, fmt.Errorf("merge reports: no reports")
	}
	all := &result.Report{
		Schema: result.Schema, Time: reports[0].Time, Version: reports[0].Version, Command: reports[0].Command,
	}
	for _, r := range reports {
		all.TookSeconds += r.TookSeconds
		if r.Time.Before(all.Time) {
			all.Time = r.Time
		}
		for _, e := range r.Environments {
			i := slices.IndexFunc(all.Environments, func(other result.Environment) bool { return other.Name == e.Name })
			switch {
			case i < 0:
				all.Environments = append(all.Environments, e)
			case !sameEnvironment(all.Environments[i], e):
				return nil, fmt.Errorf("merge reports: environment %q has different machines, kernels or API servers: repeat one run with another --environment=NAME", e.Name)
			}
		}
		for _, m := range r.Measurements {
			if all.Find(m.Measure, m.System, m.Environment, m.Scenario) != nil {
				return nil, fmt.Errorf("merge reports: duplicate measurement: %s of %s in environment %s with %d Services",
					m.Measure, m.System, m.Environment, m.Scenario.Services)
			}
			all.Measurements = append(all.Measurements, m)
		}
		for _, s := range r.Systems {
			if !slices.ContainsFunc(all.Systems, func(other result.System) bool { return other.Name == s.Name && other.Version == s.Version }) {
				all.Systems = append(all.Systems, s)
			}
		}
		all.Ratios = append(all.Ratios, r.Ratios...)
		all.Notes = append(all.Notes, r.Notes...)
		for _, l := range r.LeftOut {
			if !slices.Contains(all.LeftOut, l) {
				all.LeftOut = append(all.LeftOut, l)
			}
		}
	}
	return all, nil
}

func sameEnvironment(a, b result.Environment) bool {
	a.Load, b.Load = 0, 0
	return a == b
}

// Picture is one chart of a report.
type Picture struct {
	// Name is a short file name without extension and without spaces.
	Name string
	// Title describes the chart.
	Title string
	// SVG follows the viewer's color scheme, light or dark. PNG is always light.
	SVG, PNG []byte
}

// pictureWidth is the width of charts on wide screens in pixels, and narrowWidth the width on
// phones.
const (
	pictureWidth = 720
	narrowWidth  = 344
)

// Pictures draws all charts of a report. Names of charts start with the name of the environment,
// except for [result.Native]. Charts of emulated processors carry a notice.
func Pictures(r *result.Report) ([]Picture, error) {
	face, err := newTypeface()
	if err != nil {
		return nil, err
	}
	var list []Picture
	for _, e := range r.Environments {
		for _, s := range sections(r, e.Name) {
			for _, f := range s.figures {
				chart := f.chart
				if e.Emulated {
					chart = emulationNotice{chart}
				}
				p := Picture{Name: f.name, Title: chart.title()}
				if e.Name != result.Native {
					p.Name = e.Name + "-" + p.Name
				}
				svg, err := face.svg(chart, pictureWidth)
				if err != nil {
					return nil, err
				}
				p.SVG = standalone(svg, p.Title)
				if p.PNG, err = face.png(padded{chart}, pictureWidth); err != nil {
					return nil, err
				}
				list = append(list, p)
			}
		}
	}
	return list, nil
}

// padded draws a drawing with padding on a background, for files.
type padded struct{ drawing }

const padding = 14

func (p padded) height(width float64) float64 { return p.drawing.height(width-2*padding) + 2*padding }

func (p padded) drawOn(c *canvas) {
	c.bar(surface, 0, c.height/2, c.width, c.height)
	inner := *c
	inner.inset = padding
	inner.width, inner.height = c.width-2*padding, c.height-2*padding
	p.drawing.drawOn(&inner)
}

// emulationNotice adds a notice to a drawing that the processor was emulated.
type emulationNotice struct{ drawing }

const emulationNoticeHeight = 20

func (e emulationNotice) title() string { return e.drawing.title() + " (the processor was emulated)" }

func (e emulationNotice) height(width float64) float64 {
	return e.drawing.height(width) + emulationNoticeHeight
}

func (e emulationNotice) drawOn(c *canvas) {
	c.drawText(textFormat{role: ink, size: smallSize, bold: true}, 0, c.height-emulationNoticeHeight/2,
		"The processor was emulated: times do not apply to real machines.")
	inner := *c
	inner.height -= emulationNoticeHeight
	inner.bottomInset = emulationNoticeHeight
	e.drawing.drawOn(&inner)
}

// section describes one section of the page.
type section struct {
	id, title, text string
	figures         []figure
}

type figure struct {
	name, caption string
	chart         drawing
}

// sections returns the sections with results of the environment.
func sections(r *result.Report, environment string) []section {
	var measured []*result.Measurement
	for i := range r.Measurements {
		m := &r.Measurements[i]
		if m.Environment == environment && m.Distribution != nil {
			measured = append(measured, m)
		}
	}
	all := []section{
		updateSection(measured, result.UpdatePacket, "update",
			"Update latency, measured with packets", "Time from the request to the API server until the first packet that shows the change: "+
				"the first packet that reaches a new endpoint, or the first packet that no longer reaches a removed endpoint."),
		updateSection(measured, result.UpdateAck, "update-ack",
			"Update latency, acknowledged by the kernel", "Time from an event until the kernel acknowledges the change."),
		scalingSection(measured),
		barsSection(measured, "start", "Cold start", "Time from the start of the program, with nothing programmed. Shorter is better.",
			result.ColdStartAnswer, result.ColdStartComplete, result.ColdStartCPU, result.Restart),
		churnSection(measured),
		barsSection(measured, "memory", "Memory", "Resident memory of the program and its child processes after a cold start. Shorter is better.",
			result.Memory, result.PeakMemory),
		connectSection(measured),
		establishedSection(measured),
	}
	return slices.DeleteFunc(all, func(s section) bool { return len(s.figures) == 0 })
}

// withMeasure returns the measurements of a measure.
func withMeasure(measured []*result.Measurement, measure result.Measure) []*result.Measurement {
	var list []*result.Measurement
	for _, m := range measured {
		if m.Measure == measure {
			list = append(list, m)
		}
	}
	return list
}

// withMostServices returns the measurements with the largest number of Services.
func withMostServices(measured []*result.Measurement) []*result.Measurement {
	n := 0
	for _, m := range measured {
		n = max(n, m.Scenario.Services)
	}
	return slices.DeleteFunc(slices.Clone(measured), func(m *result.Measurement) bool { return m.Scenario.Services != n })
}

// groupBy groups measurements by heading, in the order in which headings first occur.
func groupBy(measured []*result.Measurement, heading func(*result.Measurement) string) []group {
	var groups []group
	for _, m := range measured {
		h := heading(m)
		i := slices.IndexFunc(groups, func(g group) bool { return g.heading == h })
		if i < 0 {
			i, groups = len(groups), append(groups, group{heading: h})
		}
		groups[i].rows = append(groups[i].rows, newRow(m))
	}
	for _, g := range groups {
		slices.SortStableFunc(g.rows, func(a, b row) int { return cmp.Compare(a.style.series, b.style.series) })
	}
	return groups
}

// changeName returns a description of a change.
func changeName(c result.Change) string {
	switch c {
	case result.ReplaceEndpoint:
		return "Replace an endpoint"
	case result.ReplaceOnlyEndpoint:
		return "Replace the only endpoint"
	case result.ScaleUp:
		return "Add an endpoint"
	case result.ScaleDown:
		return "Remove an endpoint"
	case result.CreateService:
		return "Create a Service"
	case result.DeleteService:
		return "Delete a Service"
	default:
		return string(c)
	}
}

// scenarioText returns the number of Services and endpoints as text.
func scenarioText(s result.Scenario) string {
	return fmt.Sprintf("%s Services of %d endpoints", thousands(s.Services), s.Endpoints)
}

const rangeCaption = "The dot is the median, the thick line covers 80 % of the samples, the thin line all samples. The axis is logarithmic."

func updateSection(measured []*result.Measurement, measure result.Measure, id, title, text string) section {
	list := withMostServices(withMeasure(measured, measure))
	if len(list) == 0 {
		return section{}
	}
	at := scenarioText(list[0].Scenario)
	s := section{id: id, title: title, text: text, figures: []figure{{
		name: id, caption: at + ". " + rangeCaption,
		chart: &rowsChart{name: title + ": " + at, unit: list[0].Unit, groups: groupBy(list, func(m *result.Measurement) string { return changeName(m.Scenario.Change) })},
	}}}
	distribution := &curvesChart{
		name: "Distribution of times: replace an endpoint, " + at, xUnit: list[0].Unit, yUnit: "%", yTitle: "share of updates completed within the time", steps: true,
	}
	for _, m := range list {
		if m.Scenario.Change == result.ReplaceEndpoint && len(m.Samples) > 1 {
			c := cumulativeCurve(m)
			for i := range c.y {
				c.y[i] *= 100
			}
			distribution.curves = append(distribution.curves, c)
		}
	}
	if len(distribution.curves) > 0 {
		sortCurves(distribution.curves)
		s.figures = append(s.figures, figure{id + "-distribution", "Distribution of the times to replace an endpoint.", distribution})
	}
	return s
}

func sortCurves(curves []curve) {
	slices.SortStableFunc(curves, func(a, b curve) int { return cmp.Compare(a.style.series, b.style.series) })
}

// scalingSection returns the charts of latency by number of Services.
func scalingSection(measured []*result.Measurement) section {
	s := section{
		id: "services", title: "Scaling with the number of Services",
		text: "How the time of one update, or of a start, depends on the number of Services in the cluster.",
	}
	for _, spec := range []struct {
		measure result.Measure
		change  result.Change
		name    string
		title   string
	}{
		{result.UpdatePacket, result.ReplaceEndpoint, "services-update", "Replace an endpoint, until the first packet"},
		{result.UpdateAck, result.ReplaceEndpoint, "services-update-ack", "Replace an endpoint, until the kernel's acknowledgement"},
		{result.ColdStartAnswer, "", "services-start", "Cold start until the last Service answers"},
	} {
		bySystem := map[string][]*result.Measurement{}
		var ticks []float64
		for _, m := range withMeasure(measured, spec.measure) {
			if m.Scenario.Change != spec.change {
				continue
			}
			bySystem[m.System] = append(bySystem[m.System], m)
			if n := float64(m.Scenario.Services); !slices.Contains(ticks, n) {
				ticks = append(ticks, n)
			}
		}
		const minTicks = 2
		if len(ticks) < minTicks {
			continue
		}
		slices.Sort(ticks)
		chart := &curvesChart{name: spec.title, xUnit: "1", yUnit: "s", yTitle: strings.ToLower(spec.title[:1]) + spec.title[1:], logY: true, ticks: ticks}
		for _, list := range bySystem {
			chart.curves = append(chart.curves, servicesCurve(list))
		}
		sortCurves(chart.curves)
		s.figures = append(s.figures, figure{
			spec.name, spec.title + ": medians, with lines that cover 80 % of the samples. The horizontal axis is the number of Services; both axes are logarithmic.", chart,
		})
	}
	return s
}

// measureName returns a description of a measure.
func measureName(m result.Measure) string {
	switch m {
	case result.ColdStartAnswer:
		return "Until the last Service answers"
	case result.ColdStartComplete:
		return "Until the kernel has acknowledged everything"
	case result.ColdStartCPU:
		return "Processor time of the start"
	case result.Restart:
		return "Warm restart with nothing to change"
	case result.PacketTime:
		return "A UDP packet of 64 bytes, from one socket to the other"
	case result.TransferTime:
		return "1 GiB over a TCP connection"
	case result.Memory:
		return "Resident"
	case result.PeakMemory:
		return "Peak resident"
	default:
		return string(m)
	}
}

func barsSection(measured []*result.Measurement, id, title, text string, measures ...result.Measure) section {
	s := section{id: id, title: title, text: text}
	for _, unit := range []string{"s", "B"} {
		var list []*result.Measurement
		for _, measure := range measures {
			list = append(list, withMostServices(withMeasure(measured, measure))...)
		}
		list = slices.DeleteFunc(list, func(m *result.Measurement) bool { return m.Unit != unit })
		if len(list) == 0 {
			continue
		}
		at := scenarioText(list[0].Scenario)
		s.figures = append(s.figures, figure{id, at + ". Bars are medians, lines cover all samples.", &rowsChart{
			name: title + ": " + at, unit: unit, bars: true, groups: groupBy(list, func(m *result.Measurement) string { return measureName(m.Measure) }),
		}})
	}
	return s
}

func churnSection(measured []*result.Measurement) section {
	s := section{
		id: "churn", title: "Under churn",
		text: "Endpoints of Services all over the cluster are replaced continuously. The charts show the latency of a change and its processor time.",
	}
	rate := func(m *result.Measurement) string {
		return fmt.Sprintf("%s changes per second", thousands(int(m.Scenario.Rate)))
	}
	if lag := withMostServices(withMeasure(measured, result.Churn)); len(lag) > 0 {
		at := scenarioText(lag[0].Scenario)
		s.figures = append(s.figures, figure{"churn-lag", "Time from an event to its effect. " + at + ". " + rangeCaption, &rowsChart{
			name: "Time from an event to its effect under churn: " + at, unit: "s", groups: groupBy(lag, rate),
		}})
	}
	if cpu := withMostServices(withMeasure(measured, result.ChurnCPU)); len(cpu) > 0 {
		at := scenarioText(cpu[0].Scenario)
		s.figures = append(s.figures, figure{"churn-cpu", "Processor time per change of the program and its child processes. " + at + ".", &rowsChart{
			name: "Processor time per change under churn: " + at, unit: "s", bars: true, groups: groupBy(cpu, rate),
		}})
	}
	return s
}

func connectSection(measured []*result.Measurement) section {
	s := section{id: "connect", title: "Connection setup", text: "The first packet of a connection, and connect(2), through a Service and directly."}
	for _, spec := range []struct {
		measure result.Measure
		title   string
	}{
		{result.FirstPacket, "The first packet of a connection, from the client to the endpoint"},
		{result.Connect, "Duration of connect(2)"},
	} {
		if list := withMeasure(measured, spec.measure); len(list) > 0 {
			s.figures = append(s.figures, figure{string(spec.measure), spec.title + ". " + rangeCaption, &rowsChart{
				name: spec.title, unit: "s", groups: groupBy(list, func(m *result.Measurement) string {
					return joinNonEmpty(thousands(m.Scenario.Services)+" Services", destinationName(m.Scenario.Destination))
				}),
			}})
		}
	}
	return s
}

func joinNonEmpty(words ...string) string {
	return strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), ", ")
}

// destinationName returns a description of where connections go.
func destinationName(d result.Destination) string {
	switch d {
	case result.OneService:
		return "one of them again and again"
	case result.RandomServices:
		return "random ones"
	case result.NoService:
		return "no Service"
	default:
		return string(d)
	}
}

// establishedSection returns charts of established connections, one for each measure, because their units
// of time differ by far.
func establishedSection(measured []*result.Measurement) section {
	s := section{
		id: "established", title: "Established connections",
		text: "Packets of established connections through a Service, and without a Service. Shorter is better.",
	}
	for _, measure := range []result.Measure{result.PacketTime, result.TransferTime} {
		list := withMostServices(withMeasure(measured, measure))
		if len(list) == 0 {
			continue
		}
		at := scenarioText(list[0].Scenario)
		s.figures = append(s.figures, figure{string(measure), at + ". Bars are medians, lines cover all samples.", &rowsChart{
			name: measureName(measure) + ": " + at, unit: "s", bars: true,
			groups: groupBy(list, func(m *result.Measurement) string { return measureName(m.Measure) }),
		}})
	}
	return s
}
