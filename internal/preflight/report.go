package preflight

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// Status is the result of a check.
type Status string

// The results, from best to worst. Only [Failed] makes the report fail.
const (
	OK      Status = "ok"
	Info    Status = "info"
	Warning Status = "warning"
	Failed  Status = "failed"
)

// Finding is one result of a check.
type Finding struct {
	// Check names the subject, such as kernel or forward-policy.
	Check  string `json:"check"`
	Status Status `json:"status"`
	// Message describes the finding and its consequence.
	Message string `json:"message"`
	// Fix is a command or an instruction, empty if no fix is needed.
	Fix string `json:"fix,omitempty"`
}

// Report is the result of all checks.
type Report struct {
	Findings []Finding `json:"findings"`
}

// Failed reports whether a check has failed.
func (r *Report) Failed() bool {
	return slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Status == Failed })
}

// Add adds a finding.
func (r *Report) Add(check string, status Status, fix, format string, args ...any) {
	r.Findings = append(r.Findings, Finding{Check: check, Status: status, Message: fmt.Sprintf(format, args...), Fix: fix})
}

// WriteJSON writes the report as a JSON object.
func (r *Report) WriteJSON(w io.Writer) error {
	result := OK
	if r.Failed() {
		result = Failed
	}
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(struct {
		Result Status `json:"result"`
		*Report
	}{result, r})
}

// WriteTable writes the report as a table, with each fix in the row below its finding.
func (r *Report) WriteTable(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "STATUS\tCHECK\tFINDING") // errors remain until Flush
	for _, f := range r.Findings {
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\n", f.Status, f.Check, f.Message)
		if f.Fix != "" {
			_, _ = fmt.Fprintf(table, "\t\tfix: %s\n", f.Fix)
		}
	}
	return table.Flush()
}
