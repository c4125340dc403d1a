#!/usr/bin/env bash
# Builds the control plane for tests from source:
#
#   .cache/controlplane/{etcd,kube-apiserver,kube-controller-manager}
#
# The versions are pinned in test/e2e/kubernetes/go.mod; no Debian release has them. The first
# build takes about ten minutes on two cores. Later runs do nothing unless the versions, this
# file or the Go toolchain change. Needs only Go, not root.
set -euo pipefail

top=$(cd "$(dirname "$0")/../.." && pwd)
cache=$top/.cache/controlplane
module=$top/test/e2e/kubernetes
# Kubelet, kube-proxy and others, which other scripts build without cgo, share most packages.
export CGO_ENABLED=0
programs=(etcd kube-apiserver kube-controller-manager)

want=$(
	cd "$top"
	go version
	sha256sum test/e2e/kubernetes/go.mod test/e2e/kubernetes/go.sum test/controlplane/build.sh
)
up_to_date() {
	[ "$(cat "$cache/programs.built" 2>/dev/null)" = "$want" ] || return 1
	local p
	for p in "${programs[@]}"; do [ -x "$cache/$p" ] || return 1; done
}

mkdir -p "$cache"
# Concurrent runs of make must not build twice.
exec 9>"$cache/lock"
flock 9
up_to_date && exit 0

version() { cd "$module" && go list -m -f '{{.Version}}' "$1"; }
kubernetes=$(version k8s.io/kubernetes)
echo "building etcd $(version go.etcd.io/etcd/server/v3) and Kubernetes $kubernetes; the first build takes about ten minutes" >&2

# The API server's behavior depends on its version, which is v0.0.0-master without these
# flags.
IFS=. read -r major minor _ <<<"${kubernetes#v}"
pkg=k8s.io/component-base/version
ldflags="-s -w -X $pkg.gitVersion=$kubernetes -X $pkg.gitMajor=$major -X $pkg.gitMinor=$minor -X $pkg.gitTreeState=clean"

# Build in a temporary directory, so that an interrupted build leaves no incomplete programs.
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$module"
go build -trimpath -ldflags "$ldflags" -o "$work/" \
	go.etcd.io/etcd/server/v3 k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager
mv "$work/server" "$work/etcd"
for p in "${programs[@]}"; do mv -f "$work/$p" "$cache/$p"; done
echo "$want" >"$cache/programs.built"
