package result_test

import (
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/bench/result"
)

// file is a report in the published format, which must stay readable.
const file = `{
  "schema": 1,
  "time": "2025-01-31T12:00:00Z",
  "took_seconds": 93.5,
  "command": [
    "fairlead-bench"
  ],
  "version": "v1.2.3",
  "environments": [
    {
      "name": "native",
      "emulated": false,
      "machine": {
        "cpu": "A processor",
        "cpus": 2,
        "memory_bytes": 1024,
        "architecture": "amd64"
      },
      "kernel": "6.18.44",
      "os": "Debian",
      "api_server": "v1.33.1",
      "load": 0.5
    }
  ],
  "systems": [
    {
      "name": "nft",
      "version": "v1.2.3",
      "command": [
        "fairlead",
        "run"
      ]
    }
  ],
  "measurements": [
    {
      "measure": "update-packet",
      "system": "nft",
      "environment": "native",
      "scenario": {
        "change": "replace-endpoint",
        "services": 10000,
        "endpoints": 10,
        "rate": 100
      },
      "unit": "s",
      "samples": [
        1,
        3
      ],
      "distribution": {
        "n": 2,
        "min": 1,
        "mean": 2,
        "p50": 2,
        "p90": 2.8,
        "p99": 2.98,
        "max": 3
      },
      "values": [
        {
          "name": "cpu",
          "unit": "s",
          "value": 0.01
        }
      ],
      "note": "a note"
    }
  ],
  "ratios": [
    {
      "measure": "update-packet",
      "statistic": "p50",
      "environment": "native",
      "scenario": {
        "services": 10000,
        "endpoints": 10
      },
      "numerator": "kube-proxy-nftables",
      "denominator": "nft",
      "ratio": 310.5,
      "low": 280.1,
      "high": 341.9,
      "confidence": 0.95,
      "numerator_samples": 20,
      "denominator_samples": 200,
      "method": "bootstrap"
    }
  ],
  "left_out": [
    {
      "system": "ipvs",
      "measure": "memory",
      "environment": "native",
      "reason": "no IPVS"
    }
  ],
  "notes": [
    "another <note>"
  ]
}
`

func report() *result.Report {
	scenario := result.Scenario{Services: 10_000, Endpoints: 10}
	changed := result.Scenario{Change: result.ReplaceEndpoint, Services: 10_000, Endpoints: 10, Rate: 100}
	return &result.Report{
		Schema: 1, Time: time.Date(2025, 1, 31, 12, 0, 0, 0, time.UTC), TookSeconds: 93.5,
		Command: []string{"fairlead-bench"}, Version: "v1.2.3",
		Environments: []result.Environment{{
			Name:    "native",
			Machine: result.Machine{CPU: "A processor", CPUs: 2, MemoryBytes: 1024, Architecture: "amd64"},
			Kernel:  "6.18.44", OS: "Debian", APIServer: "v1.33.1", Load: 0.5,
		}},
		Systems: []result.System{{Name: "nft", Version: "v1.2.3", Command: []string{"fairlead", "run"}}},
		Measurements: []result.Measurement{{
			Measure: result.UpdatePacket, System: "nft", Environment: "native", Scenario: changed, Unit: "s",
			Samples:      []float64{1, 3},
			Distribution: &result.Distribution{N: 2, Min: 1, Mean: 2, P50: 2, P90: 2.8, P99: 2.98, Max: 3},
			Values:       []result.Value{{Name: "cpu", Unit: "s", Value: 0.01}}, Note: "a note",
		}},
		Ratios: []result.Ratio{{
			Measure: result.UpdatePacket, Statistic: "p50", Environment: "native", Scenario: scenario,
			Numerator: "kube-proxy-nftables", Denominator: "nft",
			Interval:         result.Interval{Ratio: 310.5, Low: 280.1, High: 341.9, Confidence: 0.95},
			NumeratorSamples: 20, DenominatorSamples: 200, Method: "bootstrap",
		}},
		LeftOut: []result.LeftOut{{System: "ipvs", Measure: result.Memory, Environment: "native", Reason: "no IPVS"}},
		Notes:   []string{"another <note>"},
	}
}

func TestWrite(t *testing.T) {
	var b strings.Builder
	if err := report().Write(&b); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(file, b.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRead(t *testing.T) {
	// Unknown fields are ignored.
	got, err := result.Read(strings.NewReader(strings.Replace(file, "{", `{"later": {"a": 1},`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(report(), got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestReadInvalid(t *testing.T) {
	for name, tc := range map[string]struct{ file, want string }{
		"no JSON":            {"no", "read results"},
		"unsupported schema": {`{"schema": 2}`, "unsupported schema 2, want 1"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := result.Read(strings.NewReader(tc.file)); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestFind(t *testing.T) {
	r := report()
	m := r.Measurements[0]
	got := r.Find(m.Measure, m.System, m.Environment, m.Scenario)
	if got == nil {
		t.Fatal("not found")
	}
	if v, ok := got.Value("cpu"); !ok || v.Value != 0.01 {
		t.Errorf("cpu is %+v, %t", v, ok)
	}
	if v, ok := got.Value("memory"); ok {
		t.Errorf("memory is %+v, want none", v)
	}
	for _, other := range []*result.Measurement{
		r.Find(result.Memory, m.System, m.Environment, m.Scenario),
		r.Find(m.Measure, "ipvs", m.Environment, m.Scenario),
		r.Find(m.Measure, m.System, "vm", m.Scenario),
		r.Find(m.Measure, m.System, m.Environment, result.Scenario{}),
	} {
		if other != nil {
			t.Errorf("found %+v", other)
		}
	}
}

// TestDetectEnvironment checks fields whose values other sources report too.
func TestDetectEnvironment(t *testing.T) {
	got := result.DetectEnvironment()
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	if got.Name != result.Native || got.Emulated || got.Kernel != strings.TrimSpace(string(release)) ||
		got.Machine.CPUs != runtime.NumCPU() || got.Machine.Architecture != runtime.GOARCH || got.Machine.MemoryBytes < 1<<27 {
		t.Errorf("got %+v", got)
	}
}

func TestVMName(t *testing.T) {
	for kernel, want := range map[string]string{"6.12.57+deb13-cloud-amd64": "vm-6.12", "6.1.0-41-cloud-amd64": "vm-6.1", "7": "vm-7"} {
		if got := result.VMName(kernel); got != want {
			t.Errorf("VMName(%q) = %s, want %s", kernel, got, want)
		}
	}
}
