package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/bench/testbed"
)

// memory measures the memory held when everything is programmed: for the process, the growth of
// its resident memory after garbage collection; for the kernel, the growth of [kernelMemory]. Each
// value is the median of several starts.
func memory(ctx context.Context, o Options, m *measurements) error {
	var resident, peak, kernel []float64
	times := min(o.startCount(), 5)
	for i := range times {
		o.Progress(fmt.Sprintf("memory: %d Services, start %d of %d", o.Services, i+1, times))
		err := withTestbed(func(r *testbed.Testbed, _ *testbed.Probe) (err error) {
			u0, err := resetUsage()
			if err != nil {
				return err
			}
			k0, err := stableKernelMemory(ctx)
			if err != nil {
				return err
			}
			s, err := newPipelineUnderTest(ctx, o, r)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			if _, err := s.load(ctx, initialDelta(newServices(o.Services, o.Endpoints), r.Node.IPv4)); err != nil {
				return err
			}
			highest, err := system.UsageOf(os.Getpid())
			if err != nil {
				return err
			}
			u1, err := resetUsage()
			if err != nil {
				return err
			}
			k1, err := stableKernelMemory(ctx)
			resident = append(resident, float64(u1.Resident-u0.Resident))
			peak = append(peak, float64(highest.PeakResident-u0.Resident))
			kernel = append(kernel, float64(k1-k0))
			runtime.KeepAlive(s)
			return err
		})
		if err != nil {
			return err
		}
	}
	median := func(samples []float64) float64 {
		slices.Sort(samples)
		return samples[len(samples)/2]
	}
	m.addSamples(result.Memory, result.Scenario{Services: o.Services, Endpoints: o.Endpoints}, "", nil,
		result.Value{Name: "resident", Unit: "B", Value: median(resident)},
		result.Value{Name: "peak-resident", Unit: "B", Value: median(peak)},
		result.Value{Name: "kernel", Unit: "B", Value: median(kernel)})
	m.addNote("Kernel memory is the growth of the kernel's allocations (Slab, VmallocUsed and Percpu of /proc/meminfo, " +
		"without free objects in slabs). It includes allocations for other programs during the measurement.")
	return nil
}

// resetUsage collects garbage, returns freed memory to the kernel, restarts the measurement of the
// memory peak, and returns the usage of this process.
func resetUsage() (system.Usage, error) {
	debug.FreeOSMemory()
	const resetPeak = "5" // see proc_pid_clear_refs(5)
	if err := os.WriteFile("/proc/self/clear_refs", []byte(resetPeak), 0); err != nil {
		return system.Usage{}, fmt.Errorf("reset the memory peak: %w", err)
	}
	return system.UsageOf(os.Getpid())
}

// kernelMemory returns the bytes that the kernel of this machine has allocated for itself.
// Elements of nftables sets and IPVS entries are among them: /proc/meminfo counts objects as Slab,
// large tables as VmallocUsed and statistics as Percpu. Free objects within slabs (/proc/slabinfo)
// do not count.
func kernelMemory() (int64, error) {
	fields, err := meminfo("Slab", "VmallocUsed", "Percpu")
	if err != nil {
		return 0, fmt.Errorf("measure kernel memory: %w", err)
	}
	free, err := freeSlabBytes()
	if err != nil {
		return 0, fmt.Errorf("read free slab memory: %w", err)
	}
	return fields - free, nil
}

// meminfo returns the sum of the named fields of /proc/meminfo, in bytes.
func meminfo(fields ...string) (int64, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	var sum int64
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if !slices.Contains(fields, name) {
			continue
		}
		var kilobytes int64
		if _, err := fmt.Sscanf(strings.TrimSpace(value), "%d kB", &kilobytes); err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		sum += kilobytes << 10
	}
	return sum, nil
}

// freeSlabBytes returns the bytes of free objects in all slabs.
func freeSlabBytes() (int64, error) {
	text, err := os.ReadFile("/proc/slabinfo")
	if err != nil {
		return 0, err
	}
	const heading = 2
	var free int64
	for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n")[heading:] {
		var name string
		var active, all, size int64
		if _, err := fmt.Sscan(line, &name, &active, &all, &size); err != nil {
			return 0, fmt.Errorf("%s: %w", line, err)
		}
		free += (all - active) * size
	}
	return free, nil
}

// stableKernelMemory waits until kernelMemory no longer falls, and returns it. The kernel removes
// network namespaces and their contents some time after their last user is gone.
func stableKernelMemory(ctx context.Context) (int64, error) {
	const (
		period     = 200 * time.Millisecond
		slack      = 256 << 10 // bytes
		maxPeriods = 50
	)
	last, err := kernelMemory()
	for stable, i := 0, 0; err == nil && stable < 3 && i < maxPeriods; i++ {
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(period):
		}
		var now int64
		now, err = kernelMemory()
		if stable++; now < last-slack {
			stable = 0
		}
		last = now
	}
	return last, err
}
