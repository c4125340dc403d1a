package otherproxy

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/xtables"
)

// largeTable is a length in bytes. Once the chain was found, a table of this length or more is not
// read again.
const largeTable = 1 << 20

// legacyTable is the nat table of one family in iptables-legacy.
type legacyTable struct {
	xtables.Family

	// lastInfo is the table at the last scan, lastFound the result of that scan.
	lastInfo  xtables.Info
	lastFound bool
}

func legacyTables() [2]legacyTable {
	families := xtables.Families()
	return [2]legacyTable{{Family: families[0]}, {Family: families[1]}}
}

// hasChain reports whether the table exists and has the chain.
func (t *legacyTable) hasChain(chain string) (bool, error) {
	return t.hasTarget(func(target []byte) bool { return xtables.StartsChain(target, chain) })
}

// hasTarget reports whether the table exists and has a target (struct xt_entry_target) that match
// accepts. All calls for a table must ask for the same, because the result is cached.
func (t *legacyTable) hasTarget(match func(target []byte) bool) (bool, error) {
	names, err := t.Tables()
	if err != nil && !errors.Is(err, fs.ErrPermission) { // only root can list tables
		return false, err
	}
	if !slices.Contains(names, iptablesTable) {
		return false, nil
	}
	socket, err := t.Open()
	if err != nil {
		if errors.Is(err, unix.EAFNOSUPPORT) {
			return false, nil // no IPv6
		}
		return false, err
	}
	defer socket.Close() //nolint:errcheck // nothing was written
	for {
		found, err := t.scan(socket, match)
		if !errors.Is(err, unix.EAGAIN) { // the table changed after its length was read
			return found, err
		}
	}
}

func (t *legacyTable) scan(socket *xtables.Socket, match func(target []byte) bool) (bool, error) {
	info, err := socket.Info(iptablesTable)
	if err != nil {
		return false, err
	}
	if info == t.lastInfo || t.lastFound && info.Length >= largeTable {
		return t.lastFound, nil
	}
	// The table may have a hundred megabytes, which the Go heap would keep.
	buffer, err := unix.Mmap(-1, 0, xtables.EntriesHeader+int(info.Length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return false, fmt.Errorf("allocate memory for table %s: %w", iptablesTable, err)
	}
	defer unix.Munmap(buffer) //nolint:errcheck // it was mapped
	entries, err := socket.Entries(info, buffer)
	if err != nil {
		return false, err
	}
	found := false
	for target := range t.Targets(entries) {
		if match(target) {
			found = true
			break
		}
	}
	t.lastInfo, t.lastFound = info, found
	return found, nil
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
