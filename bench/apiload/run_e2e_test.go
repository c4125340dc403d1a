//go:build e2e

package apiload_test

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/bench/apiload"
	"fairlead.io/fairlead/bench/system"
)

// TestRun measures a small cluster and checks what does not depend on the machine: the requests, and
// that each client receives the changes that it watches.
func TestRun(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "fairlead")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "fairlead.io/fairlead/cmd/fairlead").CombinedOutput(); err != nil {
		t.Fatalf("build Fairlead: %v\n%s", err, out)
	}
	r, err := apiload.Run(t.Context(), apiload.Options{
		Systems: []system.System{system.Fairlead{Binary: binary, Mode: system.ModeNFT}},
		Nodes:   3, Services: 3, Endpoints: 2, Starts: 1, Changes: 1, Watchers: 2, QuietTime: time.Second, IdleTime: 100 * time.Millisecond,
		Dir: t.TempDir(), Progress: func(message string) { t.Log(message) },
	})
	if err != nil {
		t.Fatal(err)
	}
	find := func(measured, client string) apiload.Measurement {
		t.Helper()
		i := slices.IndexFunc(r.Measurements, func(m apiload.Measurement) bool { return m.Case == measured && m.Client == client })
		if i < 0 {
			t.Fatalf("no measurement of %q for %q", measured, client)
		}
		return r.Measurements[i]
	}
	start := find("start", system.ModeNFT)
	const want = "1 × create events, 1 × list+watch endpointslices, 1 × list+watch nodes, 1 × list+watch servicecidrs, 1 × list+watch services"
	if got := start.Requests.String(); got != want {
		t.Errorf("requests at the start: %s, want %s", got, want)
	}
	if start.Traffic.Received == 0 || start.CPU == 0 {
		t.Errorf("start: %d bytes, processor time %s, want both", start.Traffic.Received, start.CPU)
	}
	const proxy, all = system.ModeNFT, "watch of all Nodes"
	for _, c := range []struct {
		change, client string
		receives       bool
	}{
		{"an endpoint becomes unready", proxy, true},
		{"an endpoint is replaced", proxy, true},
		{"a Service is created", proxy, true},
		{"a label of the own Node changes", proxy, true},
		{"a label of another Node changes", proxy, false},
		{"a label of another Node changes", all, true},
		{"an endpoint is replaced", all, false},
	} {
		const least = 500 // bytes of an event; acknowledgements and pings are smaller
		if n := find(c.change, c.client).Traffic.Received; n > least != c.receives {
			t.Errorf("%s: %s received %d bytes, want an event: %v", c.change, c.client, n, c.receives)
		}
	}
	if n := find("an endpoint is replaced", proxy).SliceEvents; n < 2 {
		t.Errorf("replacing an endpoint changed EndpointSlices %d times, want at least two", n)
	}
	var table bytes.Buffer
	if err := r.Write(&table); err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + table.String())
}
