# The two README commands are `make demo` and `make test`; both set up what they need, and may be run again.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEBIAN_PACKAGES := containerd runc docker-registry mmdebstrap busybox-static e2fsprogs erofs-utils fio iproute2 \
  ethtool kmod attr python3-venv ca-certificates

# What only tests need: qcow2 images to import, a Prometheus to scrape the exporter, the virtual machine of tests/vm and
# what is used in it, certificates, the sizes of the kernel's structures and the compiled form, a systemd that runs the
# units, the shells whose completion is tried, a browser and the driver of its own version.
TEST_PACKAGES := qemu-utils prometheus qemu-system-x86 sg3-utils xfsprogs openssl gcc libc6-dev python3-dev systemd zsh \
  fish chromium chromium-driver

# What only the long tests need: servers of shared databases, an iSCSI initiator and tools that tell of block events (in
# the virtual machine), Go with containerd's suite for snapshotters. Docker, which changes the host's packet filters, is
# left to its owner.
LONG_PACKAGES := postgresql mariadb-server open-iscsi blktrace trace-cmd linux-perf \
  golang-go golang-github-containerd-containerd-dev

.PHONY: help setup compiled packages test-packages long-packages peers demo test test-long newest lint docs unit pure host
.PHONY: protos benchmarks figures first-set mutants clean

help:
	@echo "make demo       set up, then measure redis cold and warm: a full pull against obdlab; one screen and a report"
	@echo "make test       set up, then lint and run the tests"
	@echo "make test-long  the tests with full counts (kills, fuzzing, real images): SHARD=name for a part, see docs/develop/long-tests.md"
	@echo "make docs       the documentation as a site: build/docs/index.html"
	@echo "make newest     the tests without devices, with the newest versions of all Python dependencies"
	@echo "make benchmarks the speed figures, as ratios"
	@echo "make figures    write the numbers of README and docs from the rows in experiments/measured"
	@echo "make first-set  measure redis, pydata and postgres by all arms over four links, and publish the rows (hours)"
	@echo "make mutants    which wrong lines the tests would not notice (hours)"
	@echo "make peers      what experiments can compare with: stargz-snapshotter (built), SOCI"
	@echo "make protos     generate obdlab/containerd/_pb from protos/"

setup: packages $(VENV)/.installed compiled

packages:
	@scripts/install-packages $(DEBIAN_PACKAGES)

test-packages:
	@scripts/install-packages $(TEST_PACKAGES)

long-packages:
	@scripts/install-packages $(LONG_PACKAGES)

# What experiments compare with, beyond what setup installs; `obdlab doctor` tells what is there.
peers:
	@scripts/install-packages stargz-snapshotter soci-snapshotter openssl pigz
	@scripts/build-stargz

$(VENV)/.installed: pyproject.toml obdlab/layers/_blocks.c
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lab,dev]'
	@touch $@

# The compiled form is built by the installation if a compiler is there; if one came later, by this.
compiled: $(VENV)/.installed
	@scripts/build-compiled $(BIN)/python

demo: setup
	$(BIN)/obdlab lab run experiments/quick.toml --report

# The compiler is one of the packages for tests: it comes before the installation, which uses it.
test: test-packages setup lint docs unit

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/nbstripout --verify --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/*.ipynb notebooks/*/*.ipynb

# Warnings are errors: a page that no table of contents names, a link to a missing page, a malformed docstring.
docs: setup
	$(BIN)/sphinx-build -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "docs: build/docs/index.html"

# Devices, mounts and containers are the whole host's: tests that use them run alone, the others on all processors.
# Both in workers of pytest-xdist: a worker that a hanging test took along is replaced (tests/guard).
HOST_TESTS := kernel or containerd or vm
PYTEST := $(BIN)/python -m pytest

# Both run, whatever becomes of the first.
unit:
	status=0; $(MAKE) pure || status=$$?; $(MAKE) host || status=$$?; exit $$status

pure:
	$(PYTEST) -n auto --dist loadfile -m "not ($(HOST_TESTS))" $(TESTS)

host:
	$(PYTEST) -n 1 -m "$(HOST_TESTS)" $(TESTS) || test $$? -eq 5

# SHARD: one of docs/develop/long-tests.md, "oldest" (whose last pass is longest ago) or "all". LIMIT: minutes for each.
test-long: setup test-packages long-packages
	$(BIN)/python -m tests.shards run $(or $(SHARD),all) $(if $(LIMIT),--limit $(LIMIT))

# To be run now and then, by a person or a timer: it changes nothing of .venv.
newest: packages
	scripts/newest $(TESTS)

# Which tests notice a wrong line: hours. The page of results is docs/develop/mutants.md.
ROOMS ?=
mutants: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lab,dev,mutants]'
	$(BIN)/python -m tests.mutants map
	$(BIN)/python -m tests.mutants run $(ROOMS)
	$(BIN)/python -m tests.mutants run --again $(ROOMS)
	$(BIN)/python -m tests.mutants report --write

benchmarks: setup
	@for script in tests/benchmarks/[a-z]*.py; do \
	  echo "== $$script"; $(BIN)/python -m tests.benchmarks.$$(basename $$script .py) || exit 1; done

# Numbers in README and docs; tests/figures/test_figures.py, which CI runs, compares them.
figures: setup
	$(BIN)/python -m tests.figures

# On a quiet machine, after `make peers`: hours. experiments/measured/first_set/README.md. SET: as SET="repeats=5".
first-set: setup
	$(BIN)/obdlab lab run experiments/first_set.toml --results experiments/measured $(foreach each,$(SET),--set '$(each)')
	$(BIN)/python -m tests.figures

protos: setup
	scripts/generate-protos $(BIN)/python

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
