# Plain `make` prints what there is; the lines with two number signs are the help.

# The version is put in by the linker, so Go need not ask git, which refuses a
# checkout that belongs to somebody else.
export GOFLAGS := $(strip $(GOFLAGS) -buildvcs=false)
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

# What `make demo` hands to the demo: make demo ARGS=--keep
ARGS ?=
# Which benchmarks, and how often: make bench BENCH=Apply COUNT=10
BENCH ?= .
COUNT ?= 1
# How long each fuzz target runs.
FUZZTIME ?= 5s

LINT := go tool -modfile=internal/tools/go.mod golangci-lint

.PHONY: help
help:
	@echo 'make TARGET, where TARGET is'
	@awk -F': ?.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## the static binary, bin/fairlead
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/fairlead ./cmd/fairlead

.PHONY: demo
demo: build ## three front ends, three back ends and a Redis behind Services (root); ARGS=--keep leaves it running
	go run ./examples/demo $(ARGS)

.PHONY: deps
deps: ## install the Debian packages that the tests need, where they are missing (root)
	@test/deps.sh

.PHONY: nftables
nftables: ## fetch the nft releases that listings are tested with into .cache
	@test/nftables/fetch.sh

.PHONY: controlplane
controlplane: ## build the etcd and Kubernetes that tests run against into .cache; cold some ten minutes
	@test/controlplane/build.sh

.PHONY: kube-proxy
kube-proxy: ## build the kube-proxy that `fairlead bench compare` measures against into .cache; cold some minutes
	@bench/kubeproxy/build.sh

# -race needs cgo, and with it the C compiler that deps installs.
.PHONY: test
test: deps nftables controlplane ## all tests but e2e (root): with the race detector and the kernel, fuzz targets and benchmarks briefly
	go vet -tags=e2e ./...
	CGO_ENABLED=1 go test -race -shuffle=on -timeout=8m ./...
	test/fuzz.sh $(FUZZTIME)
	go test -short -run='^$$' -bench=. -benchtime=1x -timeout=5m ./...

.PHONY: soak
soak: ## a million connections while endpoints come and go (root), minutes
	FAIRLEAD_SOAK=1 go test -count=1 -timeout=20m -v -run='TestBehaviour/connections_while_endpoints_come_and_go' ./nft

# Which end-to-end scenarios: make e2e RUN=TestRollout
RUN ?= .

.PHONY: e2e
e2e: deps controlplane ## end-to-end tests against a real Kubernetes control plane (root); RUN=regexp
	go test -tags=e2e -v -count=1 -timeout=15m -run='$(RUN)' ./test/e2e/...

# What runs in virtual machines: on which of Debian's kernels, the tests of which
# packages, with which of go test's flags, and how their processor is had;
# ACCEL=kvm is much faster than emulation, where it works.
KERNEL ?= 6.1 6.12
PKG ?= ./nft $(if $(wildcard ipvs),./ipvs/...)
VMFLAGS ?= $(if $(filter .,$(RUN)),$(if $(FULL),,-short -skip='$(VMSKIP)$(VMSKIP-$*)'),-v)
VMTIMEOUT ?= 30m
ACCEL ?= tcg

# What FULL=1 does not leave out: what takes minutes under emulation, since it is
# about large numbers or long histories, or needs a processor that keeps up, since
# it is about load or about what comes after some seconds. All is tested on this
# machine's own kernel too. SCTP, which is slow, is for the oldest kernel.
VMSKIP := ^TestBehaviour$$/(clients_stick|thousands_of_clients|under_load|1000_endpoints|equal_Replace|Read_returns)
VMSKIP := $(VMSKIP)|^(TestRandomStates|TestApplyOfManyServices|TestListingOfManyServices|TestReplaceIsolates)
VMSKIP-6.12 := |^TestBehaviour$$/./SCTP|^TestBehaviour$$/././SCTP|^TestBehaviour$$/./././SCTP

VM = $(CURDIR)/.cache/vm/vm run -accel=$(ACCEL)
# Programs for virtual machines: static, and for the processor that QEMU emulates.
VMGO := CGO_ENABLED=0 GOAMD64=v1 go

.PHONY: vm
vm: deps nftables
	@go build -o .cache/vm/vm ./test/vm
	@.cache/vm/vm fetch

.PHONY: test-vm
test-vm: vm ## tests as root in virtual machines with Debian's kernels; KERNEL=6.1 PKG=./nft RUN=regexp, or FULL=1
	$(if $(filter .,$(RUN)),go test -tags=e2e -count=1 -timeout=10m ./test/vm)
	@$(MAKE) --no-print-directory $(if $(filter .,$(RUN)),-j2) $(KERNEL:%=test-vm-%)

test-vm-%: FORCE
	$(VMGO) test -count=1 -p=1 -parallel=2 -timeout=$(VMTIMEOUT) -run='$(RUN)' $(VMFLAGS) -exec='$(VM) -kernel=$*' $(PKG)

FORCE:

.PHONY: vm-shell
vm-shell: vm build ## a shell in a virtual machine with the checkout; KERNEL=6.1
	@.cache/vm/vm shell -accel=$(ACCEL) -kernel=$(lastword $(KERNEL))

.PHONY: vm-demo
vm-demo: vm build ## the demo in a virtual machine; KERNEL=6.1 ARGS=...
	$(VMGO) run -exec='$(VM) -kernel=$(lastword $(KERNEL))' ./examples/demo $(ARGS)

.PHONY: vm-bench
vm-bench: vm ## benchmarks in a virtual machine; KERNEL=6.1 BENCH=regexp COUNT=n
	$(VMGO) test -run='^$$' -bench='$(BENCH)' -count=$(COUNT) -benchmem -p=1 -timeout=60m -v -exec='$(VM) -kernel=$(lastword $(KERNEL))' ./bench

# A test that makes network namespaces does so with internal/nettest, and needs
# root; one that runs a control plane does so with test/controlplane.
ROOTLESS = $(shell go list -test -f '{{.ImportPath}} {{join .Deps " "}}' ./... | awk \
	'$$1 ~ /\.test$$/ && !/ fairlead\/(internal\/nettest|test\/controlplane)( |$$)/ { sub(/\.test$$/, "", $$1); print $$1 }')

.PHONY: test-short
test-short: rootless = $(ROOTLESS)
test-short: ## the tests that need neither root nor packages nor a control plane, quickly
	@echo 'left out, as they need root: $(filter-out $(rootless),$(shell go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./...))'
	go test -short -shuffle=on $(rootless)

.PHONY: bench
bench: ## benchmarks (root), minutes; BENCH=regexp COUNT=n
	go test -run='^$$' -bench='$(BENCH)' -count=$(COUNT) -benchmem -timeout=60m ./...

.PHONY: lint
lint: ## golangci-lint, and whether go.mod is tidy
	@echo 'golangci-lint is built from source; the first time that takes a minute or two'
	$(LINT) config verify
	$(LINT) run ./...
	go mod tidy -diff

.PHONY: fmt
fmt: ## format the Go files
	$(LINT) fmt ./...

.PHONY: clean
clean: ## remove what the other targets made in the checkout
	rm -rf bin .cache
