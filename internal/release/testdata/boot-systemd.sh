#!/bin/bash
# Boots systemd as the first process of its own namespaces, in the network namespace of the
# caller:
#
#   boot-systemd.sh CGROUP ROOT
#
# CGROUP is a directory of the cgroup v2 hierarchy; it becomes the root of systemd's hierarchy.
# ROOT is a directory with a Debian system. systemd may change settings below /proc/sys/net,
# which belong to the network namespace, and no other settings of the kernel.
set -euo pipefail

if [ "${3-}" != inside ]; then
	echo $$ >"$1/cgroup.procs"
	exec unshare --mount --pid --fork --kill-child --cgroup --ipc --uts bash "$0" "$1" "$2" inside
fi
cd "$2"
mount --make-rprivate /
mount --bind . .
cd "$2"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for dir in dev run tmp; do mount -t tmpfs tmpfs $dir; done
for node in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 "dev/${node%:*}" c 1 "${node#*:}"; done
mknod -m 666 dev/tty c 5 0
mkdir dev/shm dev/pts dev/mqueue dev/hugepages
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
pivot_root . mnt
umount -l /mnt
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=basic.target --show-status=no </dev/null
