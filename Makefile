# Every target sets itself up: a fresh machine needs python3 (3.11 to 3.13) with venv, and make.
PYTHON ?= python3
PYTHON313 ?= python3.13
BIN := .venv/bin
READY := .venv/.kernel
SECONDS ?= 600
# the oldest that jaxlib's own wheels run on
GLIBC := 2.27
BIN_PATH := $(CURDIR)/$(BIN)
# four share two cores, because a test often waits; each takes a GB of memory
WORKERS ?= 4
# the commands and swarms come first, because they take longest
PARALLEL := -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
PYTEST := $(BIN)/python $(PARALLEL)
# XLA reads its flags once a process: tests of what it makes for users are a second run
SUITE = status=0; $(1) --quick-compilation || status=$$?; \
	$(1) -m '(optimized or fused) and not slow' tests/integration/inference tests/unit/model || status=$$?; \
	exit $$status
# A lock is complete: pip installs its pins and asks no index for other releases.
LOCKED := -m pip install --quiet --no-deps --require-hashes --requirement
COMPILE := $(BIN)/uv pip compile --quiet --universal --upgrade --generate-hashes \
	--no-strip-extras --no-annotate --no-header --python-version

# the suite starts hundreds of processes: without kept bytecode, each would compile grokctl again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-slow test-newest test-engines schedulers browser clients soak fuzz check fix bench rehearsal streaming gpu-forms miniature picture lock install wheels sanitize clean

demo: $(READY)  ## the whole pipeline, for real, on a miniature
	$(BIN)/grokctl demo

test: $(READY)  ## the test suite, by WORKERS at a time; a module stays with one of them
	$(call SUITE,$(PYTEST))

test-fast: $(READY)  ## the unit tests that take no long compilation, in a minute or two
	$(PYTEST) -m 'not slow and not heavy' tests/unit
	@echo 'Left out: tests/cli, tests/integration, tests/fuzz, tests/*.py, and unit tests marked "heavy". All: make test.'

test-slow: $(READY)  ## the tests that take minutes and gigabytes
	$(BIN)/python -m pytest -m slow

test-engines: .venv/.engines  ## llama.cpp and transformers on exports: logits, tokens, mutants
	$(BIN)/python -m pytest -m engines tests/engines

test-newest: .venv-newest/.ready  ## the suite on the newest Python and JAX, where PYTHON313 is there
	$(call SUITE,.venv-newest/bin/python $(PARALLEL))

schedulers:  ## Open MPI and Slurm, for the tests that run under them: Debian's packages, so for root
	@command -v mpirun >/dev/null && command -v srun >/dev/null || \
		{ timeout 300 apt-get update --quiet --quiet && DEBIAN_FRONTEND=noninteractive timeout 300 \
		apt-get install --yes --quiet --quiet --no-install-recommends \
		openmpi-bin slurmctld slurmd slurm-client; }

browser: .venv/.browser  ## the page of a server in a headless Chromium: Debian's packages, so for root
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ timeout 300 apt-get update --quiet --quiet && DEBIAN_FRONTEND=noninteractive timeout 300 \
		apt-get install --yes --quiet --quiet --no-install-recommends chromium chromium-driver; }
	$(BIN)/python -m pytest -m slow tests/browser

clients: $(READY) .venv-clients/.ready  ## lm-evaluation-harness against a server
	$(BIN)/python -m pytest -m slow tests/integration/serving/test_harness.py

soak: $(READY)  ## a server under load for SECONDS: clients that leave, and strangers' requests
	GROKCTL_SOAK_SECONDS=$(SECONDS) $(BIN)/python -m pytest -m slow tests/cli/test_serve_soak.py

fuzz: .venv/.fuzz  ## strangers' bytes into every reader, guided by coverage; SECONDS for all together
	PYTHONPATH=tests/support nice -n 19 $(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS)

check: $(READY)  ## formatting, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: $(READY)  ## format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.bench  ## every benchmark: a table and a ratio to a peer or a limit each
	@for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

rehearsal: $(READY)  ## every command on 318 GB of holes: times and memory in docs/rehearsal.md
	$(BIN)/python benchmarks/rehearsal.py --write docs/rehearsal.md

streaming: $(READY)  ## four full-width layers in memory cgroups of 6, 10 and 16 GB: 40 GB of disk, as root
	$(BIN)/python benchmarks/stream.py

gpu-forms: .venv-gpu/.ready  ## decode and prefill compiled for absent H100s: launches, host waits, copies, registers
	PYTHONPATH=. .venv-gpu/bin/python benchmarks/gpu_forms.py --compile

miniature: .venv/.miniature  ## train the miniature that ships, again: an hour of two cores; continues what was stopped
	PYTHONPATH=benchmarks $(BIN)/python -m training.train --work build/miniature
	PYTHONPATH=benchmarks $(BIN)/python -m training.publish --work build/miniature --out build/miniature
	PYTHONPATH=benchmarks $(BIN)/python -m training.measure --work build/miniature --release build/miniature/miniature

picture: $(READY)  ## docs/*.svg from a real terminal; needs tmux
	$(BIN)/python docs/picture.py

lock: .venv/.uv  ## pins with hashes for every platform, and no addresses
	$(COMPILE) 3.11 --group dev pyproject.toml --output-file requirements.lock
	$(COMPILE) 3.12 --group gpu pyproject.toml --output-file requirements-gpu.lock
	for group in bench browser clients engines fuzz miniature uv wheels; do $(COMPILE) 3.11 --group $$group --constraint requirements.lock \
		--output-file requirements-$$group.lock || exit 1; done
	for python in 3.11 3.12 3.13; do \
		for platform in x86_64-manylinux_2_28 aarch64-manylinux_2_28 aarch64-apple-darwin; do \
		MACOSX_DEPLOYMENT_TARGET=14.0 $(BIN)/uv pip install --quiet --no-deps --require-hashes --only-binary :all: \
		--dry-run --target .venv/wheels --python-version $$python --python-platform $$platform \
		--requirement requirements.lock || exit 1; done; done

install: $(READY)  ## only the environment: .venv/bin/grokctl

# what is compiled of the C++ files; where there is no compiler, the program does without
$(READY): .venv/.ready grokctl/native/sources.py $(wildcard grokctl/native/src/*)
	$(BIN)/python -m grokctl.native
	@touch $@

.venv-newest/.ready: override PYTHON = $(PYTHON313)
.venv/.ready .venv-newest/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(if $(filter %.lock,$?),--clear) $(@D)
	$(@D)/bin/python $(LOCKED) $<
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(@D)/bin/python -m pip check
	@touch $@

# grokctl itself is not installed in it: its own JAX is another
.venv-gpu/.ready: requirements-gpu.lock
	$(PYTHON313) -m venv --clear $(@D)
	$(@D)/bin/python $(LOCKED) $<
	$(@D)/bin/python -m pip check
	@touch $@

.venv-clients/.ready: requirements-clients.lock
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python $(LOCKED) $<
	$(@D)/bin/python -m pip check
	@touch $@

# a dependency group that only one target needs, on top of the rest
.venv/.%: requirements-%.lock $(READY)
	$(BIN)/python $(LOCKED) $<
	$(BIN)/python -m pip check
	@touch $@

wheels: .venv/.wheels  ## wheels with the kernel, for Linux on x86-64 and aarch64, in dist
	for architecture in x86_64 aarch64; do \
		rm -rf build/$$architecture && mkdir -p build/$$architecture dist && \
		$(BIN)/python -m grokctl.native --architecture $$architecture --into build/$$architecture \
			--compiler "$(BIN_PATH)/python -m ziglang c++ -target $$architecture-linux-gnu.$(GLIBC)" && \
		GROKCTL_WHEEL=build/$$architecture:manylinux_$(subst .,_,$(GLIBC))_$$architecture \
			$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . || exit 1; done
	@ls dist

sanitize: $(READY)  ## the kernel's tests under AddressSanitizer and UBSan; needs g++
	rm -rf build/sanitized && mkdir -p build/sanitized
	$(BIN)/python -m grokctl.native --into build/sanitized --compiler g++ \
		--flags "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 GROKCTL_CPU_KERNEL="$$(echo build/sanitized/*.so)" \
		$(BIN)/python -m pytest tests/unit/native tests/unit/model/test_cpu_kernel.py

clean:  ## forget the environment and the tools' caches
	rm -rf .venv .venv-newest .venv-gpu .venv-clients .pytest_cache .mypy_cache .ruff_cache .hypothesis
