#!/usr/bin/env bash
# Builds the control plane that tests run against:
#
#   .cache/controlplane/{etcd,kube-apiserver,kube-controller-manager}
#
# from source, at the versions that test/e2e/kubernetes/go.mod pins, because no
# Debian release has them. Cold that takes some ten minutes on two cores, which
# is why it is done once: it does nothing while these versions, this file and
# the Go toolchain stay as they are. Needs Go only; no root.
set -euo pipefail

top=$(cd "$(dirname "$0")/../.." && pwd)
cache=$top/.cache/controlplane
module=$top/test/e2e/kubernetes
programs=(etcd kube-apiserver kube-controller-manager)

want=$(
	cd "$top"
	go version
	sha256sum test/e2e/kubernetes/go.mod test/e2e/kubernetes/go.sum test/controlplane/build.sh
)
up_to_date() {
	[ "$(cat "$cache/built" 2>/dev/null)" = "$want" ] || return 1
	local p
	for p in "${programs[@]}"; do [ -x "$cache/$p" ] || return 1; done
}

mkdir -p "$cache"
# Two makes at once, say of two targets, must not build twice.
exec 9>"$cache/lock"
flock 9
up_to_date && exit 0

version() { cd "$module" && go list -m -f '{{.Version}}' "$1"; }
kubernetes=$(version k8s.io/kubernetes)
echo "building etcd $(version go.etcd.io/etcd/server/v3) and Kubernetes $kubernetes; the first time that takes some ten minutes" >&2

# The API server says which version it is, and behaves by it; without these it
# is v0.0.0-master.
IFS=. read -r major minor _ <<<"${kubernetes#v}"
pkg=k8s.io/component-base/version
ldflags="-s -w -X $pkg.gitVersion=$kubernetes -X $pkg.gitMajor=$major -X $pkg.gitMinor=$minor -X $pkg.gitTreeState=clean"

# Built aside, so that an interrupted build leaves nothing that looks complete.
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$module"
go build -trimpath -ldflags "$ldflags" -o "$work/" \
	go.etcd.io/etcd/server/v3 k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager
mv "$work/server" "$work/etcd"
for p in "${programs[@]}"; do mv -f "$work/$p" "$cache/$p"; done
echo "$want" >"$cache/built"
