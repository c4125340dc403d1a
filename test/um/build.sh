#!/usr/bin/env bash
# Builds a kernel for User-Mode Linux from Debian's newest kernel source, in .cache/um:
#
#   linux        the kernel, a program
#   root/lib     its modules
#
# User-Mode Linux is a kernel that runs as a process (Documentation/virt/uml). Debian's own
# package user-mode-linux lacks NAT for nftables, flowtables and processor sets. The source comes from
# trixie-backports, because older kernels fail on processors with large registers (AVX-512, AMX),
# and because kubelet needs processor sets, which User-Mode Linux has since Linux 6.19.
#
# The build takes about ten minutes on two cores. It is repeated if test/um/config or this script
# changes. Needs a C compiler, make, flex, bison and bc, not root.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${CACHE:-$here/../../.cache}/um
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

want=$(cat "$here/config" "$here/build.sh" | sha256sum)
if [ -x "$cache/linux" ] && [ "$(cat "$cache/built" 2>/dev/null)" = "$want" ]; then
	exit 0
fi
rm -rf "$cache/built" "$cache/build" "$cache/root"
trap 'rm -rf "$cache/build"' EXIT
"$here/../debian/fetch.sh" unpack "$(dpkg --print-architecture)" trixie-backports "$cache/build" linux-source/
echo "um: compiling $(basename "$cache"/build/usr/src/linux-source-*.tar.xz .tar.xz)" >&2
mkdir "$cache/build/source"
tar -xJf "$cache"/build/usr/src/linux-source-*.tar.xz -C "$cache/build/source" --strip-components=1
cd "$cache/build/source"
cp "$here/config" .config
kernel() { make -s -j"$(nproc)" ARCH=um INSTALL_MOD_PATH="$cache/root" "$@" >"$cache/build.log" 2>&1; }
if ! kernel olddefconfig; then
	cat "$cache/build.log" >&2
	exit 1
fi
# An option that depends on another one is dropped without an error.
missing=$(grep -E '^CONFIG_.*=' "$here/config" | grep -vxFf .config || true)
if [ -n "$missing" ]; then
	echo "um: the kernel's configuration does not have these options of test/um/config: $missing" >&2
	exit 1
fi
if ! kernel linux modules || ! kernel modules_install; then
	tail -n 40 "$cache/build.log" >&2
	exit 1
fi
strip -o "$cache/linux" linux
rm -f "$cache"/root/lib/modules/*/build
echo "$want" >"$cache/built"
