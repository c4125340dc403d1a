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

// Usage is what a process and its children use.
type Usage struct {
	// User and Kernel are the processor time so far, of children that have ended as
	// well.
	User, Kernel time.Duration
	// Resident is the resident memory now, and PeakResident the most there was since
	// the process started. Pages that processes share count once for each.
	Resident, PeakResident int64
}

// CPU is all processor time.
func (u Usage) CPU() time.Duration { return u.User + u.Kernel }

// clockTick is the unit of times in /proc/PID/stat, on every architecture that Linux
// has for Go.
const clockTick = time.Second / 100

// UsageOf returns what the process uses, with its children and theirs.
func UsageOf(pid int) (Usage, error) {
	u, err := processUsage(pid)
	if err != nil {
		return Usage{}, fmt.Errorf("read what process %d uses: %w", pid, err)
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
			more, err := UsageOf(id)
			if errors.Is(err, os.ErrNotExist) {
				continue // it has ended since
			}
			if err != nil {
				return Usage{}, err
			}
			u.User, u.Kernel = u.User+more.User, u.Kernel+more.Kernel
			u.Resident, u.PeakResident = u.Resident+more.Resident, u.PeakResident+more.PeakResident
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
	// Behind the name, which may have anything in it: see proc_pid_stat(5).
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
		var into *int64
		switch name {
		case "VmRSS":
			into = &u.Resident
		case "VmHWM":
			into = &u.PeakResident
		default:
			continue
		}
		var kilobytes int64
		if _, err := fmt.Sscanf(strings.TrimSpace(value), "%d kB", &kilobytes); err != nil {
			return u, fmt.Errorf("status: %s: %w", name, err)
		}
		*into = kilobytes << 10
	}
	return u, nil
}
