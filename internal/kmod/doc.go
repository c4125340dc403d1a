// Package kmod loads kernel modules where there is no modprobe, as in a container
// of one binary: [Load] reads what depmod(8) wrote in the folder of the running
// kernel's modules, and hands the files to the kernel, those first that others need.
//
// Mostly the kernel loads modules by itself when they are asked for, with the host's
// modprobe even if a container asks. That is to be tried first, since only modprobe
// heeds the host's /etc/modprobe.d and the parameters of modules on the kernel's
// command line. This package is for hosts without it.
//
// Of what modprobe does, there are dependencies, built-in modules, all compressions,
// and softdeps that come before a module, with the aliases that they are written in:
// libcrc32c, and so IPVS, fails without one on kernels that have crc32c as a module.
// Softdeps that come after are left out.
//
// # Why there is no library here
//
// It takes few lines, most of them for errors that say what to do, and those need
// what libraries keep to themselves. github.com/u-root/u-root/pkg/kmodule, which is
// well kept, has no softdeps, looks for built-in modules only where there is
// modules.dep, and hands over all modules from memory (init_module(2)), which kernels
// that trust files refuse (LoadPin). github.com/pmorjan/kmod has no softdeps either,
// leaves compression to its callers, and ignores that what a module needs has not been
// loaded. Compression is for libraries.
package kmod
