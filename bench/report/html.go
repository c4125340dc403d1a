package report

import (
	_ "embed" // for page.css
	"fmt"
	"io"
	"math"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/table"
)

//go:embed page.css
var pageCSS string

// WriteHTML writes a report as one HTML page that contains its charts and loads no other
// resources. The layout suits phones, desktops and print, and follows the color scheme, light or
// dark.
func WriteHTML(w io.Writer, r *result.Report) error {
	p, err := newPage(r)
	if err != nil {
		return err
	}
	if err := p.node().Render(w); err != nil {
		return fmt.Errorf("write HTML report: %w", err)
	}
	return nil
}

// page is the content of the page.
type page struct {
	report       *result.Report
	title        string
	environments []environment
}

// environment is the content for one environment.
type environment struct {
	result.Environment
	several           bool
	keyFigures        []keyFigure
	keyFigureScenario string
	sections          []pageSection
	ratios            []result.Ratio
	measured          []*result.Measurement
	leftOut           []result.LeftOut
}

// keyFigure is a ratio shown at the top of the page.
type keyFigure struct {
	ratio, comparison, title, interval, figures string
	worse                                       bool
}

// pageSection is a section with drawn figures.
type pageSection struct {
	id, title, text string
	figures         []pageFigure
}

type pageFigure struct {
	caption      string
	wide, narrow []byte // SVG
}

func newPage(r *result.Report) (*page, error) {
	face, err := newTypeface()
	if err != nil {
		return nil, err
	}
	p := &page{report: r, title: "Fairlead benchmark results"}
	if len(r.Ratios) > 0 {
		p.title = "Fairlead and kube-proxy compared"
	}
	for _, e := range r.Environments {
		env := environment{Environment: e, several: len(r.Environments) > 1}
		for i := range r.Measurements {
			if r.Measurements[i].Environment == e.Name {
				env.measured = append(env.measured, &r.Measurements[i])
			}
		}
		for _, ratio := range r.Ratios {
			if ratio.Environment == e.Name {
				env.ratios = append(env.ratios, ratio)
			}
		}
		for _, l := range r.LeftOut {
			if l.Environment == e.Name || l.Environment == "" {
				env.leftOut = append(env.leftOut, l)
			}
		}
		if !e.Emulated {
			env.keyFigures, env.keyFigureScenario = keyFigures(r, e.Name)
		}
		for _, s := range sections(r, e.Name) {
			content := pageSection{id: e.Name + "-" + s.id, title: s.title, text: s.text}
			for _, f := range s.figures {
				drawn, err := face.drawFigure(f)
				if err != nil {
					return nil, err
				}
				content.figures = append(content.figures, drawn)
			}
			env.sections = append(env.sections, content)
		}
		p.environments = append(p.environments, env)
	}
	return p, nil
}

// drawFigure draws a figure for wide and narrow screens.
func (f *typeface) drawFigure(fig figure) (pageFigure, error) {
	wide, err := f.svg(fig.chart, pictureWidth)
	if err != nil {
		return pageFigure{}, err
	}
	narrow, err := f.svg(fig.chart, narrowWidth)
	if err != nil {
		return pageFigure{}, err
	}
	title := fig.chart.title()
	return pageFigure{fig.caption, inline(wide, "wide", title), inline(narrow, "narrow", title)}, nil
}

// keyFigures returns the ratios of kube-proxy's nftables mode to Fairlead's nft mode with the most
// Services. Among several rates of churn, it picks the worst one for Fairlead.
func keyFigures(r *result.Report, environment string) (list []keyFigure, at string) {
	const other = "kube-proxy-nftables"
	for _, spec := range []struct {
		measure       result.Measure
		change        result.Change
		better, title string
	}{
		{result.UpdatePacket, result.ReplaceEndpoint, "faster", "Update: from the event to the first packet at the new endpoint"},
		{result.ColdStartAnswer, "", "faster", "Cold start until the last Service answers"},
		{result.ChurnCPU, result.ReplaceEndpoint, "less processor time", "Per change under churn"},
		{result.Memory, "", "less memory", "Resident memory after a cold start"},
	} {
		best := -1
		for i, ratio := range r.Ratios {
			if ratio.Environment == environment && ratio.Measure == spec.measure && ratio.Scenario.Change == spec.change &&
				ratio.Numerator == other && ratio.Denominator == "nft" && (best < 0 || preferred(ratio, r.Ratios[best])) {
				best = i
			}
		}
		if best < 0 {
			continue
		}
		ratio := r.Ratios[best]
		if at == "" {
			at = scenarioText(ratio.Scenario)
		}
		if scenarioText(ratio.Scenario) == at {
			list = append(list, newKeyFigure(r, ratio, spec.better, spec.title))
		}
	}
	return list, at
}

// preferred reports whether to show ratio a instead of ratio b.
func preferred(a, b result.Ratio) bool {
	if a.Scenario.Services != b.Scenario.Services {
		return a.Scenario.Services > b.Scenario.Services
	}
	return a.Ratio < b.Ratio
}

// newKeyFigure returns the key figure for a ratio.
func newKeyFigure(r *result.Report, ratio result.Ratio, better, title string) keyFigure {
	c := keyFigure{comparison: better, title: title}
	if ratio.Scenario.Rate > 0 {
		c.title += fmt.Sprintf(", at %s changes per second", thousands(int(ratio.Scenario.Rate)))
	}
	v, low, high := ratio.Ratio, ratio.Low, ratio.High
	if v < 1 {
		c.worse = true
		v, low, high = 1/v, 1/high, 1/low
		c.comparison = map[string]string{"faster": "slower", "less processor time": "more processor time", "less memory": "more memory"}[better]
	}
	c.ratio = formatRatio(v) + "×"
	c.interval = fmt.Sprintf("%.0f %% confidence: %s to %s", 100*ratio.Confidence, formatRatio(low), formatRatio(high))
	ours := r.Find(ratio.Measure, ratio.Denominator, ratio.Environment, ratio.Scenario)
	theirs := r.Find(ratio.Measure, ratio.Numerator, ratio.Environment, ratio.Scenario)
	if ours != nil && theirs != nil && ours.Distribution != nil && theirs.Distribution != nil {
		value := func(m *result.Measurement) string {
			if ratio.Statistic == "mean" {
				return table.Number(m.Distribution.Mean, m.Unit)
			}
			return table.Number(m.Distribution.P50, m.Unit)
		}
		c.figures = fmt.Sprintf("%s compared with %s", value(ours), value(theirs))
	}
	return c
}

// formatRatio formats a ratio with at most two significant digits.
func formatRatio(v float64) string {
	const ten, hundred = 10, 100
	switch {
	case v >= hundred:
		power := math.Pow(10, math.Floor(math.Log10(v))-1) // two digits
		return thousands(int(math.Round(v/power) * power))
	case v >= ten:
		return fmt.Sprintf("%.0f", v)
	default:
		return fmt.Sprintf("%.1f", v)
	}
}
