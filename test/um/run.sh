#!/usr/bin/env bash
# Runs a command as root with the kernel that build.sh builds: User-Mode Linux, with IPVS, dummy
# devices, flowtables and SCTP on machines whose kernel does not have them.
#
#   run.sh [-m MEMORY] [-g VERSION] [-k DIR]... PROGRAM [ARGUMENT]...
#
#   -m MEMORY    memory of the kernel, such as 6G; the default is 3G
#   -g VERSION   version of control groups to mount, 1 or 2; the default mounts none
#   -k DIR       keep the changes to files below DIR
#
# It is designed for the go command as well:
#
#   CGO_ENABLED=0 go test -tags=ipvs -exec "$PWD/test/um/run.sh" ./ipvs -run TestX
#
# The command sees this machine's files, and its changes to them are lost at the end. It runs in
# the working directory with this environment, without a network except the networks that it
# makes. Its output appears here, and its exit status is the one of this script; 125 reports that
# the kernel ended otherwise. When this script ends, the kernel ends.
#
# One processor runs at the speed of this machine's, but a system call takes some microseconds
# and a new process about 20 ms. Compare times only within one run. test/vm has Debian's kernels
# in an emulated machine instead.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=$(cd "${CACHE:-$here/../../.cache}/um" 2>/dev/null && pwd) || {
	echo "um: the kernel is missing: run make um" >&2
	exit 125
}
memory=3G groups=0 keep=()
while getopts m:g:k: option; do
	case $option in
	m) memory=$OPTARG ;;
	g) groups=$OPTARG ;;
	k) keep+=("$(realpath "$OPTARG")") ;;
	*) exit 125 ;;
	esac
done
shift $((OPTIND - 1))
if [ $# -eq 0 ] || [ "$(id -u)" -ne 0 ]; then
	echo "um: usage, as root: run.sh [-m MEMORY] [-g VERSION] [-k DIR]... PROGRAM [ARGUMENT]..." >&2
	exit 125
fi

dir=$(mktemp -d "$cache/run.XXXXXX")
trap 'rm -rf "$dir"' EXIT
{
	printf 'cd %q || exit\n' "$PWD"
	export -p
	printf 'exec'
	printf ' %q' "$@"
	echo
} >"$dir/command"
printf '%s\n' "${keep[@]}" >"$dir/keep"
: >"$dir/output"

# The kernel's memory is a file in TMPDIR. fairlead.vm marks the machine for programs that do
# things such as setting the clock only in one of their own.
TMPDIR=/dev/shm setpriv --pdeathsig KILL -- "$cache/linux" seccomp=on rootfstype=hostfs rw mem="$memory" panic=-1 fairlead.vm=1 \
	init="$here/init.sh" um_dir="$dir" um_modules="$cache/root/lib/modules" um_groups="$groups" \
	con=null con0=null,fd:1 </dev/null >"$dir/console" 2>&1 &
kernel=$!
tail -q -f -n +1 --pid=$kernel "$dir/output"
wait $kernel || true
if [ ! -s "$dir/status" ]; then
	echo "um: the kernel ended without an exit status of the command; the end of its log:" >&2
	tail -n 40 "$dir/console" "$dir/errors" >&2
	exit 125
fi
exit "$(cat "$dir/status")"
