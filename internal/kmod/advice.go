package kmod

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// advice says, behind an error of the kernel's, what it means and what to do, so that
// the modules with these names are loaded. Other errors speak for themselves.
func (l *loader) advice(err error, names []string) string {
	if _, ok := errors.AsType[*os.SyscallError](err); !ok {
		return ""
	}
	onHost := "load them on the host: modprobe -a " + strings.Join(names, " ")
	switch {
	case errors.Is(err, unix.EPERM) && l.modulesDisabled():
		return ": the host has forbidden to load modules until it is booted again (sysctl kernel.modules_disabled); " +
			"have it load them before, in /etc/modules-load.d: " + strings.Join(names, " ")
	case errors.Is(err, unix.EPERM) && !l.syscalls.hasSysModule():
		return ": this needs CAP_SYS_MODULE; or " + onHost
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return ": there is CAP_SYS_MODULE, but lockdown, a security module, seccomp or a user namespace forbids it; " + onHost
	case errors.Is(err, unix.EKEYREJECTED), errors.Is(err, unix.ENOKEY), errors.Is(err, unix.EKEYEXPIRED), errors.Is(err, unix.EBADMSG):
		return ": the kernel takes modules only with the signature of a key that it has; " +
			"install the modules of the package that this kernel is from"
	case errors.Is(err, unix.ENOEXEC), errors.Is(err, unix.ENOENT):
		return ": the module does not fit the kernel, whose log says why (dmesg); " +
			"install the modules of the package that this kernel is from"
	default:
		return ": the kernel's log may say why (dmesg)"
	}
}

func (l *loader) modulesDisabled() bool {
	value, err := os.ReadFile(filepath.Join(l.root, "proc/sys/kernel/modules_disabled"))
	return err == nil && strings.TrimSpace(string(value)) == "1"
}
