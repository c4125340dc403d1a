#!/usr/bin/busybox sh
# The first process of the virtual machine. It makes the machine look like a freshly booted
# host, runs /vm/run, reports the exit status and powers off.
#
#	the kernel console, for messages of this script
#	$OUTPUT: terminal, or output and errors of /vm/run
#	$STATUS: for the program vm: "started", then "exit STATUS"
#
# /vm/settings sets the variables.
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
# Keep /tmp in the initial file system, which is also in memory: the checkout may be below
# /tmp.
chmod 1777 /tmp /dev/shm
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
hostname fairlead-vm
busybox ip link set lo up
ulimit -n 524288

# From here on, print only warnings and errors on the console, instead of every interface that
# comes up. dmesg still has everything.
dmesg -n 5

. /vm/settings
if [ -n "$DRIVERS" ]; then
	modprobe -a $DRIVERS
	# Devices appear some time later.
	until [ -c "$OUTPUT" ] && [ -c "$STATUS" ]; do usleep 10000; done
fi
[ "$MODPROBE" = yes ] || rm -f /usr/sbin/modprobe
output=$OUTPUT status=$STATUS
unset MODPROBE DRIVERS OUTPUT STATUS
echo started >"$status"
# Do not use busybox's shell: it prefers its own ip and modprobe to the programs in PATH.
if [ "$TERMINAL" = yes ]; then
	unset TERMINAL
	stty -F "$output" sane
	setsid -c /usr/bin/sh /vm/run <>"$output" >&0 2>&1
else
	unset TERMINAL
	stty -F "$output" raw -echo
	/usr/bin/sh /vm/run </dev/null >"$output" 2>&1
fi
echo "exit $?" >"$status"
poweroff -f
