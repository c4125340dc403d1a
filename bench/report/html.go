package report

import (
	_ "embed" // the page
	"fmt"
	"html/template"
	"io"
	"math"
	"slices"
	"strings"

	"fairlead/bench/result"
	"fairlead/bench/table"
)

//go:embed page.html
var page string

// WriteHTML writes a report as one page, with its charts in it. It reads well on
// phones and in print, in light and dark, and loads nothing.
func WriteHTML(w io.Writer, r *result.Report) error {
	t, err := template.New("page").Funcs(template.FuncMap{
		"number": table.Number, "label": func(system string) string { return lookOf(system).label },
		"thousands": thousands, "bytes": func(n int64) string { return table.Number(float64(n), "B") },
		"command": func(words []string) string { return strings.Join(words, " ") },
	}).Parse(page)
	if err != nil {
		return fmt.Errorf("write the report as a page: %w", err)
	}
	p, err := newPage(r)
	if err != nil {
		return err
	}
	if err := t.Execute(w, p); err != nil {
		return fmt.Errorf("write the report as a page: %w", err)
	}
	return nil
}

// content is what the page is made of.
type content struct {
	Report       *result.Report
	Colours      template.CSS
	Title        string
	Environments []environment
}

// environment is what was measured in one.
type environment struct {
	result.Environment
	Several  bool
	Claims   []claim
	ClaimsAt string
	Sections []shown
	Ratios   []result.Ratio
	Measured []*result.Measurement
	LeftOut  []result.LeftOut
}

// claim is a key figure.
type claim struct {
	Ratio, Than, What, Interval, Figures string
	Worse                                bool
}

type shown struct {
	ID, Title, Text string
	Figures         []shownFigure
}

type shownFigure struct {
	Caption      string
	Wide, Narrow template.HTML
}

func newPage(r *result.Report) (*content, error) {
	face, err := newTypeface()
	if err != nil {
		return nil, err
	}
	dark := css(":root", true)
	c := &content{
		Report: r, Title: "How fast is Fairlead?",
		Colours: template.CSS(css(":root", false) + "@media screen and (prefers-color-scheme:dark){" + dark + "}"), //nolint:gosec // constants
	}
	if len(r.Ratios) > 0 {
		c.Title = "Fairlead and kube-proxy, side by side"
	}
	for _, e := range r.Environments {
		env := environment{Environment: e, Several: len(r.Environments) > 1}
		for i := range r.Measurements {
			if r.Measurements[i].Environment == e.Name {
				env.Measured = append(env.Measured, &r.Measurements[i])
			}
		}
		for _, ratio := range r.Ratios {
			if ratio.Environment == e.Name {
				env.Ratios = append(env.Ratios, ratio)
			}
		}
		for _, l := range r.LeftOut {
			if l.Environment == e.Name || l.Environment == "" {
				env.LeftOut = append(env.LeftOut, l)
			}
		}
		env.Claims, env.ClaimsAt = claims(r, e.Name)
		for _, s := range sections(r, e.Name) {
			one := shown{ID: e.Name + "-" + s.id, Title: s.title, Text: s.text}
			for _, f := range s.figures {
				wide, err := face.svg(f.chart, pictureWidth)
				if err != nil {
					return nil, err
				}
				narrow, err := face.svg(f.chart, narrowWidth)
				if err != nil {
					return nil, err
				}
				one.Figures = append(one.Figures, shownFigure{
					Caption: f.caption,
					Wide:    template.HTML(inline(wide, "wide", f.chart.title())),     //nolint:gosec // drawn here
					Narrow:  template.HTML(inline(narrow, "narrow", f.chart.title())), //nolint:gosec // drawn here
				})
			}
			env.Sections = append(env.Sections, one)
		}
		c.Environments = append(c.Environments, env)
	}
	return c, nil
}

// claims returns the key figures: Fairlead against kube-proxy's nftables mode,
// with the most Services.
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
				ratio.Numerator == than && ratio.Denominator == "nft" && (best < 0 || ratio.Scenario.Services > r.Ratios[best].Scenario.Services) {
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

func claimOf(r *result.Report, ratio result.Ratio, better, what string) claim {
	c := claim{Than: better, What: what}
	if ratio.Scenario.Rate > 0 {
		c.What += fmt.Sprintf(", at %s changes a second", thousands(int(ratio.Scenario.Rate)))
	}
	v, low, high := ratio.Ratio, ratio.Low, ratio.High
	if v < 1 {
		c.Worse = true
		v, low, high = 1/v, 1/high, 1/low
		c.Than = map[string]string{"faster": "slower", "less processor time": "more processor time", "less memory": "more memory"}[better]
	}
	c.Ratio = factor(v) + "×"
	c.Interval = fmt.Sprintf("%.0f %% confidence: %s to %s", 100*ratio.Confidence, factor(low), factor(high))
	ours := r.Find(ratio.Measure, ratio.Denominator, ratio.Environment, ratio.Scenario)
	theirs := r.Find(ratio.Measure, ratio.Numerator, ratio.Environment, ratio.Scenario)
	if ours != nil && theirs != nil && ours.Distribution != nil && theirs.Distribution != nil {
		value := func(m *result.Measurement) string {
			if ratio.Statistic == "mean" {
				return table.Number(m.Distribution.Mean, m.Unit)
			}
			return table.Number(m.Distribution.P50, m.Unit)
		}
		c.Figures = fmt.Sprintf("%s against %s", value(ours), value(theirs))
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

// Percent is for the page: the confidence of its ratios.
func (e environment) Percent() string {
	i := slices.IndexFunc(e.Ratios, func(r result.Ratio) bool { return r.Confidence > 0 })
	if i < 0 {
		return ""
	}
	return fmt.Sprintf("%.0f %%", 100*e.Ratios[i].Confidence)
}

// Factor is for the page.
func (environment) Factor(v float64) string { return factor(v) }
