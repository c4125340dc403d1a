package nfhooks

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/xtables"
)

// readLegacy returns the information and the entries of a table of iptables-legacy, or nil if the
// table does not exist or this process may not list tables.
func readLegacy(f xtables.Family, table string) (info xtables.Info, entries []byte, err error) {
	if names, err := f.Tables(); err != nil || !slices.Contains(names, table) {
		return info, nil, nil
	}
	socket, err := f.Open()
	if err != nil {
		return info, nil, err
	}
	defer socket.Close() //nolint:errcheck // nothing was written
	for {
		if info, err = socket.Info(table); err != nil {
			return info, nil, err
		}
		entries, err = socket.Entries(info, make([]byte, xtables.EntriesHeader+int(info.Length)))
		if !errors.Is(err, unix.EAGAIN) { // the table changed after its length was read
			return info, entries, err
		}
	}
}

// policyDrops reports whether the entry at this offset, a chain's policy, has the verdict drop.
func policyDrops(f xtables.Family, entries []byte, offset uint32) bool {
	if int(offset)+f.EntrySize > len(entries) {
		return false
	}
	entry := entries[offset:]
	verdict := int(binary.NativeEndian.Uint16(entry[f.TargetOffset:])) + xtables.TargetHeader
	return verdict+4 <= len(entry) && int32(binary.NativeEndian.Uint32(entry[verdict:])) == -nfDrop-1 //nolint:gosec // a signed number
}

// legacyDroppers returns the chains of the tables filter of iptables-legacy with the policy drop.
func legacyDroppers() ([]Dropper, error) {
	var droppers []Dropper
	for _, f := range xtables.Families() {
		info, entries, err := readLegacy(f, "filter")
		if err != nil {
			return droppers, err
		}
		for hook, chain := range map[Hook]string{Input: "INPUT", Forward: "FORWARD"} {
			if entries != nil && policyDrops(f, entries, info.Underflow[hook]) {
				droppers = append(droppers, Dropper{
					Hook: hook, Name: fmt.Sprintf("chain %s of %s", chain, f.Program), Family: f.Name, Reason: policyDrop,
					Fix: f.Program + " -P " + chain + " ACCEPT",
				})
			}
		}
	}
	return droppers, nil
}

// LegacyMasquerading returns the tables of iptables-legacy with a rule that masquerades.
func LegacyMasquerading() ([]string, error) {
	var found []string
	for _, f := range xtables.Families() {
		_, entries, err := readLegacy(f, "nat")
		if err != nil {
			return found, err
		}
		for target := range f.Targets(entries) {
			if xtables.TargetName(target) == "MASQUERADE" {
				found = append(found, "table nat of "+f.Program)
				break
			}
		}
	}
	return found, nil
}
