package main

import (
	"context"
	"os"
	"strings"
	"testing"
)

// TestJumpClockRequiresVirtualMachine checks that the clock of a shared machine is never set.
func TestJumpClockRequiresVirtualMachine(t *testing.T) {
	own, err := inVirtualMachine()
	if err != nil {
		t.Fatal(err)
	}
	if own {
		t.Skip("this is a virtual machine of test/vm, where the clock may jump")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // if it is not refused, no jump follows
	bed := &testbed{options: &options{jumpClock: true}}
	if bed.requireOwnClock() == "" || bed.jumpClock(ctx) == nil {
		t.Error("the fault is not refused")
	}
	if os.Geteuid() != 0 {
		return // run requires root
	}
	if _, err := run(ctx, bed.options); err == nil || !strings.Contains(err.Error(), "-jump-clock") {
		t.Errorf("-jump-clock is not refused: %v", err)
	}
}
