#!/usr/bin/env bash
# Unpacks packages of Debian releases, which need not be this machine's, into
# folders:
#
#   fetch.sh unpack ARCHITECTURE SUITE DIR PACKAGE...
#   fetch.sh nftables
#
# unpack creates DIR. It does not follow dependencies. A PACKAGE written NAME/
# stands for the packages that NAME depends on, as linux-image-cloud-amd64 depends
# on the current kernel.
#
# nftables makes two releases of the nft tool available side by side:
#
#   .cache/nftables/1.0.6/nft    Debian 12, bookworm
#   .cache/nftables/1.1.3/nft    Debian 13, trixie
#
# Tests list what Fairlead programs with both, because operators do, and old
# versions stumble over rules that the kernel accepts. Each is Debian's own binary,
# run with Debian's own libraries and loader, so neither depends on the machine's C
# library. A release that is there already is not fetched again. CACHE names another
# folder than .cache.
#
# The packages come from the archives in this machine's apt sources: the first one
# that has the release, signed with Debian's keys. apt works on a private
# configuration, so the machine's sources, lists and installed packages stay as
# they are.
#
# Needs apt, dpkg and debian-archive-keyring; no root.
set -euo pipefail

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
temporary=() # folders to remove at the end
trap 'rm -rf "${temporary[@]}"' EXIT

fail() {
	echo "fetch.sh: $*" >&2
	exit 1
}

# archives prints the base URI of each archive in apt's sources, in their order.
archives() {
	apt-get --print-uris update | sed -nE "s|^'(.*)/dists/[^']*/InRelease' .*|\1|p" | awk '!seen[$0]++'
}

# configure URI SUITE ARCHITECTURE points apt at one release of one archive. The
# machine's configuration is read first, for its proxies and credentials.
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

# download PACKAGE... downloads from the configured release into $work/debs.
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
			echo "no package ${p%/} that depends on another" >&2
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
	# An interrupted run leaves nothing that looks complete.
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
	fail "no archive in apt's sources (apt-get --print-uris update) has $* of Debian $suite: add one to /etc/apt/sources.list.d"
}

# answers FOLDER VERSION reports whether the nft in the folder is of that version.
answers() {
	[ -x "$1/nft" ] && "$1/nft" --version 2>/dev/null | grep -qF "nftables v$2 "
}

# nft VERSION SUITE unpacks nft and its libraries and writes a script that runs it.
nft() {
	local version=$1 suite=$2 dir new loader nft libs
	dir=${CACHE:-$(cd "$(dirname "$0")/../.." && pwd)/.cache}/nftables/$version
	! answers "$dir" "$version" || return 0
	mkdir -p "$(dirname "$dir")"
	new=$(mktemp -d "$dir.XXXXXX")
	temporary+=("$new")
	unpack "$(dpkg --print-architecture)" "$suite" "$new/root" nftables libnftables1 libnftnl11 \
		libmnl0 libxtables12 libjansson4 libedit2 libtinfo6 libbsd0 libmd0 libgmp10 libc6

	# The loader's path inside the packages: lib or usr/lib, lib64 or a
	# directory named for the architecture. Where it is a link, its target is
	# used, for the link may be absolute.
	loader=$(cd "$new/root" && find . -type f -name 'ld-linux*.so.*' | sed -n 1p)
	nft=$(cd "$new/root" && find . -type f -path '*/sbin/nft' | sed -n 1p)
	libs=$(cd "$new/root" && find . -name '*.so.[0-9]*' -printf '%h\n' | sort -u | sed 's|^\./||' | paste -sd ' ')
	[ -n "$loader" ] && [ -n "$nft" ] && [ -n "$libs" ] ||
		fail "the packages of $suite lack a loader, nft or libraries"
	cat >"$new/nft" <<-END
		#!/bin/sh
		# nft $version of Debian $suite with its own libraries; made by test/debian/fetch.sh.
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
	[ $# -ge 5 ] || fail "want unpack ARCHITECTURE SUITE DIR PACKAGE..."
	shift
	unpack "$@"
	;;
nftables)
	nft 1.0.6 bookworm
	nft 1.1.3 trixie
	;;
*) fail "want unpack or nftables, have '${1-}'" ;;
esac
