package conntracksettings

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"fairlead.io/fairlead/internal/kmod"
)

// Settings describe the desired settings. A zero value leaves the kernel's setting as it is.
type Settings struct {
	// MaxPerCore is the number of entries for each CPU of the host. The maximum is
	// MaxPerCore times the CPUs, at least Min and at most 1,048,576. Apply raises the
	// kernel's maximum to it and the size of the hash table to a quarter of it, and never
	// lowers either.
	MaxPerCore int
	// Min has no effect if MaxPerCore is 0.
	Min int

	// Timeouts have a resolution of one second. A fraction is cut off, but a timeout is at
	// least one second.
	TCPEstablishedTimeout, TCPCloseWaitTimeout time.Duration
	UDPTimeout, UDPStreamTimeout               time.Duration

	// TCPBeLiberal makes the kernel accept TCP packets outside the window.
	TCPBeLiberal bool
}

// ErrNotLoaded means that the kernel has not loaded connection tracking, which it does when
// rules first use it.
var ErrNotLoaded = errors.New("connection tracking is not loaded: run modprobe nf_conntrack")

// Change is a setting that Apply has changed.
type Change struct {
	// Name is the name of the sysctl, or the path of the module parameter.
	Name     string
	Old, New int
}

// String returns the change as NAME=NEW (was OLD).
func (c Change) String() string { return fmt.Sprintf("%s=%d (was %d)", c.Name, c.New, c.Old) }

// Failure is a setting that Apply could not change.
type Failure struct {
	// Name is the name of the sysctl, or the path of the module parameter.
	Name    string
	Desired int
	// Current is the value that remains in effect, -1 if it cannot be read.
	Current int
	Err     error
}

// String returns the failure as NAME=DESIRED (is CURRENT): ERROR.
func (f Failure) String() string {
	current := "unknown"
	if f.Current >= 0 {
		current = strconv.Itoa(f.Current)
	}
	return fmt.Sprintf("%s=%d (is %s): %s", f.Name, f.Desired, current, f.Err)
}

// Result is the result of [Settings.Apply].
type Result struct {
	Changes  []Change
	Failures []Failure
}

// Apply applies the settings in the network namespace of the calling thread. It writes only
// values that differ, and tries all of them. The error is [ErrNotLoaded] or nil.
func (s Settings) Apply() (Result, error) { return s.apply("/") }

// Pending returns the changes that Apply would make. The error is [ErrNotLoaded] or nil.
func (s Settings) Pending() ([]Change, error) {
	result, err := s.applyWith(&writer{root: "/", dryRun: true})
	return result.Changes, err
}

// Command returns a command that makes the change.
func (c Change) Command() string {
	if strings.HasPrefix(c.Name, "/") {
		return fmt.Sprintf("echo %d >%s", c.New, c.Name)
	}
	return fmt.Sprintf("sysctl -w %s=%d", c.Name, c.New)
}

// Usage describes how full the table of connections is.
type Usage struct{ Entries, Max int }

// ReadUsage returns the number of connections in the network namespace of the calling thread, and
// its maximum.
func ReadUsage() (Usage, error) {
	w := writer{root: "/"}
	entries, err := w.read(sysctlPath(sysctlCount))
	if err != nil {
		return Usage{}, err
	}
	most, err := w.read(sysctlPath(sysctlMax))
	return Usage{Entries: entries, Max: most}, err
}

// Load loads the kernel module of connection tracking, unless it is loaded.
func Load() error {
	if _, err := os.Stat(filepath.Join("/", sysctlPath(sysctlMax))); err == nil {
		return nil
	}
	return kmod.Load("nf_conntrack")
}

// Kernel names.
const (
	sysctlCount          = "net.netfilter.nf_conntrack_count"
	sysctlMax            = "net.netfilter.nf_conntrack_max"
	sysctlTCPEstablished = "net.netfilter.nf_conntrack_tcp_timeout_established"
	sysctlTCPCloseWait   = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"
	sysctlTCPBeLiberal   = "net.netfilter.nf_conntrack_tcp_be_liberal"
	sysctlUDP            = "net.netfilter.nf_conntrack_udp_timeout"
	sysctlUDPStream      = "net.netfilter.nf_conntrack_udp_timeout_stream"

	hashSizePath = "/sys/module/nf_conntrack/parameters/hashsize"
)

const (
	// maxEntries limits the memory on hosts with many CPUs, as in kube-proxy.
	maxEntries = 1 << 20
	// entriesPerBucket is kube-proxy's ratio of the maximum to the size of the hash table.
	entriesPerBucket = 4
)

// sysctlPath returns the path of a sysctl's file.
func sysctlPath(name string) string { return "/proc/sys/" + strings.ReplaceAll(name, ".", "/") }

// apply implements Apply. root is the directory that contains proc and sys.
func (s Settings) apply(root string) (Result, error) { return s.applyWith(&writer{root: root}) }

func (s Settings) applyWith(w *writer) (Result, error) {
	root := w.root
	if s == (Settings{}) || s == (Settings{Min: s.Min}) {
		return Result{}, nil
	}
	if _, err := os.Stat(filepath.Join(root, sysctlPath(sysctlMax))); errors.Is(err, fs.ErrNotExist) {
		return Result{}, ErrNotLoaded
	}
	if desired := s.max(hostCPUs(root)); desired > 0 {
		w.raise(sysctlMax, sysctlPath(sysctlMax), desired)
		w.raise(hashSizePath, hashSizePath, desired/entriesPerBucket)
	}
	w.setTimeout(sysctlTCPEstablished, s.TCPEstablishedTimeout)
	w.setTimeout(sysctlTCPCloseWait, s.TCPCloseWaitTimeout)
	if s.TCPBeLiberal {
		w.set(sysctlTCPBeLiberal, sysctlPath(sysctlTCPBeLiberal), 1)
	}
	w.setTimeout(sysctlUDP, s.UDPTimeout)
	w.setTimeout(sysctlUDPStream, s.UDPStreamTimeout)
	return w.result, nil
}

// max returns the desired maximum of entries, 0 to leave it as it is.
func (s Settings) max(cpus int) int {
	if s.MaxPerCore == 0 {
		return 0
	}
	if scaled := s.MaxPerCore * cpus; scaled > s.Min || scaled > maxEntries {
		return min(scaled, maxEntries)
	}
	return s.Min
}

// writer writes settings and collects the result.
type writer struct {
	root   string
	dryRun bool
	result Result
}

// raise sets a value unless it is at least the desired one.
func (w *writer) raise(name, path string, desired int) {
	if current, err := w.read(path); err == nil && current >= desired {
		return
	}
	w.set(name, path, desired)
}

// setTimeout sets a timeout in seconds unless it is 0.
func (w *writer) setTimeout(name string, timeout time.Duration) {
	if timeout > 0 {
		w.set(name, sysctlPath(name), max(1, int(min(timeout/time.Second, math.MaxInt32))))
	}
}

// set sets a value unless it is the desired one.
func (w *writer) set(name, path string, desired int) {
	current, err := w.read(path)
	if err == nil {
		if current == desired {
			return
		}
		err = w.write(path, desired)
	} else {
		current = -1
	}
	if err != nil {
		w.result.Failures = append(w.result.Failures, Failure{Name: name, Desired: desired, Current: current, Err: pathless(err)})
		return
	}
	w.result.Changes = append(w.result.Changes, Change{Name: name, Old: current, New: desired})
}

func (w *writer) read(path string) (int, error) {
	text, err := os.ReadFile(filepath.Join(w.root, path))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

func (w *writer) write(path string, value int) error {
	if w.dryRun {
		return nil
	}
	file, err := os.OpenFile(filepath.Join(w.root, path), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(strconv.Itoa(value))
	return errors.Join(err, file.Close())
}

// pathless removes the path from an error, because the name of the setting precedes it.
func pathless(err error) error {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return path.Err
	}
	return err
}
