package main

import (
	"fmt"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/preflight"
)

// TestCheckBPF checks that eBPF programs at interfaces are found, with the names that Cilium uses.
func TestCheckBPF(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		program string
		attach  func(link netlink.Link, program int, name string) error
		status  preflight.Status
		want    string
	}{
		{"Cilium at tc", "cil_from_netdev", attachTC, preflight.Warning, "tc of bpf0: cil_from_netdev"},
		{"another program at tc", "meter", attachTC, preflight.Info, "tc of bpf0: meter"},
		{"Cilium at tcx", "cil_from_netdev", attachTCX, preflight.Warning, "tcx of bpf0: cil_from_netdev"},
		{"another program at tcx", "meter", attachTCX, preflight.Info, "tcx of bpf0: meter"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t)
			program := loadClassifier(t, test.program)
			if err := n.Node.Do(func() error {
				link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "bpf0"}, PeerName: "bpf1"}
				if err := netlink.LinkAdd(link); err != nil {
					return err
				}
				added, err := netlink.LinkByName("bpf0")
				if err != nil {
					return err
				}
				return test.attach(added, program, test.program)
			}); err != nil {
				t.Fatal(err)
			}
			n.check().expect("ebpf-interfaces", test.status, test.want)
		})
	}
}

// loadClassifier loads an eBPF program that lets all packets pass. The kernel frees it when nothing
// refers to it.
func loadClassifier(t *testing.T, name string) (descriptor int) {
	t.Helper()
	// r0 = -1 (TC_ACT_UNSPEC and TCX_NEXT), exit
	instructions := []uint64{0xffffffff000000b7, 0x95}
	license := []byte("GPL\x00")
	load := struct { // the part of union bpf_attr for BPF_PROG_LOAD
		programType, count    uint32
		instructions, license uint64
		logLevel, logSize     uint32
		log                   uint64
		kernelVersion, flags  uint32
		name                  [16]byte
	}{
		programType: unix.BPF_PROG_TYPE_SCHED_CLS, count: uint32(len(instructions)),
		instructions: uint64(uintptr(unsafe.Pointer(&instructions[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	copy(load.name[:], name)
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&load)), unsafe.Sizeof(load))
	if errno != 0 {
		t.Fatalf("load an eBPF program: %v", errno)
	}
	t.Cleanup(func() { _ = unix.Close(int(fd)) })
	return int(fd)
}

func attachTC(link netlink.Link, program int, name string) error {
	attrs := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}
	if err := netlink.QdiscAdd(&netlink.GenericQdisc{QdiscAttrs: attrs, QdiscType: "clsact"}); err != nil {
		return fmt.Errorf("add a qdisc: %w", err)
	}
	return netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: attrs.LinkIndex, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1,
		},
		Fd: program, Name: name, DirectAction: true,
	})
}

func attachTCX(link netlink.Link, program int, _ string) error {
	attach := struct{ target, program, attachType, flags uint32 }{uint32(link.Attrs().Index), uint32(program), unix.BPF_TCX_INGRESS, 0}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attach)), unsafe.Sizeof(attach))
	if errno != 0 {
		return fmt.Errorf("attach an eBPF program: %w", errno)
	}
	return nil
}
