#!/usr/bin/env bash
# Builds the kube-proxy that `fairlead-bench compare` measures against:
#
#   .cache/kube-proxy/kube-proxy
#
# from source, at the version that bench/kubeproxy/go.mod pins. Like a release, the binary
# is static and has no symbols. A build without a cache takes some minutes on two cores.
# The script does nothing if the version, the script itself and the Go toolchain are those
# of the last build. It needs Go, and no root. To run, kube-proxy needs nft in its nftables
# mode, and iptables and ipset in its other modes.
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
# Concurrent runs, for example of two make targets, must not build twice.
exec 9>"$cache/lock"
flock 9
up_to_date && exit 0

cd "$module"
version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
echo "building kube-proxy $version; the first build takes some minutes" >&2

# Without these variables kube-proxy prints the version v0.0.0-master.
IFS=. read -r major minor _ <<<"${version#v}"
pkg=k8s.io/component-base/version
ldflags="-s -w -X $pkg.gitVersion=$version -X $pkg.gitMajor=$major -X $pkg.gitMinor=$minor -X $pkg.gitTreeState=clean"

# Build in a temporary directory, so that an interrupted build does not look complete.
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
CGO_ENABLED=0 go build -trimpath -ldflags "$ldflags" -o "$work/" k8s.io/kubernetes/cmd/kube-proxy
mv -f "$work/kube-proxy" "$cache/kube-proxy"
echo "$want" >"$cache/built"
