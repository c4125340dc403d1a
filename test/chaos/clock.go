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

// vmParameter is in the command line of a kernel that test/vm has booted.
const vmParameter = "fairlead.vm=1"

// inVirtualMachine reports whether the machine is one of test/vm, which nothing else
// uses: the time of day is not a network namespace's.
func inVirtualMachine() (bool, error) {
	parameters, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return false, fmt.Errorf("read the kernel's parameters: %w", err)
	}
	return slices.Contains(strings.Fields(string(parameters)), vmParameter), nil
}

func (t *testbed) requireOwnClock() string {
	switch own, err := inVirtualMachine(); {
	case err != nil:
		return err.Error()
	case !own:
		return "the time of day is the whole machine's; only in a virtual machine of bin/vm"
	case !t.options.jumpClock:
		return "-jump-clock is not set"
	}
	return ""
}

// jumpClock sets the time of day forth and back, and starts Fairlead again after some
// of the jumps.
func (t *testbed) jumpClock(ctx context.Context) (err error) {
	if reason := t.requireOwnClock(); reason != "" {
		return errors.New(reason)
	}
	begin := time.Now()
	// set makes the time of day differ from the right one.
	set := func(by time.Duration) error {
		now := unix.NsecToTimespec(begin.Add(time.Since(begin) + by).UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
			return fmt.Errorf("set the time of day: %w", err)
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
