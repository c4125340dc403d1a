#!/bin/bash
# The first process of the kernel that run.sh starts. Its root is this machine's; the command gets
# an overlay of it, whose changes are in memory. run.sh reads the files output, status and errors.
exec >/dev/null 2>"$um_dir/errors"
set -e

finish() {
	sync
	# Without a second exec, the kernel would panic when the first process ends.
	exec /bin/busybox poweroff -f
}
trap finish EXIT

mount -t tmpfs -o size=90% tmpfs /mnt
mkdir /mnt/changes /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/changes,workdir=/mnt/work /mnt/root
root=/mnt/root
mount -t proc proc $root/proc
mount -t sysfs sysfs $root/sys
mount -t devtmpfs dev $root/dev
mkdir -p $root/dev/shm $root/dev/pts
mount -t tmpfs tmpfs $root/dev/shm
mount -t devpts devpts $root/dev/pts
mount -t tmpfs tmpfs $root/run
mkdir -p $root/run/netns $root/run/lock $root/lib/modules
mount --bind "$um_modules" $root/lib/modules
mount --bind "$um_dir" $root/mnt
while read -r path; do
	[ -z "$path" ] || mount --bind "$path" "$root$path"
done <"$um_dir/keep"
case $um_groups in
1)
	mount -t tmpfs tmpfs $root/sys/fs/cgroup
	for controller in cpuset cpu,cpuacct memory devices freezer pids; do
		mkdir $root/sys/fs/cgroup/$controller
		mount -t cgroup -o $controller cgroup $root/sys/fs/cgroup/$controller
	done
	;;
2) mount -t cgroup2 cgroup2 $root/sys/fs/cgroup ;;
esac
ip link set lo up
echo um >/proc/sys/kernel/hostname
# The machine has its own limit of inotify instances, which containers need.
echo 1024 >$root/proc/sys/fs/inotify/max_user_instances
# The overlay becomes the root of the mount namespace, because nsenter(1) leaves a chroot.
mkdir $root/run/host
cd $root
pivot_root . run/host
umount -l /run/host
exec 2>/dev/null
/bin/bash -c '/bin/bash /mnt/command >/mnt/output 2>&1 </dev/null; echo $? >/mnt/status'
