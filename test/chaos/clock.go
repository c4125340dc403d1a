package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// vmParameter is a kernel parameter that test/vm sets.
const vmParameter = "fairlead.vm=1"

// inVirtualMachine reports whether this machine is a virtual machine of test/vm. Network
// namespaces share the system clock, so only there may the clock jump.
func inVirtualMachine() (bool, error) {
	parameters, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return false, fmt.Errorf("read the kernel parameters: %w", err)
	}
	return slices.Contains(strings.Fields(string(parameters)), vmParameter), nil
}

// requireOwnClock returns why the fault is unavailable, or "".
func (t *testbed) requireOwnClock() string {
	switch own, err := inVirtualMachine(); {
	case err != nil:
		return err.Error()
	case !own:
		return "the system clock is shared; available only in a virtual machine of bin/vm"
	case !t.options.jumpClock:
		return "-jump-clock is not set"
	}
	return ""
}

// jumpClock sets the system clock forward and back, and restarts Fairlead after some of the
// jumps.
func (t *testbed) jumpClock(ctx context.Context) (err error) {
	if reason := t.requireOwnClock(); reason != "" {
		return errors.New(reason)
	}
	begin := time.Now()
	// set sets the clock to an offset from the correct time.
	set := func(offset time.Duration) error {
		now := unix.NsecToTimespec(begin.Add(time.Since(begin) + offset).UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
			return fmt.Errorf("set the system clock: %w", err)
		}
		return nil
	}
	defer func() { err = errors.Join(err, set(0)) }()
	const (
		day  = 24 * time.Hour
		year = 365 * day
	)
	jumps := []time.Duration{time.Minute, -time.Minute, day, -day, 10 * year, 0, -10 * year, year}
	for i := 0; ctx.Err() == nil; i++ {
		if err := set(jumps[i%len(jumps)]); err != nil {
			return err
		}
		if i%3 == 2 {
			if err := t.restartAgent(ctx); err != nil && ctx.Err() == nil {
				return err
			}
		}
		sleep(ctx, 700*time.Millisecond)
	}
	return nil
}
