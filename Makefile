# Tollgate. `make help` lists the targets.

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
UNITDIR ?= /etc/systemd/system
DESTDIR ?=
CARGO ?= cargo
FUZZ_SECONDS ?= 30

# Pingora links zlib-ng and zstd, which are built with cmake and a C compiler.
BUILD_PACKAGES = cmake gcc libc6-dev make
TEST_PACKAGES = chromium curl logrotate nodejs npm openssl postgresql prometheus python3-venv redis-server
BENCH_PACKAGES = binutils haproxy nginx-light wrk

.PHONY: help demo build test unit lint clients bench chaos endurance soak fuzz install uninstall deps test-deps clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: deps ## build, then run a proxy with simulated LLM backends (PORT=N for another port)
	$(CARGO) run -- demo $(if $(PORT),--port $(PORT))

build: deps ## build the optimised program, target/release/tollgate
	$(CARGO) build --release --locked

test: deps test-deps lint unit ## lint, then run all tests; installs what they need

unit: clients
	$(CARGO) test --locked
	$(CARGO) test --locked --test stress -- streams
	$(CARGO) test --locked --test stress -- limits

lint: deps
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	$(CARGO) fetch --locked --quiet
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny --offline check licenses bans sources; \
	else echo "cargo-deny is not installed: licences and sources are not checked"; fi

clients: .venv/installed .node/installed

.venv/installed: tests/clients/requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	touch $@

.node/installed: tests/clients/package.json
	mkdir -p .node
	cp tests/clients/package.json .node/
	cd .node && npm install --no-package-lock --no-audit --no-fund --loglevel=error
	touch $@

bench: deps ## compare with nginx, HAProxy and bare Pingora; time steps, start, reload (CASES="small tls": some of it)
	@sh .ci/packages $(BENCH_PACKAGES)
	$(CARGO) bench --locked --bench compare -- $(CASES)
	$(if $(CASES),,$(CARGO) bench --locked --bench operate --bench steps --bench hooks --bench scanner --bench keys)

chaos: deps ## load for two minutes while backends fail, configurations change and the program is upgraded
	$(CARGO) test --locked --test stress -- chaos

endurance: deps ## streams through reload and upgrade, hostile crowds, memory after a million requests
	$(CARGO) test --locked --release --test stress -- endurance

soak: deps ## half an hour of everyday load: memory and descriptors stay where they are (SOAK_SECONDS)
	$(CARGO) test --locked --release --test stress -- soak

fuzz: deps ## give every parser garbage, FUZZ_SECONDS each (30)
	@rustup toolchain list | grep -q nightly || rustup toolchain install nightly --profile minimal
	@command -v cargo-fuzz >/dev/null || $(CARGO) install --locked cargo-fuzz
	@mkdir -p fuzz/corpus/configuration fuzz/corpus/routing fuzz/corpus/headers fuzz/corpus/streams fuzz/corpus/bodies
	for target in bodies configuration routing headers streams; do \
	  seeds=$$(test $$target = configuration && echo conf tests/data/broken); \
	  cargo +nightly fuzz run --sanitizer none $$target fuzz/corpus/$$target $$seeds -- \
	    -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -timeout=10 -rss_limit_mb=2048 || exit 1; \
	done

install: ## after build: install program, unit and configuration (as root; DESTDIR and PREFIX count)
	@test -x target/release/tollgate || { echo "run \"make build\" first"; exit 1; }
	install -D -m 755 target/release/tollgate $(DESTDIR)$(PREFIX)/bin/tollgate
	strip --strip-debug $(DESTDIR)$(PREFIX)/bin/tollgate
	install -d -m 755 $(DESTDIR)$(UNITDIR)
	sed 's|/usr/local/bin|$(PREFIX)/bin|g' systemd/tollgate.service > $(DESTDIR)$(UNITDIR)/tollgate.service
	test -e $(DESTDIR)$(SYSCONFDIR)/tollgate/tollgate.yaml || \
	  install -D -m 640 conf/minimal.yaml $(DESTDIR)$(SYSCONFDIR)/tollgate/tollgate.yaml
	install -D -m 644 conf/example.yaml $(DESTDIR)$(SYSCONFDIR)/tollgate/example.yaml
	@if [ -z "$(DESTDIR)" ]; then sh systemd/create-user.sh; fi
	@echo "Edit $(SYSCONFDIR)/tollgate/tollgate.yaml, then: systemctl daemon-reload && systemctl enable --now tollgate"

uninstall: ## remove program and unit; the configuration stays
	rm -f $(DESTDIR)$(PREFIX)/bin/tollgate $(DESTDIR)$(UNITDIR)/tollgate.service

# Installs what is missing where it may, and says what to install where it may not.
deps:
	@sh .ci/packages $(BUILD_PACKAGES)

test-deps:
	@sh .ci/packages $(TEST_PACKAGES)

clean: ## remove what was built
	$(CARGO) clean
	rm -rf .venv .node
