// Package result defines the results of benchmarks: `fairlead-bench` and `fairlead-bench
// compare` write them as JSON, and tables and HTML reports show them.
//
// # File format
//
// A file contains one JSON object, a [Report]. The struct tags in this package name the
// fields; empty fields are omitted. Each number has the unit in the field beside it, which
// never has a prefix: seconds, bytes, bytes per second, connections per second, or 1 for
// plain numbers.
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
// The measure, system, environment and scenario identify a measurement and are together
// unique in a report. Readers must ignore unknown measures, changes, values, systems and
// fields. If the meaning of a field changes, "schema" changes too.
//
// A measurement has samples with their distribution, or values, or both. With more than
// [MaxSamples] samples, "samples" is omitted and the distribution covers all samples.
package result

import (
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Schema is the version of the file format.
const Schema = 1

// MaxSamples is the largest number of samples of a measurement that a report keeps.
const MaxSamples = 5000

// Report holds the results of one run.
type Report struct {
	// Schema is the constant [Schema].
	Schema int `json:"schema"`
	// Time is the start of the run.
	Time        time.Time `json:"time"`
	TookSeconds float64   `json:"took_seconds,omitempty"`
	// Command is the command line, starting with the program's name.
	Command []string `json:"command"`
	// Version is the version of the program that ran the benchmarks.
	Version      string        `json:"version"`
	Environments []Environment `json:"environments"`
	Systems      []System      `json:"systems"`
	Measurements []Measurement `json:"measurements"`
	Ratios       []Ratio       `json:"ratios,omitempty"`
	// LeftOut lists requested measurements that were not taken, with the reasons.
	LeftOut []LeftOut `json:"left_out,omitempty"`
	// Notes are remarks for readers of the results.
	Notes []string `json:"notes,omitempty"`
}

// Native is the name of the environment of the machine that the program ran on.
const Native = "native"

// Environment describes where measurements were taken. Results of different environments must not
// be compared.
type Environment struct {
	// Name is [Native] or the name of a virtual machine such as "vm-6.12", see [VMName].
	Name string `json:"name"`
	// Emulated reports whether the processor was emulated, which makes times meaningless.
	Emulated bool    `json:"emulated"`
	Machine  Machine `json:"machine"`
	// Kernel is the kernel release, as printed by uname -r.
	Kernel string `json:"kernel"`
	// OS is the distribution's PRETTY_NAME.
	OS string `json:"os,omitempty"`
	// APIServer is the version of the real kube-apiserver that the systems watched, such as
	// "v1.33.1". It is empty if they watched the benchmark's own API server, or none.
	APIServer string `json:"api_server,omitempty"`
	// Load is the one-minute load average at the start of the run.
	Load float64 `json:"load,omitempty"`
}

// Machine describes the hardware as the kernel reports it.
type Machine struct {
	CPU          string `json:"cpu"`
	CPUs         int    `json:"cpus"`
	MemoryBytes  int64  `json:"memory_bytes"`
	Architecture string `json:"architecture"`
}

// Direct is the name of the system without a Service proxy: clients connect to endpoints directly.
const Direct = "direct"

// System describes a measured system.
type System struct {
	// Name is nft or ipvs for Fairlead's modes, nft-flow-offload for the mode nft with
	// --flow-offload=software, kube-proxy-nftables, kube-proxy-ipvs or
	// kube-proxy-iptables, or [Direct].
	Name    string `json:"name"`
	Version string `json:"version,omitempty"`
	// Command is the command line that started the program. It is empty if the benchmark ran
	// Fairlead's pipeline in its own process, without an API server.
	Command []string `json:"command,omitempty"`
}

// Measure is the name of a measured quantity.
type Measure string

// Measures. Times have the [Measurement.Unit] "s".
const (
	// UpdateAck is the time from an event until the kernel acknowledges the change.
	UpdateAck Measure = "update-ack"
	// UpdatePacket is the time from an event until packets show its effect: the first connection
	// that reaches a new endpoint, or the first that no longer reaches a removed endpoint or
	// Service. The event is the write of an API server in the benchmark's process to the watch, or the
	// request to a real API server. In a comparison, the value "request" in s is the mean time until
	// the API server has answered the request, which may be after the effect.
	UpdatePacket Measure = "update-packet"
	// WakeUp is the time of a round trip to a sleeping thread over TCP on loopback, after the same pause
	// as before each change of UpdatePacket: two wake-ups without any work. An update needs at least
	// one. The system is [Direct].
	WakeUp Measure = "wake-up"
	// ColdStartComplete is the time from a cold start until the kernel has acknowledged the
	// complete ruleset.
	ColdStartComplete Measure = "cold-start-complete"
	// ColdStartAnswer is the time from a cold start until the last Service answers.
	ColdStartAnswer Measure = "cold-start-last-answer"
	// ColdStartCPU is the processor time of a cold start, until the program is idle.
	ColdStartCPU Measure = "cold-start-cpu"
	// Restart is the time from a warm restart until the program knows that nothing needs to change.
	Restart Measure = "restart"
	// Churn is the time from an event until its effect while events occur at [Scenario.Rate]. The
	// effect is the same as for UpdatePacket in a comparison, and for UpdateAck otherwise. Its
	// values are "cpu" in s, "duration" in s, "changes", "commits", and "resident" in bytes.
	Churn Measure = "churn"
	// ChurnCPU is the processor time per change while changes occur at [Scenario.Rate]. Each sample
	// is the mean of one period of churn.
	ChurnCPU Measure = "churn-cpu"
	// FirstPacket is the mean time of the first packet of a connection (TCP SYN), from the sender's system
	// call until it arrives at the host of the endpoints.
	FirstPacket Measure = "first-packet"
	// Connect is the duration of connect(2).
	Connect Measure = "connect"
	// ConnectRate is the number of sequential connections per second.
	ConnectRate Measure = "connect-rate"
	// Throughput is the number of bytes per second over one connection.
	Throughput Measure = "throughput"
	// PacketTime is the mean time of a UDP packet of 64 bytes of an established flow, from the sender's
	// system call to the receiver's socket: the inverse of the packets per second of one sender.
	PacketTime Measure = "packet-time"
	// TransferTime is the time to send 1 GiB over an established TCP connection.
	TransferTime Measure = "transfer-time"
	// Fairness is a chi-squared test of whether all endpoints are selected equally often. Its
	// samples are the numbers of connections to each endpoint. Its values are "connections",
	// "chi-squared", "degrees-of-freedom" and "p-value".
	Fairness Measure = "fairness"
	// Memory has the values "resident" and "peak-resident" of the program, and "kernel" of the
	// memory that the kernel holds for the program, all in bytes. In a comparison, its samples are
	// the resident memory after a cold start, when the program is idle.
	Memory Measure = "memory"
	// PeakMemory is the largest resident memory since the start of the program.
	PeakMemory Measure = "peak-memory"
)

// Change identifies a kind of event.
type Change string

// Changes.
const (
	ReplaceEndpoint Change = "replace-endpoint" // one endpoint is removed and another added
	// ReplaceOnlyEndpoint is ReplaceEndpoint for an additional Service with one endpoint. The first
	// packet after the effect shows it. With ten endpoints, only each tenth packet does.
	ReplaceOnlyEndpoint Change = "replace-only-endpoint"
	ScaleUp             Change = "scale-up"       // one endpoint is added
	ScaleDown           Change = "scale-down"     // one endpoint is removed
	CreateService       Change = "create-service" // with all its endpoints
	DeleteService       Change = "delete-service" // with all its endpoints
)

// Scenario describes the conditions of a measurement. It is comparable.
type Scenario struct {
	Change Change `json:"change,omitempty"`
	// Services is the number of Services, and Endpoints the number of endpoints of each.
	Services  int `json:"services"`
	Endpoints int `json:"endpoints"`
	// Rate is the number of changes per second.
	Rate float64 `json:"rate,omitempty"`
	// Destination is where connections go, for FirstPacket and Connect.
	Destination Destination `json:"destination,omitempty"`
}

// Destination is where the connections of a measurement go.
type Destination string

// Destinations.
const (
	OneService     Destination = "one-service"     // always the same Service
	RandomServices Destination = "random-services" // a random Service each time
	NoService      Destination = "no-service"      // an address that no Service has
)

// Measurement is the result of one measure for one system.
type Measurement struct {
	Measure     Measure  `json:"measure"`
	System      string   `json:"system"`
	Environment string   `json:"environment"`
	Scenario    Scenario `json:"scenario"`
	// Unit is the unit of the samples and the distribution: "s", "B", "B/s", "1/s" or "1".
	Unit string `json:"unit,omitempty"`
	// Samples are in the order in which they were taken.
	Samples      []float64     `json:"samples,omitempty"`
	Distribution *Distribution `json:"distribution,omitempty"`
	Values       []Value       `json:"values,omitempty"`
	Note         string        `json:"note,omitempty"`
}

// Distribution summarizes samples. Percentiles are interpolated between samples.
type Distribution struct {
	N    int     `json:"n"`
	Min  float64 `json:"min"`
	Mean float64 `json:"mean"`
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P99  float64 `json:"p99"`
	Max  float64 `json:"max"`
}

// Value is a named number.
type Value struct {
	Name  string  `json:"name"`
	Unit  string  `json:"unit"`
	Value float64 `json:"value"`
}

// Ratio compares two systems in one environment and scenario.
type Ratio struct {
	Measure Measure `json:"measure"`
	// Statistic is the compared statistic: "p50", "p90", "p99", "mean", or the name of a [Value].
	// "paired-p50" is the median of the ratios of samples that were taken in direct succession, and
	// are therefore subject to the same noise.
	Statistic   string   `json:"statistic"`
	Environment string   `json:"environment"`
	Scenario    Scenario `json:"scenario"`
	// Numerator and Denominator are names of systems: a ratio of 2 means that the statistic of the
	// numerator is twice the statistic of the denominator.
	Numerator   string `json:"numerator"`
	Denominator string `json:"denominator"`
	Interval
	NumeratorSamples   int `json:"numerator_samples"`
	DenominatorSamples int `json:"denominator_samples"`
	// Method names the method that computed the interval, such as "bootstrap".
	Method string `json:"method"`
}

// Interval is a ratio with its confidence interval.
type Interval struct {
	Ratio float64 `json:"ratio"`
	Low   float64 `json:"low"`
	High  float64 `json:"high"`
	// Confidence is the confidence level of the interval from Low to High, such as 0.95.
	Confidence float64 `json:"confidence"`
}

// LeftOut describes a requested measurement that was not taken.
type LeftOut struct {
	System  string  `json:"system,omitempty"`
	Measure Measure `json:"measure,omitempty"`
	// Environment is the environment of the omitted measurement.
	Environment string `json:"environment,omitempty"`
	Reason      string `json:"reason"`
}

// Value returns the value with the given name.
func (m *Measurement) Value(name string) (Value, bool) {
	for _, v := range m.Values {
		if v.Name == name {
			return v, true
		}
	}
	return Value{}, false
}

// Find returns the measurement with the given key, or nil.
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
		return fmt.Errorf("write results: %w", err)
	}
	return nil
}

// Read reads a report written by [Report.Write].
func Read(from io.Reader) (*Report, error) {
	var r Report
	if err := json.NewDecoder(from).Decode(&r); err != nil {
		return nil, fmt.Errorf("read results: %w", err)
	}
	if r.Schema != Schema {
		return nil, fmt.Errorf("read results: unsupported schema %d, want %d", r.Schema, Schema)
	}
	return &r, nil
}
