#!/bin/sh
# Runs as the first process of new PID, mount, network, UTS and IPC namespaces, with the file
# systems of the parent:
#
#   namespaces.sh enter lab|node PAUSE PROGRAM [ARGUMENT...]
#
# It joins the control groups that CGROUPS lists (see Lines in package cgroup), makes the mounts
# of the control plane's host or of a node, and executes PAUSE with PROGRAM. A node's files are
# below NODE_DIR, which must be on a file system that overlayfs can write to.
set -eu

enter() {
	while read -r _ _ _ group; do
		echo 0 >"$group/cgroup.procs"
	done <<-END_OF_GROUPS
		$CGROUPS
	END_OF_GROUPS
	exec unshare --cgroup -- /bin/sh "$0" mounts "$@"
}

# Only the control groups of this cgroup namespace stay visible, at the same mount points. In
# version 2, a group whose children have controllers must not contain processes.
mount_cgroups() {
	while read -r version options point _; do
		umount "$point"
		if [ "$version" = 1 ]; then
			case $options in
			name=*) options=none,$options ;;
			esac
			mount -t cgroup -o "$options" cgroup "$point"
			continue
		fi
		mount -t cgroup2 cgroup2 "$point"
		mkdir -p "$point/init"
		echo 0 >"$point/init/cgroup.procs"
		for controller in $(cat "$point/cgroup.controllers"); do
			echo "+$controller" >"$point/cgroup.subtree_control" || true
		done
	done <<-END_OF_GROUPS
		$CGROUPS
	END_OF_GROUPS
}

# A node has its own copies of these directories. Files of containers are on the disk and not
# in an overlay, because overlayfs cannot use an overlay to store changes.
mount_node() {
	for d in var etc opt; do
		mkdir -p "$NODE_DIR/$d" "$NODE_DIR/$d.work"
		mount -t overlay "$d" -o "lowerdir=/$d,upperdir=$NODE_DIR/$d,workdir=$NODE_DIR/$d.work" "/$d"
	done
	mount -t tmpfs tmpfs /run
	mkdir -p /run/lock
	for d in containerd kubelet; do
		mkdir -p "$NODE_DIR/$d" "/var/lib/$d"
		mount --bind "$NODE_DIR/$d" "/var/lib/$d"
	done
	# kubelet writes these settings, which are not of a namespace. It writes to a file instead.
	mkdir -p "$NODE_DIR/sysctl"
	for f in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
		[ -e "/proc/sys/$f" ] || continue
		copy=$NODE_DIR/sysctl/$(echo "$f" | tr / .)
		cat "/proc/sys/$f" >"$copy"
		mount --bind "$copy" "/proc/sys/$f"
	done
	# kubelet does not start without the frequency of a processor, which User-Mode Linux does not have.
	if grep -q 'User Mode Linux' /proc/cpuinfo; then
		{ cat /proc/cpuinfo && echo 'cpu MHz : 1000.000'; } >"$NODE_DIR/cpuinfo"
		mount --bind "$NODE_DIR/cpuinfo" /proc/cpuinfo
	fi
	# kubelet and its containers share mounts.
	mount --make-rshared /
}

mounts() {
	mount --make-rprivate /
	mount -t proc proc /proc
	mount_cgroups
	kind=$1
	shift
	if [ "$kind" = node ]; then mount_node; fi
	exec "$@"
}

command=$1
shift
"$command" "$@"
