# Plain `make` prints what there is; the lines with two number signs are the help.

# The version is put in by the linker, so Go need not ask git, which refuses a
# checkout that belongs to somebody else.
export GOFLAGS := $(strip $(GOFLAGS) -buildvcs=false)
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

# What `make demo` hands to the demo: make demo ARGS=--keep
ARGS ?=
# Which benchmarks of the Go packages, and how often: make gobench BENCH=Apply COUNT=10
BENCH ?= .
COUNT ?= 1
# How long each fuzz target runs.
FUZZTIME ?= 5s

LINT := go tool -modfile=internal/tools/go.mod golangci-lint
VALE := go tool -modfile=internal/tools/go.mod vale

.PHONY: help
help:
	@echo 'make TARGET, where TARGET is'
	@awk -F': ?.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## the static binary, bin/fairlead
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/fairlead ./cmd/fairlead

.PHONY: build-bench
build-bench: ## the benchmarks, bin/fairlead-bench
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/fairlead-bench ./cmd/fairlead-bench

# How the demo's fairlead programs the kernel: nft or ipvs. A kernel that cannot is
# replaced by a virtual machine's, which -vm is for.
MODE ?= nft
DEMO = CGO_ENABLED=0 go build -o bin/demo ./examples/demo

.PHONY: demo
demo: build ## three front ends, three back ends and a Redis behind Services (root); MODE=ipvs; ARGS=--keep leaves it running
	@$(DEMO)
	@bin/demo -mode=$(MODE) -vm='$(MAKE) -s vm-demo KERNEL=$(lastword $(KERNEL))' $(ARGS)

.PHONY: deps
deps: ## install the Debian packages that the tests need, where they are missing (root)
	@test/deps.sh

.PHONY: nftables
nftables: ## fetch the nft releases that listings are tested with into .cache
	@test/debian/fetch.sh nftables

.PHONY: controlplane
controlplane: ## build the etcd and Kubernetes that tests run against into .cache; cold some ten minutes
	@test/controlplane/build.sh

.PHONY: kube-proxy
kube-proxy: ## build the kube-proxy that `fairlead-bench compare` measures against into .cache; cold some minutes
	@bench/kubeproxy/build.sh

# -race needs cgo, and with it the C compiler that deps installs.
.PHONY: test
test: deps nftables controlplane ## all tests but e2e (root): with the race detector and the kernel, fuzz targets and benchmarks briefly
	go vet -tags=e2e,ipvs ./...
	CGO_ENABLED=1 go test -race -shuffle=on -timeout=20m ./...
	test/fuzz.sh $(FUZZTIME)
	go test -short -run='^$$' -bench=. -benchtime=1x -timeout=5m ./...

.PHONY: soak
soak: ## a million connections while endpoints come and go (root), minutes
	FAIRLEAD_SOAK=1 go test -count=1 -timeout=20m -v -run='TestBehaviour/connections_while_endpoints_come_and_go' ./nft

# How long each fault of make chaos lasts, which faults, and what else it is told:
# make chaos TIME=60s FAULTS='kill|flush' ARGS='-services=10000'
TIME ?= 8s
FAULTS ?= .

.PHONY: chaos
chaos: deps controlplane kube-proxy build ## disturb a node under load and count lost connections (root), minutes; TIME=60s FAULTS=regexp ARGS=flags
	@go build -o bin/chaos ./test/chaos
	@go build -tags=schematest -o bin/fairlead-schematest ./cmd/fairlead
	bin/chaos -time=$(TIME) -faults='$(FAULTS)' $(ARGS)

# Which end-to-end scenarios: make e2e RUN=TestRollout
RUN ?= .

.PHONY: e2e
e2e: deps controlplane kube-proxy ## end-to-end tests against a real Kubernetes control plane (root); RUN=regexp
	go test -tags=e2e -v -count=1 -timeout=15m -run='$(RUN)' ./test/e2e/...

# What runs in virtual machines: on which of Debian's kernels, the tests of which
# packages, with which of go test's flags, and how their processor is had;
# ACCEL=kvm is much faster than emulation, where it works. Behind the build tag ipvs
# are tests and benchmarks that need a kernel with IPVS.
KERNEL ?= 6.1 6.12
PKG ?= ./nft ./ipvs/... ./internal/kmod ./cmd/fairlead
VMTIMEOUT ?= 30m
ACCEL ?= tcg

# What FULL=1 does not leave out. Of nft: what takes longest under emulation, as it is
# about large numbers or long histories, and is tested on this machine's own kernel too.
# SCTP, which is slow, is for the oldest kernel, and the many kinds of drift for the
# other. Nothing of ipvs, which is tested nowhere else; and of cmd/fairlead those tests
# alone that are behind the build tag.
VMSKIP-nft := ^TestBehaviour$$/(thousands_of_clients|1000_endpoints|Read_returns)
VMSKIP-nft := $(VMSKIP-nft)|^(TestRandomStates|TestReferenceCounts|TestApplyManyServices|TestListManyServices)
VMSKIP-nft := $(VMSKIP-nft)|^(TestReplaceIsolates|TestLargestService|TestRunInterrupted|TestStepOrder)
VMSKIP-nft-6.1 := |^TestDrift
VMSKIP-nft-6.12 := |^TestBehaviour$$/./SCTP|^TestBehaviour$$/././SCTP|^TestBehaviour$$/./././SCTP
VMRUN-cmd = ^($(shell sed -n 's/^func \(Test[A-Za-z0-9]*\).*/\1/p' cmd/fairlead/ipvs_test.go | paste -sd '|'))$$

VM = $(CURDIR)/bin/vm run -accel=$(ACCEL)
# Programs for virtual machines: static, and for the processor that QEMU emulates,
# which is slow where memory is plenty.
VMGO := CGO_ENABLED=0 GOAMD64=v1 GOGC=400 GOFLAGS='$(GOFLAGS) -tags=ipvs' go
# The arguments are a kernel, packages, and if all tests are wanted (RUN is one dot),
# what is left out of them or else which they are.
VMTEST = $(VMGO) test -count=1 -p=1 -parallel=2 -timeout=$(VMTIMEOUT) -exec='$(VM) -kernel=$(1)' \
	$(if $(filter .,$(RUN)),$(if $(FULL),,-short) $(if $(4),-run='$(4)',$(if $(FULL),,-skip='$(3)')),-v -run='$(RUN)') $(2)

.PHONY: vm
vm: deps nftables
	@go build -o bin/vm ./test/vm
	@bin/vm fetch

.PHONY: test-vm
test-vm: vm ## tests as root in virtual machines with Debian's kernels; KERNEL=6.1 PKG=./nft RUN=regexp, or FULL=1
	$(if $(filter .,$(RUN)),go test -tags=e2e -count=1 -timeout=10m ./test/vm)
	@$(MAKE) --no-print-directory $(if $(filter .,$(RUN)),-j2) $(KERNEL:%=test-vm-%)

test-vm-%: others = $(filter-out ./nft ./cmd/fairlead,$(PKG))
test-vm-%: FORCE
	$(if $(others),$(call VMTEST,$*,$(others)))
	$(if $(filter ./nft,$(PKG)),$(call VMTEST,$*,./nft,$(VMSKIP-nft)$(VMSKIP-nft-$*)))
	$(if $(filter ./cmd/fairlead,$(PKG)),$(call VMTEST,$*,./cmd/fairlead,,$(VMRUN-cmd)))

FORCE:

.PHONY: vm-shell
vm-shell: vm build ## a shell in a virtual machine with the checkout; KERNEL=6.1
	@bin/vm shell -accel=$(ACCEL) -kernel=$(lastword $(KERNEL))

.PHONY: vm-demo
vm-demo: vm build ## the demo in a virtual machine; KERNEL=6.1 MODE=ipvs ARGS=..., with a shell beside it for ARGS=--keep
	@$(DEMO)
	@bin/vm $(if $(findstring -keep,$(ARGS)),shell,run) -accel=$(ACCEL) -kernel=$(lastword $(KERNEL)) bin/demo -mode=$(MODE) $(ARGS)

.PHONY: vm-bench
vm-bench: vm ## benchmarks of both backends in one run in a virtual machine, and their ratios; KERNEL=6.1 BENCH=regexp COUNT=n
	$(VMGO) test -run='^$$' -bench='$(BENCH)' -count=$(COUNT) -benchmem -p=1 -timeout=60m -v -exec='$(VM) -kernel=$(lastword $(KERNEL))' ./bench 2>&1 | awk -f test/vm/ratios.awk

# A test that makes network namespaces does so with internal/nettest, and needs
# root; one that runs a control plane does so with test/controlplane.
ROOTLESS = $(shell go list -test -f '{{.ImportPath}} {{join .Deps " "}}' ./... | awk \
	'$$1 ~ /\.test$$/ && !/ fairlead\.io\/fairlead\/(internal\/nettest|test\/controlplane)( |$$)/ { sub(/\.test$$/, "", $$1); print $$1 }')

.PHONY: test-short
test-short: rootless = $(ROOTLESS)
test-short: ## the tests that need neither root nor packages nor a control plane, quickly
	@echo 'left out, as they need root: $(filter-out $(rootless),$(shell go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./...))'
	go test -short -shuffle=on $(rootless)

# Where the results go, as JSON, as a page and, of bench-full, as pictures.
BENCHDIR ?= bin/bench

.PHONY: bench
bench: SERVICES ?= 1000
bench: build build-bench kube-proxy ## Fairlead and kube-proxy side by side (root), minutes; SERVICES=10000 ARGS=flags of fairlead-bench compare
	@mkdir -p $(BENCHDIR)
	bin/fairlead-bench compare --systems=nft,kube-proxy-nftables --services=$(SERVICES) --samples=12 --starts=3 --rounds=3 --churn-time=5s \
		--json=$(BENCHDIR)/bench.json --html=$(BENCHDIR)/bench.html $(ARGS)

.PHONY: bench-full
bench-full: SERVICES ?= 100,1000,10000
bench-full: build build-bench kube-proxy vm ## all systems, up to 10,000 Services, and in a virtual machine what this kernel cannot run (root), about an hour
	@mkdir -p $(BENCHDIR)
	bin/fairlead-bench compare --services=$(SERVICES) \
		--json=$(BENCHDIR)/full.json --html=$(BENCHDIR)/full.html --svg=$(BENCHDIR)/images $(ARGS)

.PHONY: gobench
gobench: ## benchmarks of the Go packages (root), minutes; BENCH=regexp COUNT=n
	go test -run='^$$' -bench='$(BENCH)' -count=$(COUNT) -benchmem -timeout=60m ./...

.PHONY: lint
lint: ## golangci-lint, the prose linter, and whether go.mod is tidy
	@echo 'The linters are built from source, which takes some minutes the first time'
	$(LINT) config verify
	$(LINT) run ./...
	$(VALE) --output=line --glob='!{.cache,bin}/**' .
	go mod tidy -diff

# The commit that the API is compared with: make apidiff BASE=main
BASE ?= HEAD^

.PHONY: apidiff
apidiff: ## fail on incompatible changes of dataplane since BASE that CHANGELOG.md does not announce; BASE=commit
	@test/apidiff.sh $(BASE)

.PHONY: govulncheck
govulncheck: ## known vulnerabilities in code that Fairlead calls; needs vuln.go.dev
	go tool -modfile=internal/tools/go.mod govulncheck ./...

.PHONY: fmt
fmt: ## format the Go files
	$(LINT) fmt ./...

.PHONY: clean
clean: ## remove what the other targets made in the checkout
	rm -rf bin .cache
