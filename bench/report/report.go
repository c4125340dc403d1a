package report

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"fairlead.io/fairlead/bench/result"
)

// Merge joins results to one. Environments of one name must be the same machine, kernel
// and API server, and no measurement may be in two of them. Ratios stay those that each
// run has found, as only what was measured in one run may be compared.
func Merge(reports ...*result.Report) (*result.Report, error) {
	if len(reports) == 0 {
		return nil, fmt.Errorf("merge results: there are none")
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
			i := slices.IndexFunc(all.Environments, func(have result.Environment) bool { return have.Name == e.Name })
			switch {
			case i < 0:
				all.Environments = append(all.Environments, e)
			case !sameEnvironment(all.Environments[i], e):
				return nil, fmt.Errorf("merge results: environment %q is two different machines, kernels or API servers: measure with --environment=NAME", e.Name)
			}
		}
		for _, m := range r.Measurements {
			if all.Find(m.Measure, m.System, m.Environment, m.Scenario) != nil {
				return nil, fmt.Errorf("merge results: %s of %s in environment %s, %d Services, is there twice",
					m.Measure, m.System, m.Environment, m.Scenario.Services)
			}
			all.Measurements = append(all.Measurements, m)
		}
		for _, s := range r.Systems {
			if !slices.ContainsFunc(all.Systems, func(have result.System) bool { return have.Name == s.Name && have.Version == s.Version }) {
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
	// Name is short and without blanks, for a file.
	Name string
	// Title says what it shows.
	Title string
	// SVG is in light or dark as whoever looks at it prefers, PNG is light.
	SVG, PNG []byte
}

// pictureWidth is that of the charts in the page's wide form, and narrowWidth of its
// form for phones.
const (
	pictureWidth = 720
	narrowWidth  = 344
)

// Pictures draws all charts of a report. Names begin with the environment's, unless that
// is this machine. A chart says so where its processor was emulated.
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

// padded is a drawing on a ground of its own, for files that have none.
type padded struct{ drawing }

const padding = 14

func (p padded) height(width float64) float64 { return p.drawing.height(width-2*padding) + 2*padding }

func (p padded) draw(c *canvas) {
	c.bar(surface, 0, c.height/2, c.width, c.height)
	inner := *c
	inner.inset = padding
	inner.width, inner.height = c.width-2*padding, c.height-2*padding
	p.drawing.draw(&inner)
}

// emulationNotice is a drawing that says that its figures are of an emulated processor.
type emulationNotice struct{ drawing }

const emulationNoticeHeight = 20

func (e emulationNotice) title() string { return e.drawing.title() + " (the processor was emulated)" }

func (e emulationNotice) height(width float64) float64 {
	return e.drawing.height(width) + emulationNoticeHeight
}

func (e emulationNotice) draw(c *canvas) {
	c.drawText(textFormat{role: ink, size: smallSize, bold: true}, 0, c.height-emulationNoticeHeight/2,
		"The processor was emulated: times say nothing about real machines.")
	inner := *c
	inner.height -= emulationNoticeHeight
	inner.bottomInset = emulationNoticeHeight
	e.drawing.draw(&inner)
}

// section is what is shown of one measure.
type section struct {
	id, title, text string
	figures         []figure
}

type figure struct {
	name, caption string
	chart         drawing
}

// sections returns what there is to show of one environment.
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
			"An update, seen by packets", "Time from when the API server is given a change to the first packet that shows it: "+
				"the first that reaches a new endpoint, or the first that no longer reaches one that is gone."),
		updateSection(measured, result.UpdateAck, "update-ack",
			"An update, acknowledged by the kernel", "Time from an event to the kernel's acknowledgement."),
		scalingSection(measured),
		barsSection(measured, "start", "A cold start", "Time from the start of the program, with nothing programmed. Shorter is better.",
			result.ColdStartAnswer, result.ColdStartComplete, result.ColdStartCPU, result.Restart),
		churnSection(measured),
		barsSection(measured, "memory", "Memory", "Resident memory of the program and what it starts, after a cold start. Shorter is better.",
			result.Memory, result.PeakMemory),
		connectSection(measured),
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

// groupBy makes groups of measurements by a heading, in order of their first.
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

// changeName says what a change is.
func changeName(c result.Change) string {
	switch c {
	case result.ReplaceEndpoint:
		return "Replace an endpoint"
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

func scenarioText(s result.Scenario) string {
	return fmt.Sprintf("%s Services of %d endpoints", thousands(s.Services), s.Endpoints)
}

const rangeCaption = "The dot is the median, the thick line has 80 % of the samples in it, the thin one all. The axis is logarithmic."

func updateSection(measured []*result.Measurement, measure result.Measure, id, title, words string) section {
	list := withMostServices(withMeasure(measured, measure))
	if len(list) == 0 {
		return section{}
	}
	at := scenarioText(list[0].Scenario)
	s := section{id: id, title: title, text: words, figures: []figure{{
		name: id, caption: at + ". " + rangeCaption,
		chart: &rowsChart{name: title + ": " + at, unit: list[0].Unit, groups: groupBy(list, func(m *result.Measurement) string { return changeName(m.Scenario.Change) })},
	}}}
	distribution := &curvesChart{
		name: "How the times are distributed: replace an endpoint, " + at, xUnit: list[0].Unit, yUnit: "%", yTitle: "share of updates that were done by then", steps: true,
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
		s.figures = append(s.figures, figure{id + "-distribution", "How the times to replace an endpoint are distributed.", distribution})
	}
	return s
}

func sortCurves(curves []curve) {
	slices.SortStableFunc(curves, func(a, b curve) int { return cmp.Compare(a.style.series, b.style.series) })
}

// scalingSection is latency against the number of Services.
func scalingSection(measured []*result.Measurement) section {
	s := section{
		id: "services", title: "Against the number of Services",
		text: "What the number of Services in the cluster does to the time that one update, or a start, takes.",
	}
	for _, one := range []struct {
		measure result.Measure
		change  result.Change
		name    string
		title   string
	}{
		{result.UpdatePacket, result.ReplaceEndpoint, "services-update", "Replace an endpoint, to the first packet"},
		{result.UpdateAck, result.ReplaceEndpoint, "services-update-ack", "Replace an endpoint, to the kernel's acknowledgement"},
		{result.ColdStartAnswer, "", "services-start", "Cold start until the last Service answers"},
	} {
		bySystem := map[string][]*result.Measurement{}
		var ticks []float64
		for _, m := range withMeasure(measured, one.measure) {
			if m.Scenario.Change != one.change {
				continue
			}
			bySystem[m.System] = append(bySystem[m.System], m)
			if n := float64(m.Scenario.Services); !slices.Contains(ticks, n) {
				ticks = append(ticks, n)
			}
		}
		const least = 2
		if len(ticks) < least {
			continue
		}
		slices.Sort(ticks)
		chart := &curvesChart{name: one.title, xUnit: "1", yUnit: "s", yTitle: strings.ToLower(one.title[:1]) + one.title[1:], logY: true, ticks: ticks}
		for _, list := range bySystem {
			chart.curves = append(chart.curves, servicesCurve(list))
		}
		sortCurves(chart.curves)
		s.figures = append(s.figures, figure{
			one.name, one.title + ": medians, with lines that have 80 % of the samples in them. Below is the number of Services; both axes are logarithmic.", chart,
		})
	}
	return s
}

func measureName(m result.Measure) string {
	switch m {
	case result.ColdStartAnswer:
		return "Until the last Service answers"
	case result.ColdStartComplete:
		return "Until the kernel has acknowledged all"
	case result.ColdStartCPU:
		return "Processor time of the start"
	case result.Restart:
		return "Restart with nothing to do"
	case result.Memory:
		return "Resident"
	case result.PeakMemory:
		return "Most that was resident"
	default:
		return string(m)
	}
}

func barsSection(measured []*result.Measurement, id, title, words string, measures ...result.Measure) section {
	s := section{id: id, title: title, text: words}
	for _, unit := range []string{"s", "B"} {
		var list []*result.Measurement
		for _, measure := range measures {
			some := withMostServices(withMeasure(measured, measure))
			list = append(list, some...)
		}
		list = slices.DeleteFunc(list, func(m *result.Measurement) bool { return m.Unit != unit })
		if len(list) == 0 {
			continue
		}
		at := scenarioText(list[0].Scenario)
		s.figures = append(s.figures, figure{id, at + ". Bars are medians; the lines have all samples in them.", &rowsChart{
			name: title + ": " + at, unit: unit, bars: true, groups: groupBy(list, func(m *result.Measurement) string { return measureName(m.Measure) }),
		}})
	}
	return s
}

func churnSection(measured []*result.Measurement) section {
	s := section{
		id: "churn", title: "Under churn",
		text: "Endpoints all over the cluster are replaced all the time. How late is a change, and what does the processor pay?",
	}
	rate := func(m *result.Measurement) string {
		return fmt.Sprintf("%s changes a second", thousands(int(m.Scenario.Rate)))
	}
	if lag := withMostServices(withMeasure(measured, result.Churn)); len(lag) > 0 {
		at := scenarioText(lag[0].Scenario)
		s.figures = append(s.figures, figure{"churn-lag", "From an event to its effect. " + at + ". " + rangeCaption, &rowsChart{
			name: "From an event to its effect under churn: " + at, unit: "s", groups: groupBy(lag, rate),
		}})
	}
	if cpu := withMostServices(withMeasure(measured, result.ChurnCPU)); len(cpu) > 0 {
		at := scenarioText(cpu[0].Scenario)
		s.figures = append(s.figures, figure{"churn-cpu", "Processor time for each change, of the program and what it starts. " + at + ".", &rowsChart{
			name: "Processor time for each change under churn: " + at, unit: "s", bars: true, groups: groupBy(cpu, rate),
		}})
	}
	return s
}

func connectSection(measured []*result.Measurement) section {
	list := withMeasure(measured, result.Connect)
	if len(list) == 0 {
		return section{}
	}
	title := "The price of a connection"
	return section{id: "connect", title: title, text: "How long connect(2) takes, through a Service and directly.", figures: []figure{{
		"connect", rangeCaption, &rowsChart{name: title, unit: "s", groups: groupBy(list, func(m *result.Measurement) string {
			return thousands(m.Scenario.Services) + " Services"
		})},
	}}}
}
