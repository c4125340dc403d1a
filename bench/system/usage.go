package system

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Usage is the resource usage of a process and its children.
type Usage struct {
	// User and Kernel are processor times, including children that have ended.
	User, Kernel time.Duration
	// Resident is the current resident memory, and PeakResident the largest since the process
	// started, in bytes. Shared pages count once for each process.
	Resident, PeakResident int64
}

// CPU returns the total processor time.
func (u Usage) CPU() time.Duration { return u.User + u.Kernel }

// clockTick is the unit of times in /proc/PID/stat. It is the same on all Linux architectures that
// Go supports.
const clockTick = time.Second / 100

// UsageOf returns the usage of the process and all its descendants.
func UsageOf(pid int) (Usage, error) {
	u, err := processUsage(pid)
	if err != nil {
		return Usage{}, fmt.Errorf("read the usage of process %d: %w", pid, err)
	}
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return Usage{}, err
	}
	for _, list := range lists {
		children, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended
		}
		for child := range strings.FieldsSeq(string(children)) {
			id, err := strconv.Atoi(child)
			if err != nil {
				return Usage{}, fmt.Errorf("children of process %d: %w", pid, err)
			}
			childUsage, err := UsageOf(id)
			if errors.Is(err, os.ErrNotExist) {
				continue // the child has ended
			}
			if err != nil {
				return Usage{}, err
			}
			u.User, u.Kernel = u.User+childUsage.User, u.Kernel+childUsage.Kernel
			u.Resident, u.PeakResident = u.Resident+childUsage.Resident, u.PeakResident+childUsage.PeakResident
		}
	}
	return u, nil
}

func processUsage(pid int) (Usage, error) {
	var u Usage
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	// The name in parentheses may contain any character: see proc_pid_stat(5).
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const user, kernel, childrenUser, childrenKernel = 11, 12, 13, 14
	if len(fields) <= childrenKernel {
		return u, fmt.Errorf("stat has %d fields", len(fields))
	}
	var ticks [childrenKernel + 1]int64
	for _, i := range []int{user, kernel, childrenUser, childrenKernel} {
		if ticks[i], err = strconv.ParseInt(fields[i], 10, 64); err != nil {
			return u, fmt.Errorf("stat: %w", err)
		}
	}
	u.User = time.Duration(ticks[user]+ticks[childrenUser]) * clockTick
	u.Kernel = time.Duration(ticks[kernel]+ticks[childrenKernel]) * clockTick
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		var target *int64
		switch name {
		case "VmRSS":
			target = &u.Resident
		case "VmHWM":
			target = &u.PeakResident
		default:
			continue
		}
		var kilobytes int64
		if _, err := fmt.Sscanf(strings.TrimSpace(value), "%d kB", &kilobytes); err != nil {
			return u, fmt.Errorf("status: %s: %w", name, err)
		}
		*target = kilobytes << 10
	}
	return u, nil
}
