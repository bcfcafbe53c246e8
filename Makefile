# One command each. Every target is safe to repeat: the scripts behind it do only what their inputs' content asks for.
# Progress goes to standard error, whole logs to the cache (log/).

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/pandastack
export CARGO_TARGET_DIR ?= $(CACHE)/target
# Gigabytes that a build from scratch does not need.
export CARGO_INCREMENTAL ?= 0
GUEST_TARGET := $(CACHE)/target-guest
FUZZ_TARGET := $(CACHE)/target-fuzz
FUZZ := $(FUZZ_TARGET)/x86_64-unknown-linux-gnu/fuzz/fuzz
# Coverage for libFuzzer, with the stable compiler: the flags that cargo-fuzz gives, without a sanitizer.
SANCOV := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
	-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
MINUTES := 10
GUEST_INIT := $(GUEST_TARGET)/x86_64-unknown-linux-gnu/guest/guest-init
APPLIANCE := $(CARGO_TARGET_DIR)/release/appliance
CARGO := cargo
DENY_VERSION := 0.20.2
DENY := $(CACHE)/tools/cargo/bin/cargo-deny
say = @printf '[make] %s\n' "$(1)" >&2

# The templates are mostly downloads, the services mostly compilation: side by side they share two cores well.
MAKEFLAGS += --jobs=2 --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help tools guest-init guest templates build image runner run stop console shell status test check deny units template-units appliance-tests bench fuzz clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

tools: ## install what is missing on this machine
	@image/tools

guest-init: | tools
	$(call say,guest-init: static)
	@CARGO_TARGET_DIR=$(GUEST_TARGET) RUSTFLAGS='-C target-feature=+crt-static' \
		$(CARGO) build --quiet --locked --profile guest --target x86_64-unknown-linux-gnu -p guest-init

guest: guest-init | tools ## Firecracker, guest kernel, guest initramfs
	@image/guest all $(GUEST_INIT)

templates: | tools ## the root disks that sandboxes start from
	@templates/build

build: | tools ## our services, optimized
	$(call say,services: release build)
	@$(CARGO) build --quiet --release --locked -p pandastack-api -p pandastack-edge -p pandastack-vmm -p pandastack-network -p pandastack-storage \
		-p qemu-tests -p qemu-tests-inside --bins

image: tools build guest templates ## the bootable disk: $(CACHE)/image/pandastack.raw
	@image/build

run: image ## all of it, then boot; returns when the API answers
	@$(APPLIANCE) run

stop: runner ## shut the appliance down
	@$(APPLIANCE) stop

console: runner ## follow its serial console
	@$(APPLIANCE) console

shell: runner ## a root shell in it
	@$(APPLIANCE) shell

status: runner ## what runs
	@$(APPLIANCE) status

# The runner alone, when all that is wanted is to talk to an appliance that runs.
runner:
	@[ -x $(APPLIANCE) ] || $(CARGO) build --quiet --release --locked -p qemu-tests --bins

test: check units template-units appliance-tests ## everything: lints, unit and property tests, the booted appliance

check: deny | tools
	$(call say,format and lints)
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --quiet --locked --workspace --all-targets -- -D warnings

# The advisory database is not reachable from everywhere; the run says whether it was.
deny: $(DENY)
	$(call say,what is built in: bans licenses and sources)
	@$(DENY) --log-level error check bans licenses sources
	@if timeout 60 $(DENY) fetch db >/dev/null 2>&1; then $(DENY) --log-level error check advisories; \
		else printf '[make] advisories: not checked, the database cannot be reached from here\n' >&2; fi

$(DENY):
	$(call say,cargo-deny $(DENY_VERSION): once)
	@CARGO_TARGET_DIR=$(CACHE)/target-tools $(CARGO) install --quiet --locked --root $(CACHE)/tools/cargo cargo-deny@$(DENY_VERSION)
	@rm -rf $(CACHE)/target-tools

units: check
	$(call say,unit and property tests)
	@$(CARGO) test --quiet --locked --workspace

# They wait more than they work: beside the other units, once the image is there.
template-units: image
	$(call say,the kernels of code-interpreter)
	@templates/test_kernels.py
	$(call say,the builder of templates)
	@templates/test_builder.py

appliance-tests: units template-units image
	$(call say,the booted appliance)
	@$(CARGO) test --quiet --release --locked -p qemu-tests --test appliance

bench: image ## the table of docs/benchmarks.md, also in .run/bench.json
	@$(APPLIANCE) bench

fuzz: image ## strangers' bytes: guest protocol, edge, JSON bodies, MINUTES=10 of each, then the booted API
	$(call say,fuzz targets: with coverage)
	@CARGO_TARGET_DIR=$(FUZZ_TARGET) RUSTFLAGS='$(SANCOV)' $(CARGO) build --quiet --locked --profile fuzz \
		--target x86_64-unknown-linux-gnu -p qemu-tests-fuzz --features coverage --bin fuzz
	@$(APPLIANCE) fuzz $(FUZZ) --minutes $(MINUTES)

clean: ## remove what was built; downloads, package caches and .run stay
	rm -rf $(CARGO_TARGET_DIR) $(GUEST_TARGET) $(FUZZ_TARGET) $(CACHE)/image $(CACHE)/mkosi/image $(CACHE)/vm
