package apiload

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// processorTime returns the processor time of a process, in nanoseconds of the scheduler. The
// clock's ID is that of clock_getcpuclockid(3).
func processorTime(pid int) (time.Duration, error) {
	const schedulerClock, bits = 2, 3
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<bits|schedulerClock), &t); err != nil {
		return 0, fmt.Errorf("read the processor time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}
