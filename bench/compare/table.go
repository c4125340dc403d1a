package compare

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"fairlead/bench/result"
)

// Table writes a report for people.
func Table(w io.Writer, r *result.Report) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(t, "measure\tServices\tsystem\tn\tp50\tp90\tp99\tmax\t")
	for i := range r.Measurements {
		m := &r.Measurements[i]
		d := m.Distribution
		if d == nil {
			continue
		}
		_, _ = fmt.Fprintf(t, "%s\t%d\t%s\t%d\t%s\t%s\t%s\t%s\t\n", what(m.Measure, m.Scenario), m.Scenario.Services, m.System, d.N,
			quantity(d.P50, m.Unit), quantity(d.P90, m.Unit), quantity(d.P99, m.Unit), quantity(d.Max, m.Unit))
	}
	_, _ = fmt.Fprintln(t, "\t\t\t\t\t\t\t\t")
	_, _ = fmt.Fprintln(t, "ratio\tServices\tof\tto\tof\tratio\t95 % confidence\t\t")
	for _, q := range r.Ratios {
		_, _ = fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\t%s to %s\t\t\n", what(q.Measure, q.Scenario), q.Scenario.Services,
			q.Numerator, q.Denominator, q.Statistic, times(q.Ratio), times(q.Low), times(q.High))
	}
	for _, l := range r.LeftOut {
		_, _ = fmt.Fprintf(t, "left out: %s %s: %s\n", l.System, l.Measure, l.Reason)
	}
	return t.Flush()
}

func what(m result.Measure, s result.Scenario) string {
	text := string(m)
	if s.Change != "" {
		text += " " + string(s.Change)
	}
	if s.Rate > 0 {
		text += fmt.Sprintf(" %g/s", s.Rate)
	}
	return text
}

// quantity writes a number with its unit.
func quantity(v float64, unit string) string {
	switch unit {
	case "s":
		d := time.Duration(v * float64(time.Second))
		switch {
		case d < time.Millisecond:
			return d.Round(time.Microsecond / 10).String()
		case d < time.Second:
			return d.Round(10 * time.Microsecond).String()
		default:
			return d.Round(10 * time.Millisecond).String()
		}
	case "B":
		return fmt.Sprintf("%.1f MB", v/1e6)
	default:
		return fmt.Sprintf("%.3g %s", v, unit)
	}
}

func times(v float64) string { return fmt.Sprintf("%.3g", v) }
