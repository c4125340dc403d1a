//go:build ipvs

package main

import (
	"os"
	"path/filepath"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// TestFlowOffloadLoadsModules checks that the agent loads the modules of flowtables if the kernel cannot
// load them on demand. It is not parallel, so that it runs before tests that load them. It changes a
// sysctl of the whole machine, so it has the build tag ipvs and runs in the virtual machines of test/vm.
func TestFlowOffloadLoadsModules(t *testing.T) {
	const metrics, sysctl = "127.0.0.1:10249", "/proc/sys/kernel/modprobe"
	modules := []string{"nf_flow_table", "nf_flow_table_inet", "nft_flow_offload"}
	n := newTestNode(t, "a")
	backend := agenttest.ServiceAddrs(10, 80)
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	run := func(args ...string) {
		t.Helper()
		n.program = n.start(nil, append(n.runArgs(), args...)...)
		n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
		n.awaitAnswers(backend, "a")
	}
	run() // loads all other modules
	n.stop()
	for _, module := range modules {
		if _, err := os.Stat(filepath.Join("/sys/module", module)); err == nil {
			t.Fatalf("module %s is loaded before the test", module)
		}
	}
	modprobe, err := os.ReadFile(sysctl)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(sysctl, []byte("/nonexistent"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(sysctl, modprobe, 0o644); err != nil {
			t.Error(err)
		}
	})
	run("--flow-offload=software", "--flow-offload-threshold=10")
	n.awaitMetric(metrics, "fairlead_flow_offload_ready 1")
	for _, module := range modules {
		if state, err := os.ReadFile(filepath.Join("/sys/module", module, "initstate")); err != nil || string(state) != "live\n" {
			t.Errorf("module %s: state %q, %v; want live", module, state, err)
		}
	}
}
