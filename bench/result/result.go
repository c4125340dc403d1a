// Package result is what benchmarks find out, as data: `fairlead-bench` and
// `fairlead-bench compare` write it as JSON, and tables and reports are made of it.
//
// # The file
//
// A file is one JSON object, a [Report]. Its fields, and those below them, are
// named as in the struct tags here; fields that are empty are left out. Numbers are
// in the unit that stands next to them, always one without a prefix: seconds,
// bytes, bytes a second, connections a second, and 1 for plain numbers.
//
//	{
//	  "schema": 1,
//	  "time": "2025-01-31T12:00:00Z",
//	  "took_seconds": 93.2,
//	  "command": ["fairlead-bench", "--services=10000"],
//	  "version": "v1.2.3",
//	  "environments": [{
//	    "name": "native", "emulated": false,
//	    "machine": {"cpu": "…", "cpus": 2, "memory_bytes": 25276030976, "architecture": "amd64"},
//	    "kernel": "6.18.44", "os": "Debian GNU/Linux 13 (trixie)", "api_server": "v1.33.1"
//	  }],
//	  "systems": [{"name": "nft", "version": "v1.2.3", "command": ["fairlead", "run", "…"]}],
//	  "measurements": [{
//	    "measure": "update-packet", "system": "nft", "environment": "native",
//	    "scenario": {"change": "replace-endpoint", "services": 10000, "endpoints": 10},
//	    "unit": "s",
//	    "samples": [0.000072, 0.000081],
//	    "distribution": {"n": 2, "min": 0.000072, "mean": 0.0000765, "p50": 0.0000765, "p90": …, "p99": …, "max": 0.000081},
//	    "values": [{"name": "cpu", "unit": "s", "value": 0.01}]
//	  }],
//	  "ratios": [{
//	    "measure": "update-packet", "statistic": "p50", "environment": "native",
//	    "scenario": {"change": "replace-endpoint", "services": 10000, "endpoints": 10},
//	    "numerator": "kube-proxy-nftables", "denominator": "nft",
//	    "ratio": 310.5, "low": 280.1, "high": 341.9, "confidence": 0.95,
//	    "numerator_samples": 20, "denominator_samples": 200, "method": "bootstrap"
//	  }],
//	  "left_out": [{"system": "ipvs", "reason": "…"}]
//	}
//
// A measurement is found by its measure, system, environment and scenario, which
// together are unique in a report. Readers must bear with measures, changes,
// values and systems that they do not know, and with fields that are new;
// "schema" becomes another number when a meaning changes.
//
// A measurement has samples and their distribution, or values only, or both. Where
// there were more than [MaxSamples] samples, "samples" is left out and the
// distribution is that of all of them.
package result

import (
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Schema is the version of the file format.
const Schema = 1

// MaxSamples is the largest number of samples of a measurement that is kept one by
// one.
const MaxSamples = 5000

// Report is all that one run found out.
type Report struct {
	// Schema is [Schema].
	Schema int `json:"schema"`
	// Time is when the run began.
	Time        time.Time `json:"time"`
	TookSeconds float64   `json:"took_seconds,omitempty"`
	// Command is the command line, with the program's name first.
	Command []string `json:"command"`
	// Version is that of the program that measured.
	Version      string        `json:"version"`
	Environments []Environment `json:"environments"`
	Systems      []System      `json:"systems"`
	Measurements []Measurement `json:"measurements"`
	Ratios       []Ratio       `json:"ratios,omitempty"`
	// LeftOut says what was asked for and not measured.
	LeftOut []LeftOut `json:"left_out,omitempty"`
	// Notes are for whoever reads the figures.
	Notes []string `json:"notes,omitempty"`
}

// Native is the name of the environment that is the machine the program ran on.
const Native = "native"

// Environment is where measurements were taken. Figures of different
// environments must not be compared.
type Environment struct {
	// Name is [Native], or that of a virtual machine such as "vm-6.12", see [VMName].
	Name string `json:"name"`
	// Emulated says that the processor was emulated, so times say nothing.
	Emulated bool    `json:"emulated"`
	Machine  Machine `json:"machine"`
	// Kernel is the kernel's release, as uname -r.
	Kernel string `json:"kernel"`
	// OS is the distribution's name for itself.
	OS string `json:"os,omitempty"`
	// APIServer is the version of the real kube-apiserver that systems followed, such as
	// "v1.33.1". Empty, they followed the benchmark's own, or none.
	APIServer string `json:"api_server,omitempty"`
	// Load is the load average over a minute when the run began.
	Load float64 `json:"load,omitempty"`
}

// Machine is the hardware, or what it is given out to be.
type Machine struct {
	CPU          string `json:"cpu"`
	CPUs         int    `json:"cpus"`
	MemoryBytes  int64  `json:"memory_bytes"`
	Architecture string `json:"architecture"`
}

// Direct is the name of the system that is none: connections go to an endpoint
// itself.
const Direct = "direct"

// System is what was measured.
type System struct {
	// Name is nft or ipvs for Fairlead's modes, kube-proxy-nftables,
	// kube-proxy-ipvs or kube-proxy-iptables, or [Direct].
	Name    string `json:"name"`
	Version string `json:"version,omitempty"`
	// Command is how its program was started. It is empty where the benchmark's own
	// process had the parts of it, without an API server in between.
	Command []string `json:"command,omitempty"`
}

// Measure says what is measured.
type Measure string

// The measures. Those in seconds are "s" in [Measurement.Unit].
const (
	// UpdateAck is the time from an event to the kernel's acknowledgement.
	UpdateAck Measure = "update-ack"
	// UpdatePacket is the time from an event until packets show it: until the first
	// connection that reaches a new endpoint, or the first that does not reach an
	// endpoint or a Service that is gone. The event is when the change is sent to the API
	// server. The value "request" in s, of a comparison, is the mean time until that has
	// answered, which may be later than the effect.
	UpdatePacket Measure = "update-packet"
	// ColdStartComplete is the time from the start, with nothing programmed, to a
	// complete ruleset, acknowledged by the kernel.
	ColdStartComplete Measure = "cold-start-complete"
	// ColdStartAnswer is the time from the start, with nothing programmed, until the
	// last of the Services answers.
	ColdStartAnswer Measure = "cold-start-last-answer"
	// ColdStartCPU is the processor time of a cold start, until the program has nothing
	// to do any more.
	ColdStartCPU Measure = "cold-start-cpu"
	// Restart is the time from the start, with everything programmed, until it is
	// known that there is nothing to do.
	Restart Measure = "restart"
	// Churn is the time from an event to its effect while events come at
	// [Scenario.Rate]: its samples are like those of UpdatePacket in a comparison,
	// and of UpdateAck otherwise. Its values are "cpu" in s, "duration" in s,
	// "changes", "commits", and "resident" in bytes.
	Churn Measure = "churn"
	// ChurnCPU is the processor time for each change while changes come at
	// [Scenario.Rate]: a sample is the mean over one period of churn.
	ChurnCPU Measure = "churn-cpu"
	// Connect is the time that connect(2) takes.
	Connect Measure = "connect"
	// ConnectRate is how many connections a second are made, one after another.
	ConnectRate Measure = "connect-rate"
	// Throughput is how many bytes a second go over one connection.
	Throughput Measure = "throughput"
	// Fairness is a chi-squared test of whether all endpoints are chosen equally
	// often. Its samples are the connections of each endpoint; its values are
	// "connections", "chi-squared", "degrees-of-freedom" and "p-value".
	Fairness Measure = "fairness"
	// Memory has the values "resident" and "peak-resident", of the program, and
	// "kernel", of what it has the kernel hold, all in bytes. Its samples, of a
	// comparison, are the resident memory after a cold start, when the program has
	// nothing to do any more.
	Memory Measure = "memory"
	// PeakMemory has samples of the most memory that was resident since the start.
	PeakMemory Measure = "peak-memory"
)

// Change is a kind of event.
type Change string

// The changes.
const (
	ReplaceEndpoint Change = "replace-endpoint" // one endpoint goes and another comes
	ScaleUp         Change = "scale-up"         // one more endpoint
	ScaleDown       Change = "scale-down"       // one endpoint less
	CreateService   Change = "create-service"   // with all its endpoints
	DeleteService   Change = "delete-service"   // with all its endpoints
)

// Scenario says under which circumstances something was measured. It is comparable.
type Scenario struct {
	Change Change `json:"change,omitempty"`
	// Services is the number of Services that there are, and Endpoints that of
	// each.
	Services  int `json:"services"`
	Endpoints int `json:"endpoints"`
	// Rate is the number of changes a second.
	Rate float64 `json:"rate,omitempty"`
}

// Measurement is what was found out about one system.
type Measurement struct {
	Measure     Measure  `json:"measure"`
	System      string   `json:"system"`
	Environment string   `json:"environment"`
	Scenario    Scenario `json:"scenario"`
	// Unit is that of the samples and of the distribution: "s", "B", "B/s", "1/s"
	// or "1".
	Unit string `json:"unit,omitempty"`
	// Samples are in the order in which they were taken.
	Samples      []float64     `json:"samples,omitempty"`
	Distribution *Distribution `json:"distribution,omitempty"`
	Values       []Value       `json:"values,omitempty"`
	Note         string        `json:"note,omitempty"`
}

// Distribution sums samples up. Percentiles are interpolated between samples.
type Distribution struct {
	N    int     `json:"n"`
	Min  float64 `json:"min"`
	Mean float64 `json:"mean"`
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P99  float64 `json:"p99"`
	Max  float64 `json:"max"`
}

// Value is a number with a name.
type Value struct {
	Name  string  `json:"name"`
	Unit  string  `json:"unit"`
	Value float64 `json:"value"`
}

// Ratio compares two systems in one environment and scenario.
type Ratio struct {
	Measure Measure `json:"measure"`
	// Statistic is what is compared: "p50", "p90", "p99", "mean", or the name of a
	// [Value]. "paired-p50" is the median of the ratios of samples that were taken one
	// right after the other, which have the same noise of the machine in them.
	Statistic   string   `json:"statistic"`
	Environment string   `json:"environment"`
	Scenario    Scenario `json:"scenario"`
	// Numerator and Denominator are names of systems: a ratio of 2 says that the
	// statistic of the numerator is twice that of the denominator.
	Numerator   string `json:"numerator"`
	Denominator string `json:"denominator"`
	Interval
	NumeratorSamples   int `json:"numerator_samples"`
	DenominatorSamples int `json:"denominator_samples"`
	// Method is how the interval was found, such as "bootstrap".
	Method string `json:"method"`
}

// Interval is a ratio with its confidence interval.
type Interval struct {
	Ratio float64 `json:"ratio"`
	Low   float64 `json:"low"`
	High  float64 `json:"high"`
	// Confidence is that of Low to High, such as 0.95.
	Confidence float64 `json:"confidence"`
}

// LeftOut is something that was asked for and not measured.
type LeftOut struct {
	System  string  `json:"system,omitempty"`
	Measure Measure `json:"measure,omitempty"`
	// Environment is where it was to be measured.
	Environment string `json:"environment,omitempty"`
	Reason      string `json:"reason"`
}

// Value returns the value of the name.
func (m *Measurement) Value(name string) (Value, bool) {
	for _, v := range m.Values {
		if v.Name == name {
			return v, true
		}
	}
	return Value{}, false
}

// Find returns the measurement, or nil if there is none.
func (r *Report) Find(measure Measure, system, environment string, scenario Scenario) *Measurement {
	for i := range r.Measurements {
		m := &r.Measurements[i]
		if m.Measure == measure && m.System == system && m.Environment == environment && m.Scenario == scenario {
			return m
		}
	}
	return nil
}

// Write writes the report as JSON.
func (r *Report) Write(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	if err := e.Encode(r); err != nil {
		return fmt.Errorf("write the results: %w", err)
	}
	return nil
}

// Read reads a report that [Report.Write] has written.
func Read(from io.Reader) (*Report, error) {
	var r Report
	if err := json.NewDecoder(from).Decode(&r); err != nil {
		return nil, fmt.Errorf("read results: %w", err)
	}
	if r.Schema != Schema {
		return nil, fmt.Errorf("read results: schema %d, want %d", r.Schema, Schema)
	}
	return &r, nil
}
