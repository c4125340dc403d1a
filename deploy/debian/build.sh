#!/usr/bin/env bash
# Builds a Debian package from a static program:
#
#   build.sh PROGRAM ARCHITECTURE VERSION FILE [PAGES]
#
# ARCHITECTURE is a GOARCH. VERSION is the output of `git describe --always`. PAGES is the
# folder that `make man` has written. Two builds with
# the same input and SOURCE_DATE_EPOCH are equal. Needs dpkg-deb, not root.
set -euo pipefail

program=$1 architecture=$2 version=$3 file=$4 pages=${5:-}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0}
here=$(cd "$(dirname "$0")" && pwd)

if [ "$architecture" = ppc64le ]; then
	architecture=ppc64el
fi

# A Debian version begins with a digit. In it, a tilde sorts before everything else: a
# pre-release precedes the release, and builds without a tag precede all releases.
version=${version#v}
case $version in
[0-9]*.[0-9]*)
	# v1.2.0-rc.1-14-g0123456 is the 14th commit after v1.2.0-rc.1.
	version=$(sed -E 's/-([0-9]+)-(g[0-9a-f]+)/+\1.\2/; s/-dirty$/+dirty/; s/-/~/g' <<<"$version")
	;;
*) version="0~$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).${version//-/.}" ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
root=$work/root
install -D -m 0755 "$program" "$root/usr/bin/fairlead"
install -D -m 0644 "$here/fairlead.service" "$root/lib/systemd/system/fairlead.service"
install -D -m 0644 "$here/config.yaml" "$root/etc/fairlead/config.yaml"
install -D -m 0644 "$here/../../LICENSE" "$root/usr/share/doc/fairlead/copyright"
if [ -n "$pages" ]; then
	for page in "$pages"/man8/*.8; do
		install -D -m 0644 "$page" "$root/usr/share/man/man8/${page##*/}"
		gzip -9n "$root/usr/share/man/man8/${page##*/}"
	done
	install -D -m 0644 "$pages/completion/fairlead" "$root/usr/share/bash-completion/completions/fairlead"
	install -D -m 0644 "$pages/completion/_fairlead" "$root/usr/share/zsh/vendor-completions/_fairlead"
	install -D -m 0644 "$pages/completion/fairlead.fish" "$root/usr/share/fish/vendor_completions.d/fairlead.fish"
fi
mkdir "$root/DEBIAN"
install -m 0755 "$here/postinst" "$here/prerm" "$here/postrm" "$root/DEBIAN/"
echo /etc/fairlead/config.yaml >"$root/DEBIAN/conffiles"
cat >"$root/DEBIAN/control" <<END
Package: fairlead
Version: $version
Architecture: $architecture
Maintainer: The Fairlead authors <noreply@fairlead.example>
Installed-Size: $(du -sk --exclude=DEBIAN --apparent-size "$root" | cut -f1)
Section: net
Priority: optional
Description: Kubernetes Services on a node
 Fairlead programs the kernel with the Services of a Kubernetes cluster, through
 nftables or IPVS. It replaces kube-proxy and reads its configuration.
END
(cd "$root" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
# dpkg-deb only lowers later times to SOURCE_DATE_EPOCH.
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
mkdir -p "$(dirname "$file")"
dpkg-deb --root-owner-group -Zgzip --build "$root" "$file" >/dev/null
