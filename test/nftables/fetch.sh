#!/usr/bin/env bash
# Makes two releases of the nft tool available side by side:
#
#   .cache/nftables/1.0.6/nft    Debian 12, bookworm
#   .cache/nftables/1.1.3/nft    Debian 13, trixie
#
# Tests list what Fairlead programs with both, because listing is what operators
# do, and old versions stumble over rules that the kernel accepts.
#
# Each is Debian's own binary, run with Debian's own libraries and loader, so
# neither depends on the machine's C library. apt checks the signatures, and
# works on a private configuration: the machine's sources, lists and installed
# packages stay as they are. The Debian mirror is the one that the machine uses.
#
# Run it from anywhere. It does nothing for a version that is there already.
# Needs apt, dpkg and debian-archive-keyring; no root.
set -euo pipefail

top=$(cd "$(dirname "$0")/../.." && pwd)
cache=$top/.cache/nftables
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
packages=(nftables libnftables1 libnftnl11 libmnl0 libxtables12 libjansson4
	libedit2 libtinfo6 libbsd0 libmd0 libgmp10 libc6)

fail() {
	echo "fetch.sh: $*" >&2
	exit 1
}

# mirror prints the URI that this machine gets the Debian archive from: the
# first one in apt's sources that ends in /debian, in either format.
mirror() {
	local files=()
	for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
		[ -r "$f" ] && files+=("$f")
	done
	[ ${#files[@]} -eq 0 ] || sed -nE \
		-e '/^[[:space:]]*#/d' \
		-e 's|^deb[[:space:]]+(\[[^]]*\][[:space:]]+)?(https?://[^[:space:]]*/debian)/?[[:space:]].*|\2|p' \
		-e 's|^URIs:[[:space:]]*(https?://[^[:space:]]*/debian)/?([[:space:]].*)?$|\1|p' \
		"${files[@]}" | head -n 1
}

# runs VERSION: is it there, and does it answer with that version?
runs() {
	[ -x "$cache/$1/nft" ] && "$cache/$1/nft" --version 2>/dev/null | grep -qF "nftables v$1 "
}

# fetch VERSION SUITE: download, unpack, and write the wrapper.
fetch() {
	local version=$1 suite=$2
	if runs "$version"; then
		return
	fi
	[ -r $keyring ] || fail "no $keyring: install debian-archive-keyring"
	echo "fetch.sh: nft $version from Debian $suite at $uri" >&2

	# Everything is made aside and moved into place at the end, so that an
	# interrupted run leaves nothing that looks complete.
	mkdir -p "$cache"
	work=$(mktemp -d "$cache/$version.XXXXXX")
	mkdir -p "$work"/apt/{lists/partial,archives/partial,etc} "$work/debs" "$work/root"
	: >"$work/apt/status"
	cat >"$work/apt/sources.list" <<-END
		deb [signed-by=$keyring] $uri $suite main
	END
	# Only what differs from apt's built-in defaults: the machine's own
	# configuration is read first, for its proxies.
	cat >"$work/apt/apt.conf" <<-END
		Dir::Etc::sourcelist "$work/apt/sources.list";
		Dir::Etc::sourceparts "/dev/null";
		Dir::Etc::preferences "/dev/null";
		Dir::Etc::preferencesparts "/dev/null";
		Dir::State::lists "$work/apt/lists";
		Dir::State::status "$work/apt/status";
		Dir::State::extended_states "$work/apt/extended_states";
		Dir::Cache "$work/apt";
		Dir::Log "$work/apt";
		APT::Sandbox::User "";
		APT::Update::Post-Invoke {};
		APT::Update::Post-Invoke-Success {};
		APT::Default-Release "";
		Acquire::Languages "none";
		Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
		Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
		Acquire::Retries "3";
		APT::Update::Error-Mode "any";
	END
	export APT_CONFIG=$work/apt/apt.conf
	apt-get -q=2 update || fail "apt-get update for $suite failed"
	(cd "$work/debs" && apt-get -q=2 download "${packages[@]}") ||
		fail "apt-get download from $suite failed"
	unset APT_CONFIG
	local deb
	for deb in "$work"/debs/*.deb; do
		dpkg -x "$deb" "$work/root"
	done

	# The loader's path inside the packages: lib or usr/lib, lib64 or a
	# directory named for the architecture. Where it is a link, its target is
	# used, for the link may be absolute.
	local loader nft libs
	loader=$(cd "$work/root" && find . -type f -name 'ld-linux*.so.*' | head -n 1)
	nft=$(cd "$work/root" && find . -type f -path '*/sbin/nft' | head -n 1)
	libs=$(cd "$work/root" && find . -name '*.so.[0-9]*' -printf '%h\n' | sort -u | sed 's|^\./||' | paste -sd ' ')
	[ -n "$loader" ] && [ -n "$nft" ] && [ -n "$libs" ] ||
		fail "the packages of $suite lack a loader, nft or libraries"
	cat >"$work/nft" <<-END
		#!/bin/sh
		# nft $version of Debian $suite with its own libraries; made by test/nftables/fetch.sh.
		here=\$(cd "\$(dirname "\$0")" && pwd)/root
		path=
		for d in $libs; do path=\$path:\$here/\$d; done
		exec "\$here/${loader#./}" --library-path "\${path#:}" "\$here/${nft#./}" "\$@"
	END
	chmod 0755 "$work" "$work/nft"
	rm -rf "$work/apt" "$work/debs"
	rm -rf "${cache:?}/$version"
	mv "$work" "$cache/$version"
	work=
	runs "$version" || fail "want nftables v$version from $suite, $cache/$version/nft says: $("$cache/$version/nft" --version 2>&1)"
}

work=
trap '[ -z "$work" ] || rm -rf "$work"' EXIT
uri=$(mirror)
uri=${uri:-http://deb.debian.org/debian}
fetch 1.0.6 bookworm
fetch 1.1.3 trixie
