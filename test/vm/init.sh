#!/usr/bin/busybox sh
# The first process of the virtual machine: makes it look like a freshly booted
# host, runs /vm/run, tells the exit status and switches the machine off.
#
#	ttyS0    the kernel's console, and what this script itself has to say
#	ttyS1    the terminal, or the output and errors of /vm/run
#	ttyS2    for the harness: "started", then "exit STATUS"
export PATH=/usr/bin:/usr/sbin
/usr/bin/busybox --install -s
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o nosuid devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# /tmp stays part of the first file system, which is in memory too: the checkout
# may be below it.
chmod 1777 /tmp /dev/shm
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
hostname fairlead-vm
busybox ip link set lo up
ulimit -n 524288

# From here on the console has warnings and worse, not every interface that comes
# up; dmesg has all.
dmesg -n 5

. /vm/settings
[ "$MODPROBE" = yes ] || rm -f /usr/sbin/modprobe
unset MODPROBE
echo started >/dev/ttyS2
# Not with busybox's shell: it prefers its own ip and modprobe to those in PATH.
if [ "$TERMINAL" = yes ]; then
	unset TERMINAL
	stty -F /dev/ttyS1 sane
	setsid -c /usr/bin/sh /vm/run <>/dev/ttyS1 >&0 2>&1
else
	unset TERMINAL
	stty -F /dev/ttyS1 raw -echo
	/usr/bin/sh /vm/run </dev/null >/dev/ttyS1 2>&1
fi
echo "exit $?" >/dev/ttyS2
poweroff -f
