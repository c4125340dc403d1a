package report

import (
	_ "embed" // the style
	"fmt"
	"io"
	"math"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/table"
)

//go:embed page.css
var style string

// WriteHTML writes a report as one page, with its charts in it. It reads well on
// phones and in print, in light and dark, and loads nothing.
func WriteHTML(w io.Writer, r *result.Report) error {
	p, err := newPage(r)
	if err != nil {
		return err
	}
	if err := p.node().Render(w); err != nil {
		return fmt.Errorf("write the report as a page: %w", err)
	}
	return nil
}

// page is what there is to show.
type page struct {
	report       *result.Report
	title        string
	environments []environment
}

// environment is what was measured in one.
type environment struct {
	result.Environment
	several  bool
	claims   []claim
	claimsAt string
	sections []shown
	ratios   []result.Ratio
	measured []*result.Measurement
	leftOut  []result.LeftOut
}

// claim is a key figure.
type claim struct {
	ratio, than, what, interval, figures string
	worse                                bool
}

type shown struct {
	id, title, text string
	figures         []shownFigure
}

type shownFigure struct {
	caption      string
	wide, narrow []byte // SVG
}

func newPage(r *result.Report) (*page, error) {
	face, err := newTypeface()
	if err != nil {
		return nil, err
	}
	p := &page{report: r, title: "How fast is Fairlead?"}
	if len(r.Ratios) > 0 {
		p.title = "Fairlead and kube-proxy, side by side"
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
			env.claims, env.claimsAt = claims(r, e.Name)
		}
		for _, s := range sections(r, e.Name) {
			one := shown{id: e.Name + "-" + s.id, title: s.title, text: s.text}
			for _, f := range s.figures {
				drawn, err := face.shown(f)
				if err != nil {
					return nil, err
				}
				one.figures = append(one.figures, drawn)
			}
			env.sections = append(env.sections, one)
		}
		p.environments = append(p.environments, env)
	}
	return p, nil
}

// shown draws a figure for the page, for wide screens and for narrow ones.
func (f *typeface) shown(of figure) (shownFigure, error) {
	wide, err := f.svg(of.chart, pictureWidth)
	if err != nil {
		return shownFigure{}, err
	}
	narrow, err := f.svg(of.chart, narrowWidth)
	if err != nil {
		return shownFigure{}, err
	}
	title := of.chart.title()
	return shownFigure{of.caption, inline(wide, "wide", title), inline(narrow, "narrow", title)}, nil
}

// claims returns the key figures: Fairlead against kube-proxy's nftables mode,
// with the most Services, and of several rates at the one that is worst for Fairlead.
func claims(r *result.Report, environment string) (list []claim, at string) {
	const than = "kube-proxy-nftables"
	for _, one := range []struct {
		measure      result.Measure
		change       result.Change
		better, what string
	}{
		{result.UpdatePacket, result.ReplaceEndpoint, "faster", "An update: from the event to the first packet at the new endpoint"},
		{result.ColdStartAnswer, "", "faster", "A cold start, until the last Service answers"},
		{result.ChurnCPU, result.ReplaceEndpoint, "less processor time", "For each change under churn"},
		{result.Memory, "", "less memory", "Resident after a start"},
	} {
		best := -1
		for i, ratio := range r.Ratios {
			if ratio.Environment == environment && ratio.Measure == one.measure && ratio.Scenario.Change == one.change &&
				ratio.Numerator == than && ratio.Denominator == "nft" && (best < 0 || rather(ratio, r.Ratios[best])) {
				best = i
			}
		}
		if best < 0 {
			continue
		}
		ratio := r.Ratios[best]
		if at == "" {
			at = circumstances(ratio.Scenario)
		}
		if circumstances(ratio.Scenario) == at {
			list = append(list, claimOf(r, ratio, one.better, one.what))
		}
	}
	return list, at
}

// rather says whether a ratio is the one to tell of, rather than another.
func rather(a, b result.Ratio) bool {
	if a.Scenario.Services != b.Scenario.Services {
		return a.Scenario.Services > b.Scenario.Services
	}
	return a.Ratio < b.Ratio
}

func claimOf(r *result.Report, ratio result.Ratio, better, what string) claim {
	c := claim{than: better, what: what}
	if ratio.Scenario.Rate > 0 {
		c.what += fmt.Sprintf(", at %s changes a second", thousands(int(ratio.Scenario.Rate)))
	}
	v, low, high := ratio.Ratio, ratio.Low, ratio.High
	if v < 1 {
		c.worse = true
		v, low, high = 1/v, 1/high, 1/low
		c.than = map[string]string{"faster": "slower", "less processor time": "more processor time", "less memory": "more memory"}[better]
	}
	c.ratio = factor(v) + "×"
	c.interval = fmt.Sprintf("%.0f %% confidence: %s to %s", 100*ratio.Confidence, factor(low), factor(high))
	ours := r.Find(ratio.Measure, ratio.Denominator, ratio.Environment, ratio.Scenario)
	theirs := r.Find(ratio.Measure, ratio.Numerator, ratio.Environment, ratio.Scenario)
	if ours != nil && theirs != nil && ours.Distribution != nil && theirs.Distribution != nil {
		value := func(m *result.Measurement) string {
			if ratio.Statistic == "mean" {
				return table.Number(m.Distribution.Mean, m.Unit)
			}
			return table.Number(m.Distribution.P50, m.Unit)
		}
		c.figures = fmt.Sprintf("%s against %s", value(ours), value(theirs))
	}
	return c
}

// factor writes a ratio with no more digits than it is worth.
func factor(v float64) string {
	const few, some = 10, 100
	switch {
	case v >= some:
		power := math.Pow(10, math.Floor(math.Log10(v))-1) // two digits
		return thousands(int(math.Round(v/power) * power))
	case v >= few:
		return fmt.Sprintf("%.0f", v)
	default:
		return fmt.Sprintf("%.1f", v)
	}
}
