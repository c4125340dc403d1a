package main

import (
	"context"
	"os"
	"strings"
	"testing"
)

// The clock of a machine that others use is never set.
func TestJumpClockRequiresVirtualMachine(t *testing.T) {
	own, err := inVirtualMachine()
	if err != nil {
		t.Fatal(err)
	}
	if own {
		t.Skip("this is a virtual machine of test/vm, where the clock may be set")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // no jump, should it not be refused
	rig := &testbed{options: &options{jumpClock: true}}
	if rig.requireOwnClock() == "" || rig.jumpClock(ctx) == nil {
		t.Error("the fault is not refused")
	}
	if os.Geteuid() != 0 {
		return // run refuses everything
	}
	if _, err := run(ctx, rig.options); err == nil || !strings.Contains(err.Error(), "-jump-clock") {
		t.Errorf("-jump-clock is not refused: %v", err)
	}
}
