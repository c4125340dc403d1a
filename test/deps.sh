#!/usr/bin/env bash
# Installs the Debian packages that the tests and the demo need and that are
# missing: the demo's Redis, a C compiler for the race detector, the names of
# protocols that nft reads and writes, QEMU for test/vm and what it makes its
# virtual machines of, what kube-proxy runs, a browser that looks at the report of
# benchmarks, and what test/debian/fetch.sh and people who look around use. Needs
# root only when something is missing. No service is started, now or at the next
# boot.
set -euo pipefail

packages=(nftables redis-server iproute2 gcc libc6-dev netbase ca-certificates debian-archive-keyring
	qemu-system-x86 kmod ipvsadm iptables ipset chromium-headless-shell fonts-liberation)

if ! command -v dpkg-query >/dev/null; then
	echo "deps: not a Debian system; please install what these packages hold: ${packages[*]}" >&2
	exit 1
fi
missing=()
for p in "${packages[@]}"; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ]; then
	echo "deps: not root; as root: apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "deps: installing ${missing[*]}" >&2

# While policy-rc.d says 101, package scripts start no service.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 0755 $policy
fi

install() {
	DEBIAN_FRONTEND=noninteractive apt-get install -q=2 -y --no-install-recommends "${missing[@]}" </dev/null
}
# The package lists may be absent, or so old that the mirror has newer files.
install || {
	apt-get update -q=2
	install
}
if [[ " ${missing[*]} " == *" redis-server "* ]] && [ -d /run/systemd/system ]; then
	systemctl --quiet disable --now redis-server
fi
