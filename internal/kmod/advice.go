package kmod

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// advice returns the meaning of a kernel error and the fix, to be appended to the error text.
// names are the modules that remain to be loaded. It returns "" for other errors.
func (l *loader) advice(err error, names []string) string {
	if _, ok := errors.AsType[*os.SyscallError](err); !ok {
		return ""
	}
	onHost := "load them on the host: modprobe -a " + strings.Join(names, " ")
	switch {
	case errors.Is(err, unix.EPERM) && l.modulesDisabled():
		return ": the host does not load modules until the next boot (sysctl kernel.modules_disabled); " +
			"list them in /etc/modules-load.d and reboot: " + strings.Join(names, " ")
	case errors.Is(err, unix.EPERM) && !l.syscalls.hasSysModule():
		return ": CAP_SYS_MODULE is required; alternatively, " + onHost
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return ": the process has CAP_SYS_MODULE, but lockdown, a security module, seccomp or a user namespace denies it; " + onHost
	case errors.Is(err, unix.EKEYREJECTED), errors.Is(err, unix.ENOKEY), errors.Is(err, unix.EKEYEXPIRED), errors.Is(err, unix.EBADMSG):
		return ": the kernel accepts only modules signed with a trusted key; " +
			"install the modules from the kernel's package"
	case errors.Is(err, unix.ENOEXEC), errors.Is(err, unix.ENOENT):
		return ": the module does not match the kernel, see the kernel log (dmesg); " +
			"install the modules from the kernel's package"
	default:
		return ": see the kernel log (dmesg)"
	}
}

func (l *loader) modulesDisabled() bool {
	value, err := os.ReadFile(filepath.Join(l.root, "proc/sys/kernel/modules_disabled"))
	return err == nil && strings.TrimSpace(string(value)) == "1"
}
