package nfhooks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// legacyFamily describes iptables-legacy of one IP family (linux/netfilter_ipv4/ip_tables.h,
// linux/netfilter_ipv6/ip6_tables.h).
type legacyFamily struct {
	family, program string
	domain, level   int
	namesFile       string
	// targetOffset, nextOffset and entrySize describe struct ipt_entry or ip6t_entry.
	targetOffset, nextOffset, entrySize int
}

func legacyFamilies() []legacyFamily {
	return []legacyFamily{
		{"ip", "iptables", unix.AF_INET, unix.SOL_IP, "/proc/thread-self/net/ip_tables_names", 88, 90, 112},
		{"ip6", "ip6tables", unix.AF_INET6, unix.SOL_IPV6, "/proc/thread-self/net/ip6_tables_names", 140, 142, 168},
	}
}

// legacyInfo is struct ipt_getinfo, which equals ip6t_getinfo.
type legacyInfo struct {
	Name            [32]byte
	ValidHooks      uint32
	HookEntry       [5]uint32
	Underflow       [5]uint32
	Entries, Length uint32
}

const (
	getInfo       = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	getEntries    = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	entriesHeader = 40 // struct ipt_get_entries without entries
	targetName    = 2  // offset of the name in struct xt_entry_target, after the length
	targetData    = 32 // size of struct xt_entry_target
)

// read returns the information and the entries of a table, or nil if the table does not exist.
func (f legacyFamily) read(table string) (legacyInfo, []byte, error) {
	var info legacyInfo
	if !hasLegacyTable(f.namesFile, table) {
		return info, nil, nil
	}
	socket, err := unix.Socket(f.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return info, nil, fmt.Errorf("open socket for iptables-legacy: %w", err)
	}
	defer unix.Close(socket) //nolint:errcheck // nothing was written
	for {
		copy(info.Name[:], table)
		if err := f.getsockopt(socket, getInfo, unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info))); err != nil { //nolint:gosec // a struct without pointers
			return info, nil, fmt.Errorf("read length of table %s of %s-legacy: %w", table, f.program, err)
		}
		buffer := make([]byte, entriesHeader+int(info.Length))
		copy(buffer, table)
		binary.NativeEndian.PutUint32(buffer[len(info.Name):], info.Length)
		err := f.getsockopt(socket, getEntries, buffer)
		if errors.Is(err, unix.EAGAIN) { // the table changed after its length was read
			continue
		}
		if err != nil {
			return info, nil, fmt.Errorf("read table %s of %s-legacy: %w", table, f.program, err)
		}
		return info, buffer[entriesHeader:], nil
	}
}

// getsockopt calls getsockopt(2).
func (f legacyFamily) getsockopt(socket, option int, value []byte) error {
	length := uint32(len(value)) //nolint:gosec // a length from the kernel
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), uintptr(f.level), uintptr(option),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(unsafe.Pointer(&length)), 0) //nolint:gosec // arguments of a system call
	if errno != 0 {
		return errno
	}
	return nil
}

// policyDrops reports whether the entry at this offset, a chain's policy, has the verdict drop.
func (f legacyFamily) policyDrops(entries []byte, offset uint32) bool {
	if int(offset)+f.entrySize > len(entries) {
		return false
	}
	entry := entries[offset:]
	verdict := int(binary.NativeEndian.Uint16(entry[f.targetOffset:])) + targetData
	return verdict+4 <= len(entry) && int32(binary.NativeEndian.Uint32(entry[verdict:])) == -nfDrop-1 //nolint:gosec // a signed number
}

// legacyDroppers returns the chains of the tables filter of iptables-legacy with the policy drop.
func legacyDroppers() ([]Dropper, error) {
	var droppers []Dropper
	for _, f := range legacyFamilies() {
		info, entries, err := f.read("filter")
		if err != nil {
			return droppers, err
		}
		for hook, chain := range map[Hook]string{Input: "INPUT", Forward: "FORWARD"} {
			if entries != nil && f.policyDrops(entries, info.Underflow[hook]) {
				droppers = append(droppers, Dropper{
					Hook: hook, Name: fmt.Sprintf("chain %s of %s-legacy", chain, f.program), Family: f.family, Reason: policyDrop,
					Fix: f.program + "-legacy -P " + chain + " ACCEPT",
				})
			}
		}
	}
	return droppers, nil
}

// LegacyMasquerading returns the tables of iptables-legacy with a rule that masquerades.
func LegacyMasquerading() ([]string, error) {
	var found []string
	for _, f := range legacyFamilies() {
		_, entries, err := f.read("nat")
		if err != nil {
			return found, err
		}
		if f.hasTarget(entries, "MASQUERADE") {
			found = append(found, fmt.Sprintf("table nat of %s-legacy", f.program))
		}
	}
	return found, nil
}

// hasTarget reports whether an entry has the target.
func (f legacyFamily) hasTarget(entries []byte, name string) bool {
	for len(entries) >= f.entrySize {
		target := int(binary.NativeEndian.Uint16(entries[f.targetOffset:])) + targetName
		next := int(binary.NativeEndian.Uint16(entries[f.nextOffset:]))
		if next < f.entrySize || next > len(entries) || target > next {
			return false
		}
		if bytes.HasPrefix(entries[target:next], []byte(name+"\x00")) {
			return true
		}
		entries = entries[next:]
	}
	return false
}
