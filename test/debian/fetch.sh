#!/usr/bin/env bash
# Unpacks packages of any Debian release into directories:
#
#   fetch.sh unpack ARCHITECTURE SUITE DIR PACKAGE...
#   fetch.sh nftables
#
# unpack creates DIR. It does not follow dependencies. NAME/ as a PACKAGE selects the packages
# that NAME depends on: linux-image-cloud-amd64, for example, depends on the package of the
# current kernel.
#
# nftables provides two releases of the nft tool:
#
#   .cache/nftables/1.0.6/nft    Debian 12, bookworm
#   .cache/nftables/1.1.3/nft    Debian 13, trixie
#
# Tests list Fairlead's rules with both releases, as operators do, because old versions fail
# on some rules that the kernel accepts. Both are Debian's binaries with Debian's libraries
# and loader, so they do not depend on the C library of this machine. A release is not fetched
# again if it exists. CACHE names a directory to use instead of .cache.
#
# The packages come from the first archive in this machine's apt sources that has the release,
# signed with Debian's keys. apt uses a private configuration; the machine's sources, lists
# and installed packages do not change.
#
# Needs apt, dpkg and debian-archive-keyring, not root.
set -euo pipefail

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
temporary=() # directories to remove on exit
trap 'rm -rf "${temporary[@]}"' EXIT

fail() {
	echo "fetch.sh: $*" >&2
	exit 1
}

# archives prints the base URI of each archive in apt's sources, in order.
archives() {
	apt-get --print-uris update | sed -nE "s|^'(.*)/dists/[^']*/InRelease' .*|\1|p" | awk '!seen[$0]++'
}

# configure URI SUITE ARCHITECTURE configures apt for one release of one archive. apt reads
# the machine's configuration first, for proxies and credentials.
configure() {
	mkdir -p "$work/apt"/{lists/partial,archives/partial}
	: >"$work/apt/status"
	echo "deb [signed-by=$keyring] $1 $2 main" >"$work/apt/sources.list"
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
		APT::Architecture "$3";
		APT::Architectures "$3";
		APT::Update::Post-Invoke {};
		APT::Update::Post-Invoke-Success {};
		APT::Default-Release "";
		Acquire::Languages "none";
		Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
		Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
		Acquire::Retries "3";
		APT::Update::Error-Mode "any";
	END
}

# download PACKAGE... downloads packages of the configured release to $work/debs.
download() (
	export APT_CONFIG=$work/apt/apt.conf
	apt-get -q=2 update || return
	packages=()
	for p in "$@"; do
		if [ "${p%/}" = "$p" ]; then
			packages+=("$p")
			continue
		fi
		mapfile -t depends < <(apt-cache --no-recommends --no-suggests depends "${p%/}" | sed -nE 's/^ +Depends: //p')
		if [ ${#depends[@]} -eq 0 ]; then
			echo "no package ${p%/} with dependencies" >&2
			return 1
		fi
		packages+=("${depends[@]}")
	done
	rm -rf "$work/debs"
	mkdir "$work/debs" && cd "$work/debs" || return
	apt-get -q=2 download "${packages[@]}" || return
	echo "fetch.sh: downloaded ${packages[*]}" >&2
)

# unpack ARCHITECTURE SUITE DIR PACKAGE...
unpack() {
	local architecture=$1 suite=$2 dir=$3 uri deb work sources
	shift 3
	[ -r $keyring ] || fail "no $keyring: install debian-archive-keyring"
	# An interrupted run must not leave an incomplete directory that looks complete.
	mkdir -p "$(dirname "$dir")"
	work=$(mktemp -d "$dir.XXXXXX")
	temporary+=("$work")
	mapfile -t sources < <(archives)
	for uri in "${sources[@]}"; do
		echo "fetch.sh: Debian $suite from $uri" >&2
		rm -rf "$work/apt"
		configure "$uri" "$suite" "$architecture"
		if download "$@" 2>"$work/errors"; then
			cat "$work/errors" >&2
			mkdir "$work/root"
			for deb in "$work"/debs/*.deb; do
				dpkg-deb -x "$deb" "$work/root"
			done
			chmod 0755 "$work/root"
			mv -T "$work/root" "$dir"
			rm -rf "$work"
			return
		fi
		sed 's/^/  /' "$work/errors" >&2
	done
	fail "no archive in apt's sources (apt-get --print-uris update) has $* for Debian $suite: add one to /etc/apt/sources.list.d"
}

# answers DIR VERSION reports whether the directory has nft in that version.
answers() {
	[ -x "$1/nft" ] && "$1/nft" --version 2>/dev/null | grep -qF "nftables v$2 "
}

# nft VERSION SUITE unpacks nft and its libraries, and writes a wrapper script.
nft() {
	local version=$1 suite=$2 dir new loader nft libs
	dir=${CACHE:-$(cd "$(dirname "$0")/../.." && pwd)/.cache}/nftables/$version
	! answers "$dir" "$version" || return 0
	mkdir -p "$(dirname "$dir")"
	new=$(mktemp -d "$dir.XXXXXX")
	temporary+=("$new")
	unpack "$(dpkg --print-architecture)" "$suite" "$new/root" nftables libnftables1 libnftnl11 \
		libmnl0 libxtables12 libjansson4 libedit2 libtinfo6 libbsd0 libmd0 libgmp10 libc6

	# Find the loader: it is in lib or usr/lib, in lib64 or in a directory named after the
	# architecture. Skip symbolic links, because they may be absolute.
	loader=$(cd "$new/root" && find . -type f -name 'ld-linux*.so.*' | sed -n 1p)
	nft=$(cd "$new/root" && find . -type f -path '*/sbin/nft' | sed -n 1p)
	libs=$(cd "$new/root" && find . -name '*.so.[0-9]*' -printf '%h\n' | sort -u | sed 's|^\./||' | paste -sd ' ')
	[ -n "$loader" ] && [ -n "$nft" ] && [ -n "$libs" ] ||
		fail "the packages of $suite have no loader, nft or libraries"
	cat >"$new/nft" <<-END
		#!/bin/sh
		# nft $version of Debian $suite with its own libraries, created by test/debian/fetch.sh.
		here=\$(cd "\$(dirname "\$0")" && pwd)/root
		path=
		for d in $libs; do path=\$path:\$here/\$d; done
		exec "\$here/${loader#./}" --library-path "\${path#:}" "\$here/${nft#./}" "\$@"
	END
	chmod 0755 "$new" "$new/nft"
	answers "$new" "$version" ||
		fail "want nftables v$version from $suite, $new/nft says: $("$new/nft" --version 2>&1)"
	rm -rf "$dir"
	mv -T "$new" "$dir"
}

case ${1-} in
unpack)
	[ $# -ge 5 ] || fail "usage: fetch.sh unpack ARCHITECTURE SUITE DIR PACKAGE..."
	shift
	unpack "$@"
	;;
nftables)
	nft 1.0.6 bookworm
	nft 1.1.3 trixie
	;;
*) fail "unknown command '${1-}', want unpack or nftables" ;;
esac
