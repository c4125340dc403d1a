package report

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nfhooks"
	"fairlead.io/fairlead/internal/otherproxy"
)

// Versions returns the part with the versions of Fairlead, Go, the kernel and the distribution.
func Versions(version, kubernetesVersion string) Part {
	return Part{Name: "versions.json", Collect: func(context.Context) ([]byte, error) {
		var name unix.Utsname
		err := unix.Uname(&name)
		values := map[string]any{
			"fairlead": version, "kubernetes": kubernetesVersion, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH, "cpus": runtime.NumCPU(),
			"kernel": unix.ByteSliceToString(name.Release[:]), "kernelVersion": unix.ByteSliceToString(name.Version[:]), "machine": unix.ByteSliceToString(name.Machine[:]),
		}
		for _, path := range []string{"/etc/os-release", "/usr/lib/os-release"} { // an empty image has neither
			if text, err := os.ReadFile(path); err == nil {
				values["distribution"] = osRelease(string(text))
				break
			}
		}
		if info, ok := debug.ReadBuildInfo(); ok {
			modules := map[string]string{}
			for _, m := range info.Deps {
				modules[m.Path] = m.Version
			}
			values["goModules"] = modules
		}
		text, marshalErr := marshal(values)
		return text, errors.Join(err, marshalErr)
	}}
}

// osRelease returns the fields of os-release(5) that identify the distribution.
func osRelease(text string) map[string]string {
	fields := map[string]string{}
	for line := range strings.Lines(text) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && slices.Contains([]string{"ID", "VERSION_ID", "PRETTY_NAME", "VARIANT_ID", "BUILD_ID"}, name) {
			fields[name] = strings.Trim(value, `"'`)
		}
	}
	return fields
}

// Modules returns the part with the loaded kernel modules.
func Modules() Part {
	return Part{Name: "modules.txt", Collect: func(context.Context) ([]byte, error) {
		text, err := os.ReadFile("/proc/modules")
		if errors.Is(err, fs.ErrNotExist) {
			return []byte("the kernel has no loadable modules\n"), nil
		}
		return text, err
	}}
}

// sysctlPatterns match the files below /proc/sys that affect Services.
func sysctlPatterns() []string {
	return []string{
		"net/ipv4/ip_forward", "net/ipv4/ip_local_port_range", "net/ipv4/ip_local_reserved_ports", "net/ipv4/ip_nonlocal_bind", "net/ipv4/vs/*",
		"net/ipv4/conf/*/route_localnet", "net/ipv4/conf/*/rp_filter", "net/ipv4/conf/*/forwarding", "net/ipv4/conf/*/arp_ignore", "net/ipv4/conf/*/arp_announce",
		"net/ipv4/conf/*/src_valid_mark", "net/ipv6/conf/*/forwarding", "net/ipv6/conf/*/disable_ipv6", "net/bridge/*", "net/netfilter/*",
		"net/core/somaxconn", "net/core/netdev_max_backlog", "net/core/rmem_max", "net/core/bpf_jit_enable", "net/ipv4/tcp_max_syn_backlog",
		"fs/file-max", "fs/nr_open", "kernel/unprivileged_bpf_disabled",
	}
}

// maxSysctls bounds the settings of nodes with many interfaces.
const maxSysctls = 4000

// Sysctls returns the part with the kernel settings that affect Services.
func Sysctls() Part {
	return Part{Name: "sysctls.txt", Collect: func(context.Context) ([]byte, error) {
		const root = "/proc/sys/"
		var lines []string
		for _, pattern := range sysctlPatterns() {
			files, err := filepath.Glob(root + pattern)
			if err != nil { // the patterns are valid
				return nil, err
			}
			for _, file := range files {
				text, err := os.ReadFile(file)
				switch value := strings.Join(strings.Fields(string(text)), " "); {
				case err == nil:
					lines = append(lines, sysctlName(strings.TrimPrefix(file, root))+" = "+value)
				case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EISDIR):
					lines = append(lines, sysctlName(strings.TrimPrefix(file, root))+": "+err.Error())
				}
			}
		}
		slices.Sort(lines)
		lines = slices.Compact(lines)
		var err error
		if len(lines) > maxSysctls {
			lines, err = lines[:maxSysctls], fmt.Errorf("only the first %d settings are in the report", maxSysctls)
		}
		return []byte(strings.Join(lines, "\n") + "\n"), err
	}}
}

// sysctlName returns the name of a setting in the notation of sysctl(8), which swaps dots and
// slashes.
func sysctlName(path string) string {
	return strings.NewReplacer("/", ".", ".", "/").Replace(path)
}

// Addresses returns the part with the node's interfaces and their addresses.
func Addresses() Part {
	return Part{Name: "interfaces.json", Collect: func(context.Context) ([]byte, error) {
		interfaces, err := net.Interfaces()
		if err != nil {
			return nil, err
		}
		type entry struct {
			Name      string   `json:"name"`
			MTU       int      `json:"mtu"`
			Flags     string   `json:"flags"`
			Addresses []string `json:"addresses"`
		}
		var buffer bytes.Buffer
		var entries []entry
		for _, i := range interfaces {
			e := entry{Name: i.Name, MTU: i.MTU, Flags: i.Flags.String()}
			addrs, addrsErr := i.Addrs()
			err = errors.Join(err, addrsErr)
			for _, a := range addrs {
				e.Addresses = append(e.Addresses, a.String())
			}
			entries = append(entries, e)
		}
		err = errors.Join(err, marshalLines(&buffer, entries))
		return buffer.Bytes(), err
	}}
}

// Hooks returns the part with the functions that the kernel calls for packets, in their order, and
// the chains that drop packets.
func Hooks() Part {
	return Part{Name: "hooks.txt", Collect: func(context.Context) ([]byte, error) {
		conn, err := nfhooks.Dial()
		if err != nil {
			return nil, err
		}
		defer conn.Close() //nolint:errcheck // nothing was written to it
		var text bytes.Buffer
		var errs []error
		for _, family := range []string{"ip", "ip6"} {
			for _, hook := range []nfhooks.Hook{nfhooks.Prerouting, nfhooks.Input, nfhooks.Forward, nfhooks.Output, nfhooks.Postrouting} {
				functions, err := conn.Functions(family, hook)
				if errors.Is(err, nfhooks.ErrUnsupported) {
					_, _ = fmt.Fprintf(&text, "%s %s: %v\n", family, hook, err) // writing to a Buffer cannot fail
					continue
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("%s %s: %w", family, hook, err))
					continue
				}
				_, _ = fmt.Fprintf(&text, "%s %s\n", family, hook) // writing to a Buffer cannot fail
				for _, f := range functions {
					_, _ = fmt.Fprintf(&text, "  %6d %s\n", f.Priority, f.Name)
				}
			}
		}
		chains, err := conn.Chains()
		errs = append(errs, err)
		slices.SortStableFunc(chains, func(a, b nfhooks.Chain) int {
			return cmp.Or(strings.Compare(a.Family, b.Family), cmp.Compare(a.Hook, b.Hook), cmp.Compare(a.Priority, b.Priority))
		})
		text.WriteString("\nbase chains of nftables: hook, priority, chain, type\n")
		for _, c := range chains {
			_, _ = fmt.Fprintf(&text, "  %-11s %6d %s (%s)\n", c.Hook, c.Priority, c, c.Type)
		}
		droppers, err := conn.Droppers(chains, func(nfhooks.Chain) bool { return false })
		errs = append(errs, err)
		text.WriteString("\nchains that drop what their rules do not accept\n")
		for _, d := range droppers {
			_, _ = fmt.Fprintf(&text, "  %s %s %s: %s\n", d.Family, d.Hook, d.Name, d.Reason)
		}
		return text.Bytes(), errors.Join(errs...)
	}}
}

// OtherProxies returns the part with the rules of other Service proxies.
func OtherProxies() Part {
	return Part{Name: "other-proxies.json", Collect: func(context.Context) ([]byte, error) {
		scanner, err := otherproxy.NewScanner()
		if err != nil {
			return nil, err
		}
		rules, err := scanner.Scan()
		err = errors.Join(err, scanner.Close())
		if rules == nil {
			rules = []otherproxy.Rules{}
		}
		text, marshalErr := marshal(rules)
		return text, errors.Join(err, marshalErr)
	}}
}

// Conntrack returns the part with the statistics of connection tracking.
func Conntrack() Part {
	return Part{Name: "conntrack.json", Collect: func(context.Context) ([]byte, error) {
		statistics, err := conntrackStatistics()
		values := map[string]any{"statistics": statistics}
		for _, name := range []string{"count", "max", "buckets", "expect_max"} {
			text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_" + name)
			if n, parseErr := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && parseErr == nil {
				values[name] = n
			}
		}
		text, marshalErr := marshal(values)
		return text, errors.Join(err, marshalErr)
	}}
}

// conntrackCounters are the names of enum ctattr_stats_cpu
// (linux/netfilter/nfnetlink_conntrack.h), from 1.
func conntrackCounters() []string {
	return []string{
		"searched", "found", "new", "invalid", "ignore", "delete", "deleteList", "insert", "insertFailed", "drop", "earlyDrop", "error", "searchRestart",
		"clashResolve", "chainTooLong",
	}
}

// conntrackStatistics returns the counters of connection tracking, summed over all processors.
func conntrackStatistics() (map[string]uint64, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket for connection tracking: %w", err)
	}
	defer conn.Close() //nolint:errcheck // nothing was written to it
	const (
		getStatsCPU = 4 // IPCTNL_MSG_CT_GET_STATS_CPU
		headerSize  = 4 // struct nfgenmsg
	)
	replies, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_CTNETLINK<<8 | getStatsCPU, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, headerSize),
	})
	if err != nil {
		return nil, fmt.Errorf("read statistics of connection tracking: %w", err)
	}
	names, sums := conntrackCounters(), map[string]uint64{}
	for _, reply := range replies {
		if len(reply.Data) < headerSize {
			continue
		}
		attributes, err := netlink.NewAttributeDecoder(reply.Data[headerSize:])
		if err != nil {
			return sums, fmt.Errorf("decode statistics of connection tracking: %w", err)
		}
		attributes.ByteOrder = binary.BigEndian
		for attributes.Next() {
			if t := int(attributes.Type()); t >= 1 && t <= len(names) {
				sums[names[t-1]] += uint64(attributes.Uint32())
			}
		}
		if err := attributes.Err(); err != nil {
			return sums, fmt.Errorf("decode statistics of connection tracking: %w", err)
		}
	}
	return sums, nil
}
