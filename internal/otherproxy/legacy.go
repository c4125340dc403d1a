package otherproxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// legacyTable is the nat table of one family in iptables-legacy, which stores whole tables in
// the kernel. Socket options read the table (linux/netfilter_ipv4/ip_tables.h,
// linux/netfilter_ipv6/ip6_tables.h).
type legacyTable struct {
	domain, level int
	// namesFile lists the existing tables. A request for a table would make the kernel create
	// it, with its hooks.
	namesFile string
	// targetOffset, nextOffset and entrySize describe struct ipt_entry or ip6t_entry.
	targetOffset, nextOffset, entrySize int

	// lastInfo is the table at the last scan, lastFound the result of that scan.
	lastInfo  tableInfo
	lastFound bool
}

// tableInfo is struct ipt_getinfo, which equals ip6t_getinfo.
type tableInfo struct {
	Name            [32]byte
	ValidHooks      uint32
	HookEntry       [5]uint32
	Underflow       [5]uint32
	Entries, Length uint32
}

const (
	getInfo    = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	getEntries = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	// entriesHeader is the size of struct ipt_get_entries without entries.
	entriesHeader = 40
	// errorTarget is the name of the target at the start of a chain. errorName is the offset
	// of the chain's name in this target.
	errorTarget = "ERROR"
	errorName   = 32
	// largeTable is a length in bytes. Once the chain was found, a table of this length or
	// more is not read again.
	largeTable = 1 << 20
)

func legacyTables() [2]legacyTable {
	return [2]legacyTable{
		{
			domain: unix.AF_INET, level: unix.SOL_IP, namesFile: "/proc/thread-self/net/ip_tables_names",
			targetOffset: 88, nextOffset: 90, entrySize: 112,
		},
		{
			domain: unix.AF_INET6, level: unix.SOL_IPV6, namesFile: "/proc/thread-self/net/ip6_tables_names",
			targetOffset: 140, nextOffset: 142, entrySize: 168,
		},
	}
}

// hasChain reports whether the table exists and has the chain.
func (t *legacyTable) hasChain(chain string) (bool, error) {
	// The target's name follows its length, and the chain's name is at the target's end.
	return t.hasTarget(func(target []byte) bool {
		return errorName < len(target) && hasCString(target[2:], errorTarget) && hasCString(target[errorName:], chain)
	})
}

// hasTarget reports whether the table exists and has a target (struct xt_entry_target) that match
// accepts. All calls for a table must ask for the same, because the result is cached.
func (t *legacyTable) hasTarget(match func(target []byte) bool) (bool, error) {
	names, err := os.ReadFile(t.namesFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil // the kernel lacks iptables-legacy
	case errors.Is(err, fs.ErrPermission):
		return false, nil // the process is not root and cannot read the file
	case err != nil:
		return false, fmt.Errorf("list iptables-legacy tables: %w", err)
	case !slices.Contains(strings.Fields(string(names)), iptablesTable):
		return false, nil
	}
	socket, err := unix.Socket(t.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.EAFNOSUPPORT) {
			return false, nil // no IPv6
		}
		return false, fmt.Errorf("open socket for iptables-legacy: %w", err)
	}
	defer unix.Close(socket) //nolint:errcheck // nothing was written
	for {
		found, err := t.scan(socket, match)
		if !errors.Is(err, unix.EAGAIN) { // the table changed after its length was read
			return found, err
		}
	}
}

func (t *legacyTable) scan(socket int, match func(target []byte) bool) (bool, error) {
	var info tableInfo
	copy(info.Name[:], iptablesTable)
	if err := t.getsockopt(socket, getInfo, unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info))); err != nil { //nolint:gosec // a struct without pointers
		return false, fmt.Errorf("read length of table %s: %w", iptablesTable, err)
	}
	if info == t.lastInfo || t.lastFound && info.Length >= largeTable {
		return t.lastFound, nil
	}
	// The table may have a hundred megabytes, which the Go heap would keep.
	buffer, err := unix.Mmap(-1, 0, entriesHeader+int(info.Length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return false, fmt.Errorf("allocate memory for table %s: %w", iptablesTable, err)
	}
	defer unix.Munmap(buffer) //nolint:errcheck // it was mapped
	copy(buffer, iptablesTable)
	binary.NativeEndian.PutUint32(buffer[len(info.Name):], info.Length)
	if err := t.getsockopt(socket, getEntries, buffer); err != nil {
		return false, fmt.Errorf("read table %s: %w", iptablesTable, err)
	}
	t.lastInfo, t.lastFound = info, t.entriesHaveTarget(buffer[entriesHeader:], match)
	return t.lastFound, nil
}

// entriesHaveTarget reports whether the entries contain a target that match accepts.
func (t *legacyTable) entriesHaveTarget(entries []byte, match func(target []byte) bool) bool {
	for len(entries) >= t.entrySize {
		target := int(binary.NativeEndian.Uint16(entries[t.targetOffset:]))
		next := int(binary.NativeEndian.Uint16(entries[t.nextOffset:]))
		if next < t.entrySize || next > len(entries) {
			return false
		}
		if target+2 < next && match(entries[target:next]) {
			return true
		}
		entries = entries[next:]
	}
	return false
}

// hasCString reports whether b starts with a null-terminated string.
func hasCString(b []byte, s string) bool {
	return len(b) > len(s) && b[len(s)] == 0 && bytes.HasPrefix(b, []byte(s))
}

// getsockopt calls getsockopt(2).
func (t *legacyTable) getsockopt(socket, option int, value []byte) error {
	length := uint32(len(value)) //nolint:gosec // a length from the kernel
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), uintptr(t.level), uintptr(option),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(unsafe.Pointer(&length)), 0) //nolint:gosec // arguments of a system call
	if errno != 0 {
		return errno
	}
	return nil
}

// hasInterface reports whether the network interface exists.
func hasInterface(name string) (bool, error) {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(socket) //nolint:errcheck // nothing was written
	request, err := unix.NewIfreq(name)
	if err != nil {
		return false, fmt.Errorf("interface name: %w", err)
	}
	err = unix.IoctlIfreq(socket, unix.SIOCGIFINDEX, request)
	if errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	return err == nil, err
}
