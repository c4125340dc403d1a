package result

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
)

// DetectEnvironment returns the environment of this process. Its name is [Native], or the [VMName]
// if the name of the processor shows that QEMU emulates it. Fields that cannot be determined are
// empty.
func DetectEnvironment() Environment {
	e := Environment{
		Name:    Native,
		Machine: Machine{CPU: readField("/proc/cpuinfo", "model name"), CPUs: runtime.NumCPU(), Architecture: runtime.GOARCH},
		Kernel:  firstLine("/proc/sys/kernel/osrelease"),
	}
	e.Emulated = strings.Contains(e.Machine.CPU, "QEMU TCG")
	if e.Emulated {
		e.Name = VMName(e.Kernel)
	}
	e.OS = strings.Trim(readField("/etc/os-release", "PRETTY_NAME"), `"`)
	var kilobytes int64
	if _, err := fmt.Sscanf(readField("/proc/meminfo", "MemTotal"), "%d", &kilobytes); err == nil {
		e.Machine.MemoryBytes = kilobytes << 10
	}
	load, _, _ := strings.Cut(firstLine("/proc/loadavg"), " ")
	if v, err := strconv.ParseFloat(load, 64); err == nil {
		e.Load = v
	}
	return e
}

// VMName returns the name of the environment of a virtual machine with the given kernel release.
// It contains the first two numbers of the release.
func VMName(kernel string) string {
	const numbers = 2
	list := strings.SplitN(kernel, ".", numbers+1)
	return "vm-" + strings.Join(list[:min(len(list), numbers)], ".")
}

// readField returns the value of the first "name:" or "name=" line of a file, or an empty string.
func readField(file, name string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close() //nolint:errcheck // only read from
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if i := strings.IndexAny(lines.Text(), ":="); i >= 0 && strings.TrimSpace(lines.Text()[:i]) == name {
			return strings.TrimSpace(lines.Text()[i+1:])
		}
	}
	return ""
}

func firstLine(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return line
}
