package main

import (
	"maps"
	"runtime"
	"slices"
)

// platform describes an architecture that QEMU emulates.
type platform struct {
	debian        string            // Debian's name of the architecture
	kernels       map[string]string // kernel versions and their Debian releases
	kernelPackage string            // depends on the package of the current kernel
	modules       string            // additional rules in the form of moduleRules
	suite         string            // Debian release of the programs in the virtual machine
	loadAtBoot    string            // kernel modules of the devices below

	qemu      string // program
	machine   string
	cpu       string
	parameter string   // additional kernel parameters
	console   string   // device of the kernel console
	output    string   // device of the command's output
	status    string   // device for messages to vm
	devices   []string // QEMU arguments for the character devices console, output and status
}

// platforms returns the supported platforms by GOARCH.
func platforms() map[string]platform {
	return map[string]platform{
		"amd64": {
			debian: "amd64", kernels: map[string]string{"6.1": "bookworm", "6.12": "trixie"}, kernelPackage: "linux-image-cloud-amd64", suite: "trixie",
			// QEMU 7.2 sometimes corrupts the flags register when it emulates cmpxchg16b: one of
			// six boots of Linux 6.12 ended with a double fault or similar. Without the
			// instruction, Linux uses a lock instead.
			qemu: "qemu-system-x86_64", machine: "pc", cpu: "max,cx16=off", parameter: "random.trust_cpu=on",
			// Serial ports, because Debian's kernels have their driver built in. The driver of
			// virtio consoles is a module, and tests may load modules themselves.
			console: "ttyS0", output: "ttyS1", status: "ttyS2",
			devices: []string{"-serial", "chardev:console", "-serial", "chardev:output", "-serial", "chardev:status"},
		},
		"arm64": {
			debian: "arm64", kernels: map[string]string{"6.12": "trixie"}, kernelPackage: "linux-image-cloud-arm64", suite: "trixie",
			qemu: "qemu-system-aarch64", machine: "virt", cpu: "cortex-a72",
			console: "ttyAMA0", output: "hvc0", status: "hvc1",
			devices: []string{
				"-serial", "chardev:console",
				"-device", "virtio-serial-pci", "-device", "virtconsole,chardev=output", "-device", "virtconsole,chardev=status",
			},
		},
		"ppc64le": {
			debian: "ppc64el", kernels: map[string]string{"6.1": "bookworm"}, kernelPackage: "linux-image-powerpc64le", suite: "bookworm",
			// Without these mitigations, which QEMU does not emulate, it prints no warnings.
			qemu: "qemu-system-ppc64", machine: "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off", cpu: "power9",
			console: "hvc0", output: "hvc1", status: "hvc2",
			devices: []string{"-serial", "chardev:console", "-serial", "chardev:output", "-serial", "chardev:status"},
		},
		"s390x": {
			debian: "s390x", kernels: map[string]string{"6.1": "bookworm"}, kernelPackage: "linux-image-s390x", suite: "bookworm",
			modules: "kernel/drivers/char", loadAtBoot: "virtio_console",
			qemu: "qemu-system-s390x", machine: "s390-ccw-virtio", cpu: "max",
			console: "ttysclp0", output: "hvc0", status: "hvc1",
			devices: []string{
				"-device", "sclpconsole,chardev=console",
				"-device", "virtio-serial-ccw", "-device", "virtconsole,chardev=output", "-device", "virtconsole,chardev=status",
			},
		},
	}
}

// architectures returns the supported values of -arch.
func architectures() []string { return slices.Sorted(maps.Keys(platforms())) }

// versions returns the kernel versions of p, the oldest first.
func (p platform) versions() []string { return slices.Sorted(maps.Keys(p.kernels)) }

// foreignPackages returns the packages with the programs of a virtual machine whose
// architecture differs from this machine's: nft and its libraries.
func foreignPackages() []string {
	return []string{
		"nftables", "libnftables1", "libnftnl11", "libmnl0", "libxtables12", "libjansson4", "libedit2", "libtinfo6", "libbsd0", "libmd0", "libgmp10", "libc6",
	}
}

// foreign reports whether the programs of this machine do not run on the architecture.
func foreign(arch string) bool { return arch != runtime.GOARCH }
