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

// legacyTable is the table nat of one family of the iptables that keeps whole tables
// in the kernel (iptables-legacy), which is read by socket options
// (linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h).
type legacyTable struct {
	domain, level int
	// namesFile is the file with the names of the tables that there are. To ask for a
	// table makes the kernel make it, with its hooks.
	namesFile string
	// targetOffset, nextOffset and entrySize are of struct ipt_entry, ip6t_entry.
	targetOffset, nextOffset, entrySize int

	// lastInfo is the table as it was scanned last, and found what was found.
	lastInfo  tableInfo
	lastFound bool
}

// tableInfo is struct ipt_getinfo, which ip6t_getinfo is as well.
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
	// entriesHeader is the size of struct ipt_get_entries without its entries.
	entriesHeader = 40
	// errorTarget is the name of the target that begins a chain, and errorName where
	// in that target the chain's name is.
	errorTarget = "ERROR"
	errorName   = 32
	// largeTable is a table's length in bytes from which on it is not read again while it
	// is not smaller, to see whether a chain is still there.
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

// hasChain reports whether the table has a chain of this name, if there is a table.
func (t *legacyTable) hasChain(chain string) (bool, error) {
	names, err := os.ReadFile(t.namesFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil // a kernel without
	case errors.Is(err, fs.ErrPermission):
		return false, nil // who is not root may not know
	case err != nil:
		return false, fmt.Errorf("list the tables of iptables-legacy: %w", err)
	case !slices.Contains(strings.Fields(string(names)), iptablesTable):
		return false, nil
	}
	socket, err := unix.Socket(t.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.EAFNOSUPPORT) {
			return false, nil // no IPv6
		}
		return false, fmt.Errorf("open a socket for iptables-legacy: %w", err)
	}
	defer unix.Close(socket) //nolint:errcheck // nothing was written
	for {
		found, err := t.scan(socket, chain)
		if !errors.Is(err, unix.EAGAIN) { // it has changed since its length was read
			return found, err
		}
	}
}

func (t *legacyTable) scan(socket int, chain string) (bool, error) {
	var info tableInfo
	copy(info.Name[:], iptablesTable)
	if err := t.getsockopt(socket, getInfo, unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info))); err != nil { //nolint:gosec // a struct without pointers
		return false, fmt.Errorf("ask for the length of table %s: %w", iptablesTable, err)
	}
	if info == t.lastInfo || t.lastFound && info.Length >= largeTable {
		return t.lastFound, nil
	}
	// It may be a hundred megabytes, which are not to stay with the Go runtime.
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
	t.lastInfo, t.lastFound = info, t.entriesHaveChain(buffer[entriesHeader:], chain)
	return t.lastFound, nil
}

// entriesHaveChain reports whether entries of a table begin a chain of this name.
func (t *legacyTable) entriesHaveChain(entries []byte, chain string) bool {
	for len(entries) >= t.entrySize {
		target := int(binary.NativeEndian.Uint16(entries[t.targetOffset:]))
		next := int(binary.NativeEndian.Uint16(entries[t.nextOffset:]))
		if next < t.entrySize || next > len(entries) {
			return false
		}
		// The target's name comes after its length, the chain's at the target's end.
		if target+errorName < next && hasCString(entries[target+2:next], errorTarget) && hasCString(entries[target+errorName:next], chain) {
			return true
		}
		entries = entries[next:]
	}
	return false
}

// hasCString reports whether b begins with this string of C.
func hasCString(b []byte, s string) bool {
	return len(b) > len(s) && b[len(s)] == 0 && bytes.HasPrefix(b, []byte(s))
}

// getsockopt is getsockopt(2).
func (t *legacyTable) getsockopt(socket, option int, value []byte) error {
	length := uint32(len(value)) //nolint:gosec // the kernel's own length
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), uintptr(t.level), uintptr(option),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(unsafe.Pointer(&length)), 0) //nolint:gosec // that is how it is called
	if errno != 0 {
		return errno
	}
	return nil
}

// hasInterface reports whether there is a network interface of this name.
func hasInterface(name string) (bool, error) {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(socket) //nolint:errcheck // nothing was written
	request, err := unix.NewIfreq(name)
	if err != nil {
		return false, fmt.Errorf("name of the interface: %w", err)
	}
	err = unix.IoctlIfreq(socket, unix.SIOCGIFINDEX, request)
	if errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	return err == nil, err
}
