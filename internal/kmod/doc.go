// Package kmod loads kernel modules on hosts without modprobe, for example from a container
// that holds only one binary. [Load] reads the files that depmod(8) wrote into the module
// directory of the running kernel, and passes each module to the kernel after its
// dependencies.
//
// Usually the kernel loads a module when a feature is first used, through the host's modprobe,
// even if a container uses the feature. Callers should try this first, because only modprobe
// applies /etc/modprobe.d and the module parameters on the kernel's command line.
//
// Of modprobe's features, this package supports dependencies, built-in modules, all
// compressions, and soft dependencies to be loaded before a module (softdep pre), including
// aliases. On kernels that have crc32c as a module, libcrc32c and therefore IPVS cannot be
// loaded without its soft dependency. The package ignores soft dependencies to be loaded after
// a module.
//
// # Why not a library
//
// The code is short. Most of it produces errors that name the fix, and libraries do not expose
// the necessary details. github.com/u-root/u-root/pkg/kmodule, which is well maintained, lacks
// soft dependencies and finds built-in modules only if modules.dep exists. It loads all
// modules from memory (init_module(2)), which kernels that load only trusted files reject
// (LoadPin). github.com/pmorjan/kmod lacks soft dependencies too, leaves decompression to its
// callers, and ignores errors of dependencies. Only decompression uses libraries.
package kmod
