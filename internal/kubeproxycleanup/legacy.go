package kubeproxycleanup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/xtables"
)

const (
	replaceHeader     = 96 // struct ipt_replace
	addCountersHeader = 40 // struct xt_counters_info
	counterSize       = 16 // struct xt_counters
)

// removeLegacyChains removes kube-proxy's chains from the tables of iptables-legacy, and the jumps
// to them. It replaces each table as a whole, so that no packet sees a part of the change.
func removeLegacyChains(report func(string)) error {
	var errs []error
	for _, family := range xtables.Families() {
		names, err := family.Tables()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, table := range iptablesTables() {
			if !slices.Contains(names, table) {
				continue
			}
			kept, err := cleanLegacyTable(family, table, report)
			if err != nil {
				err = fmt.Errorf("%[1]w; to remove kube-proxy's chains, run: %[2]s-save -t %[3]s | grep -vE '%[4]s' | %[2]s-restore -T %[3]s", err, family.Program, table, chainPattern)
			}
			errs = append(errs, err, kept)
		}
	}
	return errors.Join(errs...)
}

// chainPattern matches the lines of iptables-save with kube-proxy's chains, see isKubeProxyChain.
const chainPattern = `KUBE-(SERVICES|EXTERNAL-SERVICES|NODEPORTS|POSTROUTING|MARK-MASQ|MARK-DROP|FORWARD|PROXY-|SVC-|SVL-|FW-|EXT-|XLB-|SEP-` +
	`|SOURCE-RANGES-FIREWALL|NODE-PORT|LOAD-BALANCER|IPVS-)`

// cleanLegacyTable removes kube-proxy's chains from one table. It returns an error about chains that other
// programs' rules use, and one about a failure.
func cleanLegacyTable(family xtables.Family, table string, report func(string)) (kept, err error) {
	unlock := lockXtables()
	defer unlock()
	socket, err := family.Open()
	if err != nil {
		return nil, err
	}
	defer socket.Close() //nolint:errcheck // the options take effect at once
	const attempts = 10
	for range attempts {
		var t *legacyTable
		if t, err = readLegacyTable(socket, table); err != nil {
			if errors.Is(err, unix.EAGAIN) { // the table changed after its length was read
				continue
			}
			return nil, err
		}
		p := newPlan(t.chainNames(), t.rules(), t.isBase)
		name := fmt.Sprintf("table %s %s of iptables-legacy", family.Name, table)
		if p.empty() {
			return p.keptError(name), nil
		}
		if err = t.replace(t.remaining(p)); err == nil {
			report(p.describe(name))
			return p.keptError(name), nil
		}
		if !errors.Is(err, unix.EAGAIN) { // the number of entries has changed
			break
		}
	}
	return nil, fmt.Errorf("change table %s of %s: %w", table, family.Program, err)
}

// lockXtables acquires the lock that iptables programs hold while they change a table. Without
// access to the lock file, it returns at once: the kernel rejects a change of a table whose number
// of entries has changed.
func lockXtables() (unlock func()) {
	fd, err := unix.Open("/run/xtables.lock", unix.O_RDONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return func() {}
	}
	const attempts, pause = 50, 100 * time.Millisecond
	for range attempts {
		if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		time.Sleep(pause)
	}
	return func() { _ = unix.Close(fd) } // releases the lock
}

// legacyEntry is a rule, or the start of a chain, with its chain.
type legacyEntry struct {
	chain string
	// head is set for the first entry of a user-defined chain, which contains its name.
	head   bool
	offset int
	data   []byte
}

// legacyTable is a table as read from the kernel.
type legacyTable struct {
	*xtables.Socket

	info    xtables.Info
	entries []legacyEntry
	// starts maps the offset of the first rule of a user-defined chain to its name.
	starts map[int]string
}

func readLegacyTable(socket *xtables.Socket, table string) (*legacyTable, error) {
	info, err := socket.Info(table)
	if err != nil {
		return nil, err
	}
	entries, err := socket.Entries(info, make([]byte, xtables.EntriesHeader+int(info.Length)))
	if err != nil {
		return nil, err
	}
	t := &legacyTable{Socket: socket, info: info, starts: map[int]string{}}
	if err := t.parse(entries); err != nil {
		return nil, fmt.Errorf("read table %s of %s: %w", table, socket.Program, err)
	}
	return t, nil
}

// hookNames are the names of the chains of the hooks, by number.
func hookNames() [xtables.Hooks]string {
	return [xtables.Hooks]string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}
}

// parse splits the entries. The chains of the hooks come first, each ends with its policy.
func (t *legacyTable) parse(b []byte) error {
	chain := ""
	for offset := 0; offset < len(b); {
		if len(b)-offset < t.EntrySize {
			return errors.New("truncated entry")
		}
		size := int(binary.NativeEndian.Uint16(b[offset+t.NextOffset:]))
		target := int(binary.NativeEndian.Uint16(b[offset+t.TargetOffset:]))
		if size < target+xtables.TargetHeader || target < t.EntrySize || size > len(b)-offset {
			return fmt.Errorf("invalid entry at offset %d", offset)
		}
		for hook, name := range hookNames() {
			if t.info.ValidHooks&(1<<hook) != 0 && int(t.info.HookEntry[hook]) == offset {
				chain = name
			}
		}
		e := legacyEntry{offset: offset, data: b[offset : offset+size]}
		if e.targetName(t.TargetOffset) == xtables.ErrorTarget {
			e.head, chain = true, unix.ByteSliceToString(e.data[target+xtables.TargetHeader:])
			t.starts[offset+size] = chain
		}
		e.chain = chain
		t.entries = append(t.entries, e)
		offset += size
	}
	return nil
}

// targetName returns the name of the entry's target, which is empty for a verdict or a jump.
func (e legacyEntry) targetName(targetOffset int) string {
	target := int(binary.NativeEndian.Uint16(e.data[targetOffset:]))
	return xtables.TargetName(e.data[target:])
}

// verdict returns the verdict of an entry with a standard target. A verdict that is not negative
// is the offset of the next entry.
func (t *legacyTable) verdict(e legacyEntry) (verdict []byte, ok bool) {
	target := int(binary.NativeEndian.Uint16(e.data[t.TargetOffset:])) + xtables.TargetHeader
	if e.targetName(t.TargetOffset) != "" || len(e.data) < target+4 {
		return nil, false
	}
	return e.data[target : target+4], true
}

func (t *legacyTable) isBase(chain string) bool {
	names := hookNames()
	return slices.Contains(names[:], chain)
}

// chainNames returns the names of the user-defined chains.
func (t *legacyTable) chainNames() []string {
	var names []string
	for _, e := range t.entries {
		if e.head {
			names = append(names, e.chain)
		}
	}
	return names
}

func (t *legacyTable) rules() []rule {
	var rules []rule
	for _, e := range t.entries {
		r := rule{chain: e.chain, handle: uint64(e.offset)} //nolint:gosec // an offset
		if verdict, ok := t.verdict(e); ok {
			r.jump = t.starts[int(int32(binary.NativeEndian.Uint32(verdict)))] //nolint:gosec // the kernel's type
		}
		rules = append(rules, r)
	}
	return rules
}

// remaining returns the entries that a plan does not remove.
func (t *legacyTable) remaining(p plan) []legacyEntry {
	removed := map[int]bool{}
	for _, jump := range p.jumps {
		removed[int(jump.handle)] = true //nolint:gosec // an offset
	}
	return slices.DeleteFunc(slices.Clone(t.entries), func(e legacyEntry) bool { return p.chains[e.chain] || removed[e.offset] })
}

// replace replaces the table in the kernel by some of its entries.
func (t *legacyTable) replace(entries []legacyEntry) error {
	// offsets maps old offsets to new ones. A removed entry has the offset of the next one.
	offsets := map[int]int{}
	size, next := 0, 0
	for _, e := range t.entries {
		offsets[e.offset] = size
		if next < len(entries) && entries[next].offset == e.offset {
			size += len(e.data)
			next++
		}
	}
	offsets[int(t.info.Length)] = size

	buffer := make([]byte, replaceHeader, replaceHeader+size)
	added := make([]byte, addCountersHeader, addCountersHeader+counterSize*len(entries))
	for _, e := range entries {
		data := slices.Clone(e.data)
		added = append(added, data[t.CountersOffset:t.CountersOffset+counterSize]...)
		moved := e
		moved.data = data
		if verdict, ok := t.verdict(moved); ok {
			if old := int32(binary.NativeEndian.Uint32(verdict)); old >= 0 { //nolint:gosec // the kernel's type
				to := offsets[int(old)]
				if int(old) == e.offset+len(e.data) { // the rule has no target
					to = offsets[e.offset] + len(e.data)
				}
				binary.NativeEndian.PutUint32(verdict, uint32(to)) //nolint:gosec // less than the length
			}
		}
		buffer = append(buffer, data...)
	}
	// The kernel writes the counters of the old entries.
	counters, err := unix.Mmap(-1, 0, counterSize*int(t.info.Entries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return fmt.Errorf("allocate memory: %w", err)
	}
	defer unix.Munmap(counters) //nolint:errcheck // it was mapped
	put := func(at int, value uint32) { binary.NativeEndian.PutUint32(buffer[at:], value) }
	copy(buffer, t.info.Name[:])
	put(32, t.info.ValidHooks)
	put(36, uint32(len(entries))) //nolint:gosec // at most the kernel's number
	put(40, uint32(size))         //nolint:gosec // at most the kernel's length
	for hook := range xtables.Hooks {
		if t.info.ValidHooks&(1<<hook) != 0 {
			put(44+4*hook, uint32(offsets[int(t.info.HookEntry[hook])])) //nolint:gosec // less than the length
			put(64+4*hook, uint32(offsets[int(t.info.Underflow[hook])])) //nolint:gosec // less than the length
		}
	}
	put(84, t.info.Entries)
	binary.NativeEndian.PutUint64(buffer[88:], uint64(uintptr(unsafe.Pointer(unsafe.SliceData(counters)))))
	if err := t.Replace(buffer); err != nil {
		return err
	}
	copy(added, t.info.Name[:])
	binary.NativeEndian.PutUint32(added[32:], uint32(len(entries))) //nolint:gosec // at most the kernel's number
	if err := t.AddCounters(added); err != nil {
		return fmt.Errorf("restore the counters of the remaining rules: %w", err)
	}
	return nil
}
