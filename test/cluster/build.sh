#!/usr/bin/env bash
# Builds the programs of a cluster from source, in .cache/cluster/bin:
#
#   pause                                       test/cluster/pause
#   kubelet, kube-scheduler, kubectl, e2e.test, ginkgo,
#   agnhost, regression-issue-74839             test/cluster/kubernetes/go.mod
#   containerd, containerd-shim-runc-v2, ctr    test/cluster/containerd/go.mod
#   cni/bridge, cni/host-local, ...             test/cluster/cni/go.mod
#   coredns                                     test/cluster/coredns/go.mod
#
# and with the argument kubernetes-1.29, in .cache/cluster/kubernetes-1.29:
#
#   kube-apiserver, kube-controller-manager, kube-scheduler,
#   kubelet, kubectl, e2e.test, ginkgo          test/cluster/kubernetes-1.29/go.mod
#   links to the other programs
#
# The go.mod files pin the versions; no Debian release has them. etcd, kube-apiserver and
# kube-controller-manager come from test/controlplane/build.sh, and kube-proxy from
# bench/kubeproxy/build.sh. The first build takes about ten minutes on two cores. A group is not
# built again unless its versions, its sources or the Go toolchain change. Arguments are the
# groups to build; all, the default, means those above. Needs only Go, not root.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=$here/../../.cache/cluster
mkdir -p "$cache/bin/cni"
export CGO_ENABLED=0 GOFLAGS="${GOFLAGS:-} -trimpath"

# Concurrent runs of make must not build twice.
exec 9>"$cache/lock"
flock 9

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT

# version MODULE in the module of the working directory
version() { go list -m -f '{{.Version}}' "$1"; }

# install PROGRAM... moves programs from the temporary directory, so that an interrupted
# build leaves no incomplete programs.
install() {
	local p
	for p in "$@"; do
		mkdir -p "$(dirname "$cache/bin/$p")"
		mv -f "$work/$p" "$cache/bin/$p"
	done
}

build_pause() {
	cd "$here"
	go build -ldflags '-s -w' -o "$work/pause" ./pause
	install pause
}

build_kubernetes() {
	cd "$here/kubernetes"
	local kubernetes major minor pkg=k8s.io/component-base/version
	kubernetes=$(version k8s.io/kubernetes)
	IFS=. read -r major minor _ <<<"${kubernetes#v}"
	# Without these flags the version is v0.0.0-master, which kubelet and the tests compare.
	local ldflags="-s -w -X $pkg.gitVersion=$kubernetes -X $pkg.gitMajor=$major -X $pkg.gitMinor=$minor -X $pkg.gitTreeState=clean"
	go build -ldflags "$ldflags" -o "$work/" \
		k8s.io/kubernetes/cmd/kubelet k8s.io/kubernetes/cmd/kube-scheduler k8s.io/kubernetes/cmd/kubectl \
		k8s.io/kubernetes/test/images/agnhost k8s.io/kubernetes/test/images/regression-issue-74839 github.com/onsi/ginkgo/v2/ginkgo
	go test -c -ldflags "$ldflags" -o "$work/e2e.test" ./suite
	install kubelet kube-scheduler kubectl agnhost regression-issue-74839 ginkgo e2e.test
}

build_containerd() {
	cd "$here/containerd"
	local module=github.com/containerd/containerd/v2
	go build -ldflags "-s -w -X $module/version.Version=$(version $module)" -o "$work/" \
		$module/cmd/containerd $module/cmd/containerd-shim-runc-v2 $module/cmd/ctr
	install containerd containerd-shim-runc-v2 ctr
}

build_cni() {
	cd "$here/cni"
	local plugins=github.com/containernetworking/plugins/plugins
	go build -ldflags '-s -w' -o "$work/cni/" $plugins/main/bridge $plugins/main/loopback $plugins/ipam/host-local $plugins/meta/portmap
	install cni/bridge cni/loopback cni/host-local cni/portmap
}

build_coredns() {
	cd "$here/coredns"
	go build -ldflags '-s -w' -o "$work/coredns" .
	install coredns
}

# build_kubernetes-1.29 builds an older release of Kubernetes in a directory of its own, and links
# the programs that do not depend on the release.
build_kubernetes-1.29() {
	cd "$here/kubernetes-1.29"
	local out=$work/kubernetes-1.29 kubernetes major minor pkg=k8s.io/component-base/version p
	kubernetes=$(version k8s.io/kubernetes)
	IFS=. read -r major minor _ <<<"${kubernetes#v}"
	local ldflags="-s -w -X $pkg.gitVersion=$kubernetes -X $pkg.gitMajor=$major -X $pkg.gitMinor=$minor -X $pkg.gitTreeState=clean"
	# providerless leaves out the libraries of cloud providers, which newer releases do not have.
	go build -tags providerless -ldflags "$ldflags" -o "$out/" \
		k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager k8s.io/kubernetes/cmd/kube-scheduler \
		k8s.io/kubernetes/cmd/kubelet k8s.io/kubernetes/cmd/kubectl github.com/onsi/ginkgo/v2/ginkgo
	go test -c -ldflags "$ldflags" -o "$out/e2e.test" ./suite
	for p in agnhost cni containerd containerd-shim-runc-v2 coredns ctr pause regression-issue-74839; do
		ln -s "../bin/$p" "$out/$p"
	done
	ln -s ../../controlplane/etcd "$out/etcd"
	rm -rf "$cache/kubernetes-1.29"
	mv "$out" "$cache/kubernetes-1.29"
}

# sources GROUP lists the files that a group is built from.
sources() {
	case $1 in
	pause) echo pause/main.go ;;
	*) find "$1" -type f | sort ;;
	esac
}

# fingerprint GROUP identifies the result of a build, without the comments of this script.
fingerprint() (
	cd "$here"
	go version
	declare -f "build_$1"
	# shellcheck disable=SC2046 # names without spaces
	sha256sum $(sources "$1")
)

[ "${1:-all}" != all ] || set -- pause containerd cni coredns kubernetes "${@:2}"
mkdir "$work/cni"
for group in "$@"; do
	want=$(fingerprint "$group")
	[ "$(cat "$cache/$group.built" 2>/dev/null)" != "$want" ] || continue
	echo "building $group for test/cluster; the first build of all groups takes about ten minutes" >&2
	("build_$group")
	echo "$want" >"$cache/$group.built"
done
