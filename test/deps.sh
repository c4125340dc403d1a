#!/usr/bin/env bash
# Installs missing Debian packages that the tests and the demo need: Redis for the demo, a C
# compiler for the race detector, protocol names for nft, QEMU and other parts of the virtual
# machines in test/vm, runc to run the image, systemd to check the unit, programs that
# kube-proxy runs, a browser to test pages, and packages for test/debian/fetch.sh and for
# debugging. The arguments are additional packages. Needs root only if a package is missing. No
# service starts, now or at the next boot.
set -euo pipefail

packages=(nftables redis-server iproute2 gcc libc6-dev netbase ca-certificates debian-archive-keyring
	qemu-system-x86 runc systemd kmod ipvsadm iptables ipset chromium-headless-shell fonts-liberation "$@")

if ! command -v dpkg-query >/dev/null; then
	echo "deps: not a Debian system: install the equivalents of these packages: ${packages[*]}" >&2
	exit 1
fi
missing=()
for p in "${packages[@]}"; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ]; then
	echo "deps: packages are missing: run as root: apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "deps: installing ${missing[*]}" >&2

# Package scripts start no service while policy-rc.d exits with 101.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 0755 $policy
fi

install() {
	DEBIAN_FRONTEND=noninteractive apt-get install -q=2 -y --no-install-recommends "${missing[@]}" </dev/null
}
# The package lists may be missing or outdated.
install || {
	apt-get update -q=2
	install
}
if [[ " ${missing[*]} " == *" redis-server "* ]] && [ -d /run/systemd/system ]; then
	systemctl --quiet disable --now redis-server
fi
