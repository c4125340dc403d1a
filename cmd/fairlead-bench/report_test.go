package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/bench/result"
)

func TestReport(t *testing.T) {
	dir := t.TempDir()
	file, page := filepath.Join(dir, "result.json"), filepath.Join(dir, "report.html")
	r := &result.Report{
		Schema: result.Schema, Time: time.Date(2025, 1, 31, 0, 0, 0, 0, time.UTC), Version: "v1", Command: []string{"fairlead-bench"},
		Environments: []result.Environment{{Name: result.Native, Kernel: "6.1"}},
		Measurements: []result.Measurement{{
			Measure: result.Memory, System: "nft", Environment: result.Native, Scenario: result.Scenario{Services: 10, Endpoints: 1}, Unit: "B",
			Samples: []float64{1e6}, Distribution: &result.Distribution{N: 1, Min: 1e6, Mean: 1e6, P50: 1e6, P90: 1e6, P99: 1e6, Max: 1e6},
		}},
	}
	if err := writeFile(file, r.Write); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		args []string
		want string // part of the output, which includes errors
		code int
	}{
		"a table":          {[]string{file}, "memory held", 0},
		"a page":           {[]string{file, "--html=" + page, "--svg=" + dir}, "", 0},
		"no file":          {nil, "requires at least 1 arg", 1},
		"a missing file":   {[]string{filepath.Join(dir, "x.json")}, "x.json", 1},
		"the same twice":   {[]string{file, file}, "duplicate measurement", 1},
		"a missing folder": {[]string{file, "--html=" + filepath.Join(dir, "x", "y.html")}, "--html: ", 1},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			code := run(context.Background(), append([]string{"report"}, test.args...), &out, &out)
			if code != test.code || !strings.Contains(out.String(), test.want) {
				t.Errorf("exit code %d, %q; want %d and %q", code, out.String(), test.code, test.want)
			}
		})
	}
	for _, name := range []string{"report.html", "memory.svg", "memory.png"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s was not written: %v", name, err)
		}
	}
}

func TestCompareInvalidFlags(t *testing.T) {
	for arg, want := range map[string]string{
		"--systems=envoy": `unknown system "envoy"`,
		"--only=nothing":  `unknown part "nothing"`,
		"--services=1":    "too few",

		"--fairlead=/nowhere/fairlead": "--fairlead: find program",
	} {
		var out bytes.Buffer
		if code := run(t.Context(), []string{"compare", "--quiet", "--fairlead=/bin/true", arg}, &out, &out); code == 0 || !strings.Contains(out.String(), want) {
			t.Errorf("%s: exit code %d, %q; want a failure with %q", arg, code, out.String(), want)
		}
	}
}
