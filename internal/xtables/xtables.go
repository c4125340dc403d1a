// Package xtables reads and replaces the tables of iptables-legacy. The kernel stores each of them
// as one block of entries, and socket options transfer the block (linux/netfilter/x_tables.h,
// linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h). All integers have the
// byte order of the machine.
package xtables

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Family is iptables-legacy of one IP family.
type Family struct {
	Name    string // ip or ip6, as in nftables
	Program string // iptables-legacy or ip6tables-legacy
	// TargetOffset, NextOffset, CountersOffset and EntrySize describe struct ipt_entry or
	// ip6t_entry.
	TargetOffset, NextOffset, CountersOffset, EntrySize int

	domain, level int
	namesFile     string
}

// Families returns IPv4 and IPv6.
func Families() [2]Family {
	return [2]Family{
		{
			Name: "ip", Program: "iptables-legacy", TargetOffset: 88, NextOffset: 90, CountersOffset: 96, EntrySize: 112,
			domain: unix.AF_INET, level: unix.SOL_IP, namesFile: "/proc/thread-self/net/ip_tables_names",
		},
		{
			Name: "ip6", Program: "ip6tables-legacy", TargetOffset: 140, NextOffset: 142, CountersOffset: 152, EntrySize: 168,
			domain: unix.AF_INET6, level: unix.SOL_IPV6, namesFile: "/proc/thread-self/net/ip6_tables_names",
		},
	}
}

const (
	// Hooks is the number of netfilter hooks (NF_INET_NUMHOOKS).
	Hooks = 5
	// EntriesHeader is the size of struct ipt_get_entries without its entries.
	EntriesHeader = 40
	// TargetHeader is the size of struct xt_entry_target. Its data follow: the verdict of a
	// standard target, or the chain's name of an [ErrorTarget].
	TargetHeader = 32
	// ErrorTarget is the name of the target at the start of a user-defined chain.
	ErrorTarget = "ERROR"

	targetName        = 2  // offset of the name in struct xt_entry_target, after the length
	optionGetInfo     = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	optionGetEntries  = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	optionReplace     = 64 // IPT_SO_SET_REPLACE, IP6T_SO_SET_REPLACE
	optionAddCounters = 65 // IPT_SO_SET_ADD_COUNTERS, IP6T_SO_SET_ADD_COUNTERS
)

// Info is struct ipt_getinfo, which equals ip6t_getinfo. Length is the size of all entries in bytes.
type Info struct {
	Name            [32]byte
	ValidHooks      uint32
	HookEntry       [Hooks]uint32
	Underflow       [Hooks]uint32
	Entries, Length uint32
}

// Tables returns the names of the existing tables, in the network namespace of the calling thread.
// The result is empty if the kernel lacks iptables-legacy. The error wraps [fs.ErrPermission] if the
// process is not root. Read only these tables: the kernel creates any other one on request, with
// its hooks.
func (f Family) Tables() ([]string, error) {
	names, err := os.ReadFile(f.namesFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list tables of %s: %w", f.Program, err)
	}
	return strings.Fields(string(names)), nil
}

// Targets yields the target (struct xt_entry_target) and the rest of each entry. It ends at an
// invalid entry.
func (f Family) Targets(entries []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for len(entries) >= f.EntrySize {
			target := int(binary.NativeEndian.Uint16(entries[f.TargetOffset:]))
			next := int(binary.NativeEndian.Uint16(entries[f.NextOffset:]))
			if next < f.EntrySize || next > len(entries) {
				return
			}
			if target+TargetHeader <= next && !yield(entries[target:next]) {
				return
			}
			entries = entries[next:]
		}
	}
}

// TargetName returns the name of a target, which is empty for a verdict or a jump.
func TargetName(target []byte) string {
	return unix.ByteSliceToString(target[targetName : TargetHeader-1])
}

// StartsChain reports whether a target is the start of this user-defined chain.
func StartsChain(target []byte, chain string) bool {
	return hasCString(target[targetName:], ErrorTarget) && hasCString(target[TargetHeader:], chain)
}

// hasCString reports whether b starts with a null-terminated string.
func hasCString(b []byte, s string) bool {
	return len(b) > len(s) && b[len(s)] == 0 && bytes.HasPrefix(b, []byte(s))
}

// Socket transfers tables of one family, in the network namespace in which it was opened.
type Socket struct {
	Family

	fd int
}

// Open opens a socket. The error wraps unix.EAFNOSUPPORT if the kernel lacks IPv6.
func (f Family) Open() (*Socket, error) {
	fd, err := unix.Socket(f.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket for %s: %w", f.Program, err)
	}
	return &Socket{Family: f, fd: fd}, nil
}

// Close closes the socket.
func (s *Socket) Close() error { return unix.Close(s.fd) }

// Info reads a table's information.
func (s *Socket) Info(table string) (Info, error) {
	var info Info
	copy(info.Name[:], table)
	err := s.getsockopt(optionGetInfo, unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info))) //nolint:gosec // a struct without pointers
	if err != nil {
		return Info{}, fmt.Errorf("read length of table %s of %s: %w", table, s.Program, err)
	}
	return info, nil
}

// Entries reads a table's entries into buffer, which has [EntriesHeader] and info.Length bytes, and
// returns the part of it with the entries. The error wraps unix.EAGAIN if the length has changed
// since [Socket.Info].
func (s *Socket) Entries(info Info, buffer []byte) ([]byte, error) {
	copy(buffer, info.Name[:])
	binary.NativeEndian.PutUint32(buffer[len(info.Name):], info.Length)
	if err := s.getsockopt(optionGetEntries, buffer); err != nil {
		return nil, fmt.Errorf("read table %s of %s: %w", unix.ByteSliceToString(info.Name[:]), s.Program, err)
	}
	return buffer[EntriesHeader:], nil
}

// Replace replaces a table. The request is a struct ipt_replace or ip6t_replace.
func (s *Socket) Replace(request []byte) error { return s.setsockopt(optionReplace, request) }

// AddCounters adds to the counters of a table's entries. The request is a struct xt_counters_info.
func (s *Socket) AddCounters(request []byte) error { return s.setsockopt(optionAddCounters, request) }

// getsockopt calls getsockopt(2).
func (s *Socket) getsockopt(option int, value []byte) error {
	length := uint32(len(value)) //nolint:gosec // a length from the kernel
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), uintptr(s.level), uintptr(option),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(unsafe.Pointer(&length)), 0) //nolint:gosec // arguments of a system call
	if errno != 0 {
		return errno
	}
	return nil
}

// setsockopt calls setsockopt(2).
func (s *Socket) setsockopt(option int, value []byte) error {
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(s.fd), uintptr(s.level), uintptr(option),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(len(value)), 0) //nolint:gosec // arguments of a system call
	if errno != 0 {
		return errno
	}
	return nil
}
