package apiload

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Measurement is the load of one client in one case.
type Measurement struct {
	// Case is what happened, and Client who received it.
	Case, Client string
	// Times is how often it happened; the other fields are sums. 0 means once.
	Times int
	// Requests counts the client's requests by operation.
	Requests Requests
	// Traffic is the number of bytes on the client's link.
	Traffic Traffic
	// CPU is the API server's processor time, without its idle time.
	CPU time.Duration
	// Connections is the number of TCP connections at the end.
	Connections int
	// SliceEvents is the number of changes of EndpointSlices.
	SliceEvents int
	// Memory is the growth of the API server's resident memory in bytes.
	Memory int64
}

// Report is the result of a measurement.
type Report struct {
	Nodes, Services, Endpoints int
	Measurements               []Measurement
}

func (r *Report) add(m Measurement) { r.Measurements = append(r.Measurements, m) }

// row is the mean of the measurements of a case and a client.
type row struct {
	measured    string
	client      string
	samples     []Measurement
	times       float64
	requests    Requests
	received    float64
	sent        float64
	cpu         []time.Duration // for each occurrence
	connections int
	events      float64
	memory      float64
}

// rows returns the cases in the order in which they were first measured.
func (r *Report) rows() []*row {
	var rows []*row
	for _, m := range r.Measurements {
		i := slices.IndexFunc(rows, func(w *row) bool { return w.measured == m.Case && w.client == m.Client })
		if i < 0 {
			i = len(rows)
			rows = append(rows, &row{measured: m.Case, client: m.Client, requests: Requests{}})
		}
		w, times := rows[i], max(1, m.Times)
		w.samples = append(w.samples, m)
		w.times += float64(times)
		for name, n := range m.Requests {
			w.requests[name] += n
		}
		w.received += float64(m.Traffic.Received)
		w.sent += float64(m.Traffic.Sent)
		w.cpu = append(w.cpu, m.CPU/time.Duration(times))
		w.connections = max(w.connections, m.Connections)
		w.events += float64(m.SliceEvents)
		w.memory += float64(m.Memory)
	}
	for _, w := range rows {
		slices.Sort(w.cpu)
	}
	return rows
}

// Write writes the measurements as a Markdown table, for one occurrence of each case.
func (r *Report) Write(out io.Writer) error {
	t := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	_, _ = fmt.Fprintf(t, "| %d Nodes, %d Services, %d endpoints each |\t client |\t requests |\t received |\t sent |\t API server's processor time |\t other |\n", r.Nodes, r.Services, r.Endpoints)
	_, _ = fmt.Fprintln(t, "|---|\t---|\t---|\t---|\t---|\t---|\t---|")
	for _, w := range r.rows() {
		_, _ = fmt.Fprintf(t, "| %s |\t %s |\t %s |\t %s |\t %s |\t %s |\t %s |\n",
			w.measured, w.client, number(float64(w.requests.total())/w.times), formatBytes(w.received/w.times), formatBytes(w.sent/w.times), w.processor(), w.other())
	}
	for _, w := range r.rows() {
		if w.requests.total() > 0 {
			_, _ = fmt.Fprintf(t, "\n%s, %s, %d times: %s\n", w.measured, w.client, int(w.times), w.requests)
		}
	}
	return t.Flush() // reports errors of the writes too
}

// processor returns the median and the range of the processor time.
func (w *row) processor() string {
	low, median, high := w.cpu[0], w.cpu[len(w.cpu)/2], w.cpu[len(w.cpu)-1]
	switch {
	case high == 0:
		return "–"
	case len(w.cpu) == 1:
		return milliseconds(median)
	default:
		return fmt.Sprintf("%s (%s to %s)", milliseconds(median), milliseconds(low), milliseconds(high))
	}
}

// other returns the values that only some cases have.
func (w *row) other() string {
	var parts []string
	if w.connections > 0 {
		parts = append(parts, fmt.Sprintf("%d connections", w.connections))
	}
	if w.events > 0 {
		parts = append(parts, number(w.events/w.times)+" EndpointSlice events")
	}
	if w.memory != 0 {
		parts = append(parts, formatBytes(w.memory/w.times)+" of memory")
	}
	return strings.Join(parts, ", ")
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond))
}

func number(f float64) string { return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") }

// formatBytes formats a number of bytes in powers of ten.
func formatBytes(n float64) string {
	const kilo, mega = 1e3, 1e6
	switch {
	case n >= mega:
		return fmt.Sprintf("%.2f MB", n/mega)
	case n >= kilo:
		return fmt.Sprintf("%.1f kB", n/kilo)
	default:
		return fmt.Sprintf("%.0f B", n)
	}
}
