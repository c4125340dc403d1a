package conntracksettings

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
)

// hostCPUs returns the number of online CPUs of the host. The process's own number can be
// smaller, because the kubelet's CPU manager may restrict its CPUs.
func hostCPUs(root string) int {
	text, err := os.ReadFile(filepath.Join(root, "sys/devices/system/cpu/online"))
	if err != nil {
		return runtime.NumCPU()
	}
	if count := countCPUs(strings.TrimSpace(string(text))); count > 0 {
		return count
	}
	return runtime.NumCPU()
}

// countCPUs counts the CPUs in a list such as "0-3,8", or returns 0 if the list is invalid.
func countCPUs(list string) int {
	count := 0
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.Atoi(first)
		if err != nil {
			return 0
		}
		to, err := strconv.Atoi(last)
		if err != nil || to < from {
			return 0
		}
		count += to - from + 1
	}
	return count
}
