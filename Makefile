# `make` prints the targets; their descriptions follow two number signs.

# The linker sets the version, so Go does not need to run git, which refuses a checkout of
# another user. All programs and tests, except those with the race detector, have the same flags, so
# that Go compiles each package once.
export GOFLAGS := $(strip $(GOFLAGS) -buildvcs=false -trimpath)
export CGO_ENABLED := 0
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

# Additional flags of the program that the target runs: make demo ARGS=--keep
ARGS ?=
# Go benchmarks to run and their number of runs: make gobench BENCH=Apply COUNT=10
BENCH ?= .
COUNT ?= 1
# Duration of each fuzz target.
FUZZTIME ?= 5s

LINT := go tool -modfile=internal/tools/go.mod golangci-lint
VALE := go tool -modfile=internal/tools/go.mod vale

.PHONY: help
help:
	@echo 'make TARGET, where TARGET is one of'
	@awk -F': ?.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the static binary bin/fairlead
	go build -ldflags '-s -w -X main.version=$(VERSION)' -o bin/fairlead ./cmd/fairlead

# Architectures of images and packages. Tests must run on each of them.
ARCHITECTURES := amd64 arm64 ppc64le s390x
# Architectures of make test-arch.
EMULATED := $(filter-out amd64,$(ARCHITECTURES))
REVISION := $(shell git rev-parse HEAD 2>/dev/null)
# The time of the commit, so that two builds of a commit are equal.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
# The repository's URL, which images name: make image SOURCE=https://...
SOURCE ?=

bin/linux-%/fairlead: FORCE
	GOOS=linux GOARCH=$* go build -ldflags '-s -w -X main.version=$(VERSION)' -o $@ ./cmd/fairlead

.PHONY: image
image: $(ARCHITECTURES:%=bin/linux-%/fairlead) ## write an OCI image layout for ARCHITECTURES to bin/image; SOURCE=URL
	go run -C internal/release . image -layout='$(CURDIR)/bin/image' -version='$(VERSION)' -revision='$(REVISION)' \
		-created='$(SOURCE_DATE_EPOCH)' -source='$(SOURCE)' $(ARCHITECTURES:%='$(CURDIR)/bin/linux-%/fairlead')

# Image to push to: make push IMAGE=REGISTRY/fairlead:TAG
IMAGE ?=

.PHONY: push
push: image ## push the image to a registry and print its digest; IMAGE=REGISTRY/fairlead:TAG
	@go run -C internal/release . push -layout='$(CURDIR)/bin/image' '$(IMAGE)'

.PHONY: man
man: ## write the man pages and the completions of shells to bin/man
	rm -rf bin/man
	SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) go test ./cmd/fairlead -count=1 -run='^TestManPages$$' -man='$(CURDIR)/bin/man'

.PHONY: deb
deb: $(ARCHITECTURES:%=bin/linux-%/fairlead) man ## build Debian packages for ARCHITECTURES in bin/deb
	$(foreach arch,$(ARCHITECTURES),SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) deploy/debian/build.sh bin/linux-$(arch)/fairlead $(arch) '$(VERSION)' bin/deb/fairlead_$(arch).deb bin/man &&) true

.PHONY: test-release
test-release: deps image $(if $(filter-out amd64,$(ARCHITECTURES)),.cache/qemu-user) ## run the image in a container; install, remove and purge the Debian package (root)
	cd internal/release && go vet ./... && FAIRLEAD_IMAGE_LAYOUT='$(CURDIR)/bin/image' FAIRLEAD_IMAGE_ARCHITECTURES='$(ARCHITECTURES)' \
		go test -count=1 -timeout=10m ./...

.PHONY: build-bench
build-bench: ## build the benchmark program bin/fairlead-bench
	go build -ldflags '-s -w -X main.version=$(VERSION)' -o bin/fairlead-bench ./cmd/fairlead-bench

# Mode of Fairlead in the demo: nft or ipvs. If the kernel does not support the mode, the
# demo runs the command of -vm instead, which uses a virtual machine.
MODE ?= nft
DEMO = go build -o bin/demo ./examples/demo

.PHONY: demo
demo: build ## run three front ends, three back ends and a Redis behind Services (root); MODE=ipvs; ARGS=--keep leaves it running
	@$(DEMO)
	@bin/demo -mode=$(MODE) -vm='$(MAKE) -s vm-demo KERNEL=$(lastword $(KERNEL))' $(ARGS)

.PHONY: deps
deps: ## install missing Debian packages that the tests need (root)
	@test/deps.sh $(QEMU-package-$(ARCH))

.PHONY: nftables
nftables: ## download the nft releases for listing tests to .cache
	@test/debian/fetch.sh nftables

.PHONY: controlplane
controlplane: ## build etcd and Kubernetes for tests in .cache; the first build takes about ten minutes
	@test/controlplane/build.sh

.PHONY: kube-proxy
kube-proxy: ## build kube-proxy for tests and benchmarks in .cache; the first build takes some minutes
	@bench/kubeproxy/build.sh

.PHONY: kube-proxy-flags
kube-proxy-flags: kube-proxy ## write the list of kube-proxy's flags that a test compares with docs/compatibility.md
	.cache/kube-proxy/kube-proxy --help | grep -oE '^ +(-[a-z], )?--[a-z0-9-]+' | sed 's/.*--//' | sort >cmd/fairlead/testdata/kube-proxy-flags.txt

# Behaviors with many connections, whose calls of a backend follow each other. They run without the
# race detector, which makes them slower. Those whose calls overlap run with it.
SEQUENTIAL := ^TestBehaviour$$/^(Service_with_1000_endpoints|endpoints_are_chosen_evenly|connections_without_endpoints_are_(rejected|dropped)$\
	|node_ports_answer_on_the_configured_addresses|external_traffic_policy_Local|source_ranges|session_affinity|session_affinity_of_many_clients$\
	|hairpin_connections|endpoints_on_the_node_itself|changes_of_a_Service|Services_that_share_endpoints|Service_with_many_frontends$\
	|frontends_move_between_Services|Read_returns_the_programmed_state)$$

# The race detector needs cgo and therefore the C compiler that deps installs; programs that tests
# build do not. The packages whose tests take longest start first, so that both processors are busy
# until the end.
.PHONY: test
test: deps nftables controlplane kube-proxy ## run all tests except e2e with the race detector, and briefly all fuzz targets and benchmarks (root)
	go vet -tags=e2e,ipvs ./...
	CGO_ENABLED=1 go test -race -shuffle=on -timeout=30m -skip='$(SEQUENTIAL)' -exec='env CGO_ENABLED=0' ./nft ./cmd/fairlead ./...
	go test -shuffle=on -timeout=10m -run='$(SEQUENTIAL)' ./nft
	test/fuzz.sh $(FUZZTIME)
	go test -short -run='^$$' -bench=. -benchtime=1x -timeout=5m ./...
	@$(MAKE) --no-print-directory test-chart test-page test-cluster

.PHONY: test-page
test-page: deps ## test the status page in Chromium (root); FAIRLEAD_SCREENSHOTS=FOLDER keeps pictures
	cd test/statuspage && go vet ./... && go test -count=1 -timeout=10m ./...

.PHONY: test-chart
test-chart: controlplane ## test the Helm chart and the manifests in deploy; the first build takes some minutes
	cd test/chart && go vet ./... && go test -count=1 -timeout=10m ./...

.PHONY: manifests
manifests: ## write the manifests in deploy from the Helm chart
	cd test/chart && go test -count=1 -run=TestManifests . -update

.PHONY: soak
soak: ## make a million connections while endpoints change (root), minutes
	FAIRLEAD_SOAK=1 go test -count=1 -timeout=20m -v -run='TestBehaviour/connections_while_endpoints_come_and_go' ./nft

# Duration and names of the faults in make chaos, and additional flags:
# make chaos TIME=60s FAULTS='kill|flush' ARGS='-services=10000'
TIME ?= 8s
FAULTS ?= .

.PHONY: chaos
chaos: deps controlplane kube-proxy build ## inject faults into a node under load and count lost connections (root), minutes; TIME=60s FAULTS=regexp ARGS=flags
	@go build -o bin/chaos ./test/chaos
	@go build -tags=schematest -o bin/fairlead-schematest ./cmd/fairlead
	bin/chaos -time=$(TIME) -faults='$(FAULTS)' $(ARGS)

# Tests to run: make e2e RUN=TestRollingUpdate
RUN ?= .

.PHONY: e2e
e2e: deps controlplane kube-proxy ## run end-to-end tests with a real Kubernetes control plane (root); RUN=regexp
	go test -tags=e2e -v -count=1 -timeout=15m -run='$(RUN)' ./test/e2e/... ./bench/apiload
	$(if $(filter .,$(RUN)),@$(MAKE) --no-print-directory test-monitoring)

# A Kubernetes cluster on this machine. The packages are for the images that its tests use.
CLUSTER := bin/fairlead-cluster
CLUSTER_PACKAGES := bind9-dnsutils busybox-static conntrack curl iperf netcat-openbsd socat util-linux wget
# Nodes, Service proxy (fairlead, kube-proxy or none) and its MODE, as in
# make cluster NODES=6 PROXY=kube-proxy. IPVS needs a kernel with it: MODE=ipvs.
NODES ?= $(if $(FULL),6,3)
PROXY ?= fairlead
CLUSTER_FLAGS = -image=bin/cluster-image -nodes=$(NODES) -proxy=$(PROXY) -mode=$(if $(filter fairlead,$(PROXY)),$(MODE)) -kubernetes=$(KUBERNETES)
# Node and command of make cluster-shell NODE=node1 COMMAND='ss -ltn'; the default is a shell
# beside the control plane.
NODE ?=
COMMAND ?=
# Document for the results of make conformance; empty writes none.
DOCUMENT ?= docs/conformance.md
# Release of Kubernetes, if not the newest: one of test/cluster/kubernetes-*, as in KUBERNETES=1.29.
KUBERNETES ?=

# With UM=1, User-Mode Linux runs the conformance tests: make conformance MODE=ipvs UM=1. Nodes keep their
# files in its memory.
UM ?=
UMMEMORY ?= 9G
UMCLUSTER = $(if $(UM),test/um/run.sh -m $(UMMEMORY) -g 2 -k bin/conformance -k docs)

.PHONY: cluster-programs
cluster-programs: controlplane kube-proxy ## build kubelet, containerd and other programs of a cluster in .cache; the first build takes about 20 minutes
	@test/deps.sh $(CLUSTER_PACKAGES)
	@test/cluster/build.sh $(if $(KUBERNETES),all kubernetes-$(KUBERNETES))
	@go build -C test/cluster -o '$(CURDIR)/$(CLUSTER)' .

GOARCH_HOST := $(shell go env GOARCH)

.PHONY: cluster-image
cluster-image: bin/linux-$(GOARCH_HOST)/fairlead
	@go run -C internal/release . image -layout='$(CURDIR)/bin/cluster-image' -version='$(VERSION)' -revision='$(REVISION)' \
		-created='$(SOURCE_DATE_EPOCH)' '$(CURDIR)/bin/linux-$(GOARCH_HOST)/fairlead'

.PHONY: cluster
cluster: cluster-programs cluster-image ## start a Kubernetes cluster with Fairlead (root), under a minute; NODES=6 PROXY=kube-proxy MODE=ipvs KUBERNETES=1.29 ARGS=flags
	$(CLUSTER) start $(CLUSTER_FLAGS) $(ARGS)

.PHONY: cluster-shell
cluster-shell: ## start a shell with kubectl in the cluster; NODE=node1 COMMAND='kubectl get pods -A'
	@$(CLUSTER) shell -node=$(NODE) -- $(if $(COMMAND),bash -c '$(COMMAND)')

.PHONY: cluster-stop
cluster-stop: ## end the cluster
	@$(CLUSTER) stop

.PHONY: conformance
conformance: cluster-programs cluster-image $(if $(UM),um) ## run Kubernetes' [Conformance] tests of sig-network in a new cluster (root); PROXY=kube-proxy, KUBERNETES=1.29, MODE=ipvs UM=1, or FULL=1 for all tests
	@mkdir -p bin/conformance
	$(UMCLUSTER) $(CLUSTER) conformance $(CLUSTER_FLAGS) -version='$(VERSION)' -document='$(DOCUMENT)' $(if $(FULL),-full) $(ARGS)

.PHONY: test-cluster
test-cluster: ## test the programs that start a cluster (root), some seconds
	cd test/cluster && go vet ./... && go test -count=1 -timeout=10m ./...

.PHONY: test-disruptions
test-disruptions: cluster-programs cluster-image ## restart parts of a cluster under load, and go to kube-proxy and back (root), about 5 minutes; ARGS='-run=TestDisruptions/drain -outage=5m'
	cd test/cluster && go test -tags=cluster -count=1 -timeout=60m -run=TestDisruptions -v . $(ARGS)

.PHONY: test-monitoring
test-monitoring: deps kube-proxy ## compare metrics and HTTP endpoints with kube-proxy's (root)
	cd test/monitoring && go vet ./... && go test -count=1 -timeout=10m ./...

# Programs of QEMU that run programs for other architectures without a kernel for them.
QEMU = $(CURDIR)/.cache/qemu-user/usr/bin/qemu-$(or $(QEMU-$(1)),$(1))
QEMU-arm64 := aarch64
.cache/qemu-user:
	@test/debian/fetch.sh unpack "$$(dpkg --print-architecture)" trixie $@ qemu-user

# Packages that encode or decode what the kernel reads or writes, and tests to skip: long ones
# that repeat the same code.
ARCHPKG ?= ./nft ./ipvs ./internal/nlconn ./internal/conntrack ./internal/kmod ./internal/nodeip ./internal/socketowner
ARCHSKIP := ^(TestAssignAllEndpointIDs|TestChangesCountedBeforeGeneration)$$|^TestRandomChurn$$/^..+$$

.PHONY: test-arch
test-arch: $(EMULATED:%=test-arch-%) ## run the tests that need no kernel on other architectures, in QEMU; EMULATED=s390x

# The findings of go vet are those of make test.
test-arch-%: FORCE | .cache/qemu-user
	GOARCH=$* go test -vet=off -short -count=1 -timeout=10m -skip='$(ARCHSKIP)' -exec='$(call QEMU,$*)' $(ARCHPKG)

# Virtual machines: architecture, Debian kernels, packages to test, timeout of go test, and QEMU
# accelerator. ACCEL=kvm is much faster where it is available. Tests and benchmarks that
# need a kernel with IPVS have the build tag ipvs.
ARCH ?= amd64
KERNELS-amd64 := 6.1 6.12
KERNELS-arm64 := 6.12
KERNELS-ppc64le := 6.1
KERNELS-s390x := 6.1
KERNEL ?= $(KERNELS-$(ARCH))
QEMU-package-arm64 := qemu-system-arm
QEMU-package-ppc64le := qemu-system-ppc
QEMU-package-s390x := qemu-system-misc
PKG ?= ./nft ./ipvs $(if $(filter amd64,$(ARCH)),./ipvs/reloadtest ./internal/kmod ./internal/inspect ./internal/nfhooks ./internal/servicecounters ./internal/flowoffload ./cmd/fairlead)
VMTIMEOUT ?= 30m
ACCEL ?= tcg

# Tests of nft to run and to skip unless FULL=1. `make test` runs all of them with this
# machine's kernel, which is newer, so each virtual machine runs a part: the oldest kernel the
# behavior with real packets, including SCTP, and the other one the tests of what newer kernels
# do differently: owned tables, dumps and element statements. The tests of ipvs run nowhere
# else, so the two kernels share them. cmd/fairlead: only tests with the build tag; those of the
# migration from kube-proxy (migrate_ipvs_test.go) take long and run with RUN.
VMRUN-nft-6.1 := ^(TestBehaviour|TestSwitchTranslator|TestWatchRecovers)$$
VMSKIP-nft-6.1 := ^TestBehaviour$$/(session_affinity_of_many_clients|1000_endpoints|Read_returns)
VMRUN-nft-6.12 := ^(TestDrift|TestTableOwnership|TestOwnershipHandover|TestDumpDuringResize|TestElementStatementsRemoved)$$
VMSKIP-ipvs-6.1 := ^(TestBehaviour|TestExplanations)$$
VMRUN-ipvs-6.12 := ^TestBehaviour$$|^TestExplanations$$/^(source_ranges|external_traffic_policy_Local|connections_without_endpoints_are_rejected)$$
# Tests of flowtables, which many machines' kernels lack. The behavior of the whole backend with
# flowtables takes long; make test-um PKG=./internal/flowoffload runs all of it.
VMRUN-flowoffload-6.12 := ^TestBehaviour$$/^(established_connections_survive|hairpin_connections|source_ranges)$$
# Tests of packages that need IPVS or the kernel's list of hooks only for some of them.
VMRUN-partly := IPVS|^(TestTranslators|TestFunctions)$$
VMSKIP-cmd-6.1 := ^TestSwitchModes$$
VMRUN-cmd = ^($(shell sed -n 's/^func \(Test[A-Za-z0-9]*\).*/\1/p' cmd/fairlead/ipvs_test.go cmd/fairlead/own_table_test.go cmd/fairlead/flow_offload_test.go cmd/fairlead/flow_modules_test.go | paste -sd '|'))$$
# Additional files for the tests of cmd/fairlead.
VMWITH-cmd := $(if $(wildcard .cache/kube-proxy/kube-proxy),-with=$(CURDIR)/.cache/kube-proxy/kube-proxy)

# On other architectures, the behaviors whose rules contain numbers in different byte orders. Some other
# tests of ipvs fail on s390x, because github.com/moby/ipvs reads only 16 bits of a weight.
VMRUN-arch-nft := ^TestBehaviour$$/^(connections_reach_all_endpoints|connections_without_endpoints_are_rejected|source_ranges$\
	|session_affinity|Service_with_many_frontends|changes_by_another_writer_are_drift)$$
VMRUN-arch-ipvs := ^TestBehaviour$$/^(source_ranges|session_affinity)$$
VMRUN-nft = $(if $(filter amd64,$(ARCH)),$(VMRUN-nft-$(1)),$(VMRUN-arch-nft))
VMRUN-ipvs = $(if $(filter amd64,$(ARCH)),$(VMRUN-ipvs-$(1)),$(VMRUN-arch-ipvs))
VMSKIP-ipvs = $(if $(filter amd64,$(ARCH)),$(VMSKIP-ipvs-$(1)))

VM = $(CURDIR)/bin/vm run -arch=$(ARCH) -accel=$(ACCEL)
# Programs for virtual machines are static and use only instructions that QEMU emulates.
# GOGC=400 trades memory for time, because the emulated processor is slow.
VMGO = GOARCH=$(ARCH) GOAMD64=v1 GOGC=400 GOFLAGS='$(GOFLAGS) -tags=ipvs' go
# Arguments: kernel, packages, pattern of tests to skip, pattern of tests to run, flags of vm. The
# patterns apply only to a run of all tests, that is if RUN is a single dot.
VMTEST = $(VMGO) test -count=1 -p=1 -parallel=2 -timeout=$(VMTIMEOUT) -exec='$(VM) -kernel=$(1) $(5)' \
	$(if $(filter .,$(RUN)),$(if $(FULL),,-short $(if $(3),-skip='$(3)')) $(if $(4),-run='$(4)'),-v -run='$(RUN)') $(2)

.PHONY: vm
vm: deps nftables
	@go build -o bin/vm ./test/vm
	@bin/vm fetch -arch=$(ARCH)

.PHONY: test-vm
test-vm: vm ## run tests in virtual machines with Debian's kernels; ARCH=s390x KERNEL=6.1 PKG=./nft RUN=regexp, or FULL=1
	$(if $(filter .amd64,$(RUN)$(ARCH)),go test -tags=e2e -count=1 -timeout=10m ./test/vm)
	@$(MAKE) --no-print-directory $(if $(filter .,$(RUN)),-j2) $(KERNEL:%=test-vm-%)

test-vm-%: partly = $(filter ./internal/inspect ./internal/nfhooks ./internal/servicecounters,$(PKG))
test-vm-%: others = $(filter-out ./nft ./ipvs ./internal/flowoffload ./cmd/fairlead $(partly),$(PKG))
test-vm-%: FORCE
	$(if $(others),$(call VMTEST,$*,$(others)))
	$(if $(partly),$(call VMTEST,$*,$(partly),,$(VMRUN-partly)))
	$(if $(filter ./ipvs,$(PKG)),$(call VMTEST,$*,./ipvs,$(call VMSKIP-ipvs,$*),$(if $(FULL),,$(call VMRUN-ipvs,$*))))
	$(if $(filter ./nft,$(PKG)),$(call VMTEST,$*,./nft,$(VMSKIP-nft-$*),$(if $(FULL),,$(call VMRUN-nft,$*))))
	$(if $(filter ./internal/flowoffload,$(PKG)),$(call VMTEST,$*,./internal/flowoffload,$(if $(FULL),,^TestBehaviour$$)))
	$(if $(filter ./internal/flowoffload,$(PKG)),$(if $(FULL)$(filter-out .,$(RUN)),,$(if $(VMRUN-flowoffload-$*),$(call VMTEST,$*,./internal/flowoffload,,$(VMRUN-flowoffload-$*)))))
	$(if $(filter ./cmd/fairlead,$(PKG)),$(call VMTEST,$*,./cmd/fairlead,$(VMSKIP-cmd-$*),$(VMRUN-cmd),$(if $(filter .,$(RUN)),,$(VMWITH-cmd))))

FORCE:

# User-Mode Linux: a kernel as a process, with IPVS, flowtables and SCTP at almost the speed of this machine's.
.PHONY: um
um: ## build a kernel for User-Mode Linux in .cache (root); the first build takes about 15 minutes
	@test/deps.sh make xz-utils flex bison bc busybox-static
	@test/um/build.sh

.PHONY: test-um
test-um: um nftables ## run tests of the mode ipvs with User-Mode Linux (root); PKG=./ipvs RUN=regexp
	go test -count=1 -p=1 -tags=ipvs -timeout=$(VMTIMEOUT) -exec='$(CURDIR)/test/um/run.sh' -run='$(RUN)' $(if $(filter command% environment,$(origin PKG)),$(PKG),./ipvs)

.PHONY: vm-shell
vm-shell: vm build ## start a shell in a virtual machine with the checkout; KERNEL=6.1
	@bin/vm shell -accel=$(ACCEL) -kernel=$(lastword $(KERNEL))

.PHONY: vm-demo
vm-demo: vm build ## run the demo in a virtual machine; KERNEL=6.1 MODE=ipvs ARGS=...; ARGS=--keep adds a shell
	@$(DEMO)
	@bin/vm $(if $(findstring -keep,$(ARGS)),shell,run) -accel=$(ACCEL) -kernel=$(lastword $(KERNEL)) bin/demo -mode=$(MODE) $(ARGS)

.PHONY: vm-bench
vm-bench: vm ## compare benchmarks of both backends in a virtual machine; KERNEL=6.1 BENCH=regexp COUNT=n
	$(VMGO) test -run='^$$' -bench='$(BENCH)' -count=$(COUNT) -benchmem -p=1 -timeout=60m -v -exec='$(VM) -kernel=$(lastword $(KERNEL))' ./bench 2>&1 | awk -f test/vm/ratios.awk

# Tests that create network namespaces use internal/nettest and need root. Tests that run a
# control plane use test/controlplane.
ROOTLESS = $(shell go list -test -f '{{.ImportPath}} {{join .Deps " "}}' ./... | awk \
	'$$1 ~ /\.test$$/ && !/ fairlead\.io\/fairlead\/(internal\/nettest|test\/controlplane)( |$$)/ { sub(/\.test$$/, "", $$1); print $$1 }')

.PHONY: test-short
test-short: rootless = $(ROOTLESS)
test-short: ## run the tests that need neither root nor Debian packages nor a control plane
	@echo 'skipped, because they need root or a control plane: $(filter-out $(rootless),$(shell go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./...))'
	go test -short -shuffle=on $(rootless)

# Directory for benchmark results: JSON, an HTML page, and SVG images of bench-full.
BENCHDIR ?= bin/bench

.PHONY: bench
bench: SERVICES ?= 1000
bench: build build-bench kube-proxy ## compare Fairlead with kube-proxy (root), minutes; SERVICES=10000 ARGS=flags of fairlead-bench compare
	@mkdir -p $(BENCHDIR)
	bin/fairlead-bench compare --systems=nft,kube-proxy-nftables --services=$(SERVICES) --samples=12 --starts=3 --rounds=3 --churn-time=5s \
		--json=$(BENCHDIR)/bench.json --html=$(BENCHDIR)/bench.html $(ARGS)

.PHONY: bench-full
bench-full: SERVICES ?= 100,1000,10000
bench-full: build build-bench kube-proxy vm ## compare all systems with up to 10,000 Services, in a virtual machine if this kernel cannot run them (root), about an hour
	@mkdir -p $(BENCHDIR)
	bin/fairlead-bench compare --services=$(SERVICES) \
		--json=$(BENCHDIR)/full.json --html=$(BENCHDIR)/full.html --svg=$(BENCHDIR)/images $(ARGS)

.PHONY: bench-api
bench-api: build build-bench kube-proxy controlplane ## measure the load of Fairlead and kube-proxy on a real API server (root), about 20 minutes; ARGS='--services=200 --starts=1'
	bin/fairlead-bench apiload $(ARGS)

.PHONY: gobench
gobench: ## run the Go benchmarks (root), minutes; BENCH=regexp COUNT=n
	go test -run='^$$' -bench='$(BENCH)' -count=$(COUNT) -benchmem -timeout=60m ./...

.PHONY: lint
lint: ## run golangci-lint and the prose linter, and check that go.mod is tidy
	@echo 'building the linters from source; the first build takes some minutes'
	$(LINT) config verify
	$(LINT) run ./...
	cd test/cluster && go tool -modfile='$(CURDIR)/internal/tools/go.mod' golangci-lint run ./...
	CGO_ENABLED=1 $(VALE) --output=line --glob='!{.cache,bin}/**' .
	go mod tidy -diff
	cd test/monitoring && go mod tidy -diff
	cd test/chart && go mod tidy -diff
	cd test/statuspage && go mod tidy -diff
	cd test/cluster && go mod tidy -diff
	cd internal/release && go mod tidy -diff

# Commit to compare the API with: make apidiff BASE=main
BASE ?= HEAD^

.PHONY: apidiff
apidiff: ## fail on incompatible changes of dataplane since BASE that CHANGELOG.md does not announce; BASE=commit
	@test/apidiff.sh $(BASE)

.PHONY: govulncheck
govulncheck: ## check for known vulnerabilities in code that Fairlead calls; needs vuln.go.dev
	go tool -modfile=internal/tools/go.mod govulncheck ./...

.PHONY: fmt
fmt: ## format the Go files
	$(LINT) fmt ./...

.PHONY: clean
clean: ## remove the files that other targets created
	rm -rf bin .cache
