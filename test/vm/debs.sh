#!/usr/bin/env bash
# debs.sh SUITE DIR PACKAGE... unpacks Debian packages of a suite into a new
# folder, which need not be this machine's suite.
#
# Nothing is installed. apt checks the signatures, and works on a private
# configuration: the machine's sources, lists and installed packages stay as they
# are. The Debian mirror is the one that the machine uses. Dependencies are not
# followed, but for a PACKAGE written NAME/, which stands for the packages that
# NAME depends on, as linux-image-cloud-amd64 does on the kernel of the day.
#
# Needs apt, dpkg and debian-archive-keyring; no root.
set -euo pipefail

suite=$1 dir=$2
shift 2
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
	echo "debs.sh: $*" >&2
	exit 1
}
[ -r $keyring ] || fail "no $keyring: install debian-archive-keyring"

# The mirror: the first URI in apt's sources that ends in /debian, in either format.
files=()
for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
	[ ! -r "$f" ] || files+=("$f")
done
uri=
[ ${#files[@]} -eq 0 ] || uri=$(sed -nE \
	-e '/^[[:space:]]*#/d' \
	-e 's|^deb[[:space:]]+(\[[^]]*\][[:space:]]+)?(https?://[^[:space:]]*/debian)/?[[:space:]].*|\2|p' \
	-e 's|^URIs:[[:space:]]*(https?://[^[:space:]]*/debian)/?([[:space:]].*)?$|\1|p' \
	"${files[@]}" | sed -n 1p)
uri=${uri:-http://deb.debian.org/debian}

# Everything is made aside and moved into place at the end, so that an
# interrupted run leaves nothing that looks complete.
mkdir -p "$(dirname "$dir")"
work=$(mktemp -d "$dir.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,archives/partial,debs,root}
: >"$work/status"
echo "deb [signed-by=$keyring] $uri $suite main" >"$work/sources.list"
cat >"$work/apt.conf" <<-END
	Dir::Etc::sourcelist "$work/sources.list";
	Dir::Etc::sourceparts "/dev/null";
	Dir::Etc::preferences "/dev/null";
	Dir::Etc::preferencesparts "/dev/null";
	Dir::State::lists "$work/lists";
	Dir::State::status "$work/status";
	Dir::State::extended_states "$work/extended_states";
	Dir::Cache "$work";
	Dir::Log "$work";
	APT::Sandbox::User "";
	APT::Architecture "amd64";
	APT::Update::Post-Invoke {};
	APT::Update::Post-Invoke-Success {};
	APT::Default-Release "";
	Acquire::Languages "none";
	Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
	Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
	Acquire::Retries "3";
	APT::Update::Error-Mode "any";
END
export APT_CONFIG=$work/apt.conf
apt-get -q=2 update || fail "apt-get update for $suite failed"
packages=()
for p in "$@"; do
	if [ "${p%/}" = "$p" ]; then
		packages+=("$p")
		continue
	fi
	mapfile -t depends < <(apt-cache --no-recommends --no-suggests depends "${p%/}" | sed -nE 's/^ +Depends: //p')
	[ ${#depends[@]} -gt 0 ] || fail "${p%/} of $suite depends on nothing"
	packages+=("${depends[@]}")
done
echo "debs.sh: ${packages[*]} of Debian $suite from $uri" >&2
(cd "$work/debs" && apt-get -q=2 download "${packages[@]}") || fail "apt-get download from $suite failed"
for deb in "$work"/debs/*.deb; do
	dpkg-deb -x "$deb" "$work/root"
done
chmod 0755 "$work/root"
mv -T "$work/root" "$dir"
