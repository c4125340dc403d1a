#!/usr/bin/env bash
# Builds the kube-proxy that `fairlead-bench compare` measures against:
#
#   .cache/kube-proxy/kube-proxy
#
# from source, at the version that bench/kubeproxy/go.mod pins, as releases are
# built: static and without symbols. Cold that takes some minutes on two cores,
# which is why it is done once: it does nothing while the version, this file and
# the Go toolchain stay as they are. Needs Go only; no root. To run, kube-proxy needs nft
# in its nftables mode, else iptables and ipset.
set -euo pipefail

top=$(cd "$(dirname "$0")/../.." && pwd)
cache=$top/.cache/kube-proxy
module=$top/bench/kubeproxy

want=$(
	cd "$top"
	go version
	sha256sum bench/kubeproxy/go.mod bench/kubeproxy/go.sum bench/kubeproxy/build.sh
)
up_to_date() { [ "$(cat "$cache/built" 2>/dev/null)" = "$want" ] && [ -x "$cache/kube-proxy" ]; }

mkdir -p "$cache"
# Two makes at once, say of two targets, must not build twice.
exec 9>"$cache/lock"
flock 9
up_to_date && exit 0

cd "$module"
version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
echo "building kube-proxy $version; the first time that takes some minutes" >&2

# Without these it calls itself v0.0.0-master.
IFS=. read -r major minor _ <<<"${version#v}"
pkg=k8s.io/component-base/version
ldflags="-s -w -X $pkg.gitVersion=$version -X $pkg.gitMajor=$major -X $pkg.gitMinor=$minor -X $pkg.gitTreeState=clean"

# Built aside, so that an interrupted build leaves nothing that looks complete.
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
CGO_ENABLED=0 go build -trimpath -ldflags "$ldflags" -o "$work/" k8s.io/kubernetes/cmd/kube-proxy
mv -f "$work/kube-proxy" "$cache/kube-proxy"
echo "$want" >"$cache/built"
