package preflight

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cgroupRoot is the mount point of cgroup v2. In a container it is the container's own cgroup,
// whose effective programs include those of the root.
const cgroupRoot = "/sys/fs/cgroup"

// cgroupAttachTypes returns the attach types of programs that translate a socket's destination.
func cgroupAttachTypes() map[string]uint32 {
	return map[string]uint32{
		"connect4": unix.BPF_CGROUP_INET4_CONNECT, "connect6": unix.BPF_CGROUP_INET6_CONNECT,
		"sendmsg4": unix.BPF_CGROUP_UDP4_SENDMSG, "sendmsg6": unix.BPF_CGROUP_UDP6_SENDMSG,
	}
}

// checkBPF reports eBPF programs that translate destinations before nf_tables sees a packet.
func (c *checker) checkBPF() {
	c.checkCgroupPrograms()
	c.checkInterfacePrograms()
}

// checkCgroupPrograms finds socket load balancers, such as Cilium's.
func (c *checker) checkCgroupPrograms() {
	const check = "ebpf-sockets"
	cgroup, err := os.Open(cgroupRoot)
	if err != nil {
		c.error(check, err)
		return
	}
	defer cgroup.Close() //nolint:errcheck // nothing was written to it
	var found []string
	attachTypes := cgroupAttachTypes()
	for _, name := range slices.Sorted(maps.Keys(attachTypes)) {
		ids, err := queryPrograms(int(cgroup.Fd()), attachTypes[name], unix.BPF_F_QUERY_EFFECTIVE)
		if errors.Is(err, unix.EBADF) {
			c.Add(check, OK, "", "%s is not cgroup v2, which eBPF programs at sockets need", cgroupRoot)
			return
		}
		if err != nil {
			c.error(check, fmt.Errorf("list eBPF programs at %s of %s: %w", name, cgroupRoot, err))
			return
		}
		for _, id := range ids {
			found = append(found, name+": "+programName(id))
		}
	}
	if len(found) == 0 {
		c.Add(check, OK, "", "no eBPF program translates the destinations of sockets")
		return
	}
	status, consequence := Info, "if they translate Services, Fairlead does not see these connections"
	if slices.ContainsFunc(found, isCilium) {
		status, consequence = Warning, "Cilium translates Services before Fairlead sees the connections"
	}
	c.Add(check, status, "for Cilium: set kubeProxyReplacement=false and restart its agents", "eBPF programs at sockets (%s): %s", strings.Join(found, ", "), consequence)
}

func isCilium(program string) bool {
	_, name, _ := strings.Cut(program, ": ")
	return strings.HasPrefix(name, "cil_")
}

// checkInterfacePrograms finds eBPF programs at the ingress of interfaces.
func (c *checker) checkInterfacePrograms() {
	const check = "ebpf-interfaces"
	links, err := netlink.LinkList()
	if err != nil {
		c.error(check, fmt.Errorf("list interfaces: %w", err))
		return
	}
	var found []string
	for _, link := range links {
		attrs := link.Attrs()
		if attrs.Xdp != nil && attrs.Xdp.Attached {
			found = append(found, "xdp of "+attrs.Name+": "+programName(attrs.Xdp.ProgId))
		}
		filters, err := netlink.FilterList(link, netlink.HANDLE_MIN_INGRESS)
		if err != nil { // the interface was deleted, or the kernel has no traffic control
			continue
		}
		for _, filter := range filters {
			if f, ok := filter.(*netlink.BpfFilter); ok {
				found = append(found, "tc of "+attrs.Name+": "+f.Name)
			}
		}
		// Kernels before Linux 6.6 return an error.
		if ids, err := queryPrograms(attrs.Index, unix.BPF_TCX_INGRESS, 0); err == nil {
			for _, id := range ids {
				found = append(found, "tcx of "+attrs.Name+": "+programName(id))
			}
		}
	}
	switch {
	case len(found) == 0:
		c.Add(check, OK, "", "no eBPF program at the ingress of an interface")
	case slices.ContainsFunc(found, isCilium):
		c.Add(check, Warning, "set kubeProxyReplacement=false and restart Cilium's agents",
			"Cilium's eBPF programs at interfaces (%s): if it replaces kube-proxy, it translates Services before Fairlead", shorten(found))
	default:
		c.Add(check, Info, "", "eBPF programs at interfaces see packets before Fairlead: %s", shorten(found))
	}
}

// shorten joins the first elements of a list.
func shorten(list []string) string {
	const most = 6
	if len(list) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
	}
	return strings.Join(list, ", ")
}

// queryPrograms returns the IDs of the programs that are attached to a cgroup or an interface. The
// target is a file descriptor or an index.
func queryPrograms(target int, attachType, flags uint32) ([]uint32, error) {
	const most = 64
	ids := make([]uint32, most)
	query := struct { // the part of union bpf_attr for BPF_PROG_QUERY
		target, attachType, queryFlags, attachFlags uint32
		programs                                    uint64
		count, _                                    uint32
	}{
		target: uint32(target), attachType: attachType, queryFlags: flags, count: most, //nolint:gosec // an open file or an index
		programs: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(ids)))), //nolint:gosec // an argument of a system call
	}
	_, err := bpf(unix.BPF_PROG_QUERY, unsafe.Pointer(&query), unsafe.Sizeof(query)) //nolint:gosec // an argument of a system call
	runtime.KeepAlive(ids)
	if err != nil {
		return nil, err
	}
	return ids[:min(most, query.count)], nil
}

// programName returns the name of a program, or its ID if the name cannot be read.
func programName(id uint32) string {
	unnamed := fmt.Sprintf("program %d", id)
	get := struct{ id, nextID, flags uint32 }{id: id}
	fd, err := bpf(unix.BPF_PROG_GET_FD_BY_ID, unsafe.Pointer(&get), unsafe.Sizeof(get)) //nolint:gosec // an argument of a system call
	if err != nil {
		return unnamed
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written to it
	// struct bpf_prog_info up to its name.
	var info struct {
		_    [64]byte
		name [16]byte
	}
	request := struct {
		fd, length uint32
		info       uint64
	}{uint32(fd), uint32(unsafe.Sizeof(info)), uint64(uintptr(unsafe.Pointer(&info)))} //nolint:gosec // arguments of a system call
	_, err = bpf(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&request), unsafe.Sizeof(request)) //nolint:gosec // an argument of a system call
	runtime.KeepAlive(&info)
	if name := string(bytes.TrimRight(info.name[:], "\x00")); err == nil && name != "" {
		return name
	}
	return unnamed
}

// bpf calls bpf(2).
func bpf(command uintptr, attributes unsafe.Pointer, size uintptr) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attributes), size)
	if errno != 0 {
		return 0, errno
	}
	return int(fd), nil
}
