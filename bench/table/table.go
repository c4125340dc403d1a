// Package table writes benchmark results as text tables.
package table

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"

	"fairlead.io/fairlead/bench/result"
)

// Write writes a report: the environments, a table for each measure, and the ratios.
func Write(w io.Writer, r *result.Report) error {
	t := &writer{to: w, marks: map[string]string{}}
	t.printf("%s\n", strings.Join(r.Command, " "))
	t.printf("Fairlead %s, %s, %.0f s\n", r.Version, r.Time.Format("2006-01-02 15:04 MST"), r.TookSeconds)
	for _, e := range r.Environments {
		description := []string{
			fmt.Sprintf("%d × %s", e.Machine.CPUs, e.Machine.CPU), Number(float64(e.Machine.MemoryBytes), "B") + " of memory", "Linux " + e.Kernel,
			e.OS, fmt.Sprintf("load %.2f", e.Load),
		}
		mark := ""
		if e.Name != result.Native {
			mark = e.Name
		}
		if e.Emulated {
			description = append(description, "processor emulated: times are meaningless, ratios unreliable")
			mark = e.Name + ", emulated"
		}
		t.marks[e.Name] = mark
		t.printf("%s: %s\n", e.Name, joinNonEmpty(", ", description...))
		if e.APIServer != "" {
			t.printf("%s: with a real kube-apiserver %s for each system\n", e.Name, e.APIServer)
		}
	}
	for _, group := range groups(r.Measurements) {
		t.group(group)
	}
	t.ratios(r.Ratios)
	for _, l := range r.LeftOut {
		t.printf("\nnot measured: %s: %s", joinNonEmpty(" ", l.System, string(l.Measure), l.Environment), l.Reason)
	}
	if len(r.LeftOut) > 0 {
		t.printf("\n")
	}
	for _, n := range r.Notes {
		t.printf("\n%s\n", n)
	}
	return t.err
}

// joinNonEmpty joins the non-empty words.
func joinNonEmpty(separator string, words ...string) string {
	return strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), separator)
}

// writer writes formatted text and keeps the first error.
type writer struct {
	to io.Writer
	// marks has a label for the figures of each environment, empty for this machine.
	marks map[string]string
	err   error
}

func (t *writer) printf(format string, args ...any) {
	if t.err == nil {
		_, t.err = fmt.Fprintf(t.to, format, args...)
	}
}

// rows writes rows with aligned columns.
func (t *writer) rows(rows [][]string) {
	if t.err != nil {
		return
	}
	const padding = 2
	tabs := tabwriter.NewWriter(t.to, 0, 0, padding, ' ', 0)
	var errs []error
	for _, row := range rows {
		_, err := fmt.Fprintln(tabs, strings.TrimRight(strings.Join(row, "\t"), "\t"))
		errs = append(errs, err)
	}
	t.err = errors.Join(append(errs, tabs.Flush())...)
}

// groups returns the measurements grouped by measure, in the order of the report.
func groups(all []result.Measurement) [][]result.Measurement {
	var order []result.Measure
	byMeasure := map[result.Measure][]result.Measurement{}
	for _, m := range all {
		if byMeasure[m.Measure] == nil {
			order = append(order, m.Measure)
		}
		byMeasure[m.Measure] = append(byMeasure[m.Measure], m)
	}
	grouped := make([][]result.Measurement, 0, len(order))
	for _, measure := range order {
		grouped = append(grouped, byMeasure[measure])
	}
	return grouped
}

// measureTitle returns a description of a measure.
func measureTitle(m result.Measure) string {
	switch m {
	case result.UpdateAck:
		return "time from the event to the kernel's acknowledgement"
	case result.UpdatePacket:
		return "time from the event to the first packet that shows it"
	case result.WakeUp:
		return "round trip to a sleeping thread, after the same pause as before an update"
	case result.ColdStartComplete:
		return "cold start until the kernel has acknowledged everything"
	case result.ColdStartAnswer:
		return "cold start until the last Service answers"
	case result.ColdStartCPU:
		return "processor time of a cold start, until the program is idle"
	case result.Restart:
		return "warm restart with nothing to change"
	case result.Churn:
		return "time from an event to its effect, under churn"
	case result.ChurnCPU:
		return "processor time per event, under churn"
	case result.FirstPacket:
		return "time of the first packet of a connection, from the client to the endpoint"
	case result.Connect:
		return "connect(2)"
	case result.ConnectRate:
		return "sequential connections"
	case result.Throughput:
		return "throughput of one connection"
	case result.PacketTime:
		return "time of a UDP packet of 64 bytes of an established flow"
	case result.TransferTime:
		return "time to send 1 GiB over an established TCP connection"
	case result.Fairness:
		return "connections per endpoint"
	case result.Memory:
		return "memory held"
	case result.PeakMemory:
		return "peak resident memory"
	default:
		return ""
	}
}

// group writes the measurements of one measure.
func (t *writer) group(group []result.Measurement) {
	t.printf("\n%s", group[0].Measure)
	if title := measureTitle(group[0].Measure); title != "" {
		t.printf(": %s", title)
	}
	t.printf("\n")
	distributions := false
	for _, m := range group {
		distributions = distributions || m.Distribution != nil
	}
	head := []string{"  system", "scenario"}
	if distributions {
		head = append(head, "p50", "p90", "p99", "max", "n")
	}
	rows := [][]string{head}
	for _, m := range group {
		row := []string{"  " + m.System, Scenario(m.Scenario)}
		if mark := t.marks[m.Environment]; mark != "" {
			row[0] += " (" + mark + ")"
		}
		if d := m.Distribution; d != nil {
			for _, v := range []float64{d.P50, d.P90, d.P99, d.Max} {
				row = append(row, Number(v, m.Unit))
			}
			row = append(row, fmt.Sprint(d.N))
		} else if distributions {
			row = append(row, "", "", "", "", "")
		}
		var values []string
		for _, v := range m.Values {
			values = append(values, v.Name+" "+Number(v.Value, v.Unit))
		}
		if m.Note != "" {
			values = append(values, m.Note)
		}
		rows = append(rows, append(row, strings.Join(values, ", ")))
	}
	t.rows(rows)
}

func (t *writer) ratios(ratios []result.Ratio) {
	if len(ratios) == 0 {
		return
	}
	t.printf("\nratios with their %.0f %% confidence intervals\n", 100*ratios[0].Confidence)
	rows := [][]string{{"  measure", "scenario", "", "ratio", "interval", ""}}
	for _, r := range ratios {
		rows = append(rows, []string{
			"  " + string(r.Measure) + " " + r.Statistic, Scenario(r.Scenario), r.Numerator + " / " + r.Denominator,
			Number(r.Ratio, "1"), Number(r.Low, "1") + " to " + Number(r.High, "1"), t.marks[r.Environment],
		})
	}
	t.rows(rows)
}

// Scenario returns a short description of a scenario.
func Scenario(s result.Scenario) string {
	description := fmt.Sprintf("%d × %d", s.Services, s.Endpoints)
	if s.Change != "" {
		description = string(s.Change) + ", " + description
	}
	if s.Rate != 0 {
		description += fmt.Sprintf(", %g/s", s.Rate)
	}
	if s.Destination != "" {
		description = string(s.Destination) + ", " + description
	}
	return description
}

// Number formats a number of the given unit with three significant digits and a suitable prefix:
// 0.000123 of the unit s is 123 µs.
func Number(v float64, unit string) string {
	if (unit == "1" || unit == "B") && v == math.Trunc(v) && math.Abs(v) < 1000 {
		return strings.TrimSpace(fmt.Sprintf("%.0f %s", v, strings.TrimPrefix(unit, "1")))
	}
	switch unit {
	case "s":
		for _, u := range []struct {
			scale float64
			name  string
		}{{1, "s"}, {1e-3, "ms"}} {
			if math.Abs(v) >= u.scale || v == 0 {
				return digits(v/u.scale) + " " + u.name
			}
		}
		return digits(v*1e6) + " µs"
	case "B", "B/s":
		for _, u := range []struct {
			scale float64
			name  string
		}{{1e9, "G"}, {1e6, "M"}, {1e3, "k"}} {
			if math.Abs(v) >= u.scale {
				return digits(v/u.scale) + " " + u.name + unit
			}
		}
		return digits(v) + " " + unit
	case "1", "":
		return digits(v)
	case "1/s":
		return digits(v) + "/s"
	default:
		return digits(v) + " " + unit
	}
}

// digits formats a number with three significant digits, or with all digits before the decimal
// point.
func digits(v float64) string {
	switch a := math.Abs(v); {
	case a >= 99.95 || a == 0:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.9995:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.3g", v)
	}
}
