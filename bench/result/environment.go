package result

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
)

// DetectEnvironment returns the environment of this process, named [Native], or as [VMName] says if QEMU
// tells by the processor's name that it emulates one. What cannot be found out is empty.
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

// VMName is the name of the environment that is a virtual machine with that kernel, of which
// the first two numbers of the version are in it.
func VMName(kernel string) string {
	const numbers = 2
	list := strings.SplitN(kernel, ".", numbers+1)
	return "vm-" + strings.Join(list[:min(len(list), numbers)], ".")
}

// readField returns what stands behind the first "name:" or "name=" of a file.
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
