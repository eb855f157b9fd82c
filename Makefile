# Every target sets itself up: a fresh machine needs python3 (3.11 to 3.13) with venv, and make.
PYTHON ?= python3
PYTHON313 ?= python3.13
BIN := .venv/bin
READY := .venv/.ready
SECONDS ?= 600

.PHONY: demo test test-slow test-newest schedulers fuzz check fix bench rehearsal picture lock install clean

demo: $(READY)  ## the whole pipeline, for real, on a miniature
	$(BIN)/grokctl demo

test: $(READY)  ## the test suite
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the tests that take minutes and gigabytes
	$(BIN)/python -m pytest -m slow

test-newest:  ## the suite on the newest Python and JAX, where PYTHON313 is there
	$(PYTHON313) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --require-hashes --requirement requirements.lock
	.venv-newest/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	.venv-newest/bin/python -m pytest

schedulers:  ## Open MPI and Slurm, for the tests that run under them: Debian's packages, so for root
	@command -v mpirun >/dev/null && command -v srun >/dev/null || \
		{ timeout 300 apt-get update --quiet --quiet && DEBIAN_FRONTEND=noninteractive timeout 300 \
		apt-get install --yes --quiet --quiet --no-install-recommends \
		openmpi-bin slurmctld slurmd slurm-client; }

fuzz: $(READY)  ## strangers' bytes into every reader, guided by coverage; SECONDS for all together
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --group fuzz
	nice -n 19 $(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS)

check: $(READY)  ## formatting, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: $(READY)  ## format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## every benchmark: a table and a ratio to a peer or a limit each
	@for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

rehearsal: $(READY)  ## every command on 318 GB of holes: times and memory in docs/rehearsal.md
	$(BIN)/python benchmarks/rehearsal.py --write docs/rehearsal.md

picture: $(READY)  ## docs/*.svg from a real terminal; needs tmux
	$(BIN)/python docs/picture.py

lock: $(READY)  ## pins with hashes for every platform, and no addresses
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate \
		--no-header --upgrade --group dev pyproject.toml --output-file requirements.lock

install: $(READY)  ## only the environment: .venv/bin/grokctl

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean:  ## forget the environment and the tools' caches
	rm -rf .venv .venv-newest .pytest_cache .mypy_cache .ruff_cache .hypothesis
