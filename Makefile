# Every target makes its environment (.venv) when it is missing or when pyproject.toml has changed.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint bench javascript debian clean

VENV := .venv
BIN := $(VENV)/bin
# Stamps of what the demo needs, and of what tests need beside it.
READY := $(VENV)/.ready
STAMP := $(VENV)/.installed
# What of the package a reader of the README gets; the rest comes with the tests, or by name (phoneready[eval]).
EXTRAS := gguf,onnx,recover,report
# A Python to use instead of the one that is found.
PYTHON ?=
# Where the demo's release goes.
DEMO ?= demo-release
# Two processes of tests, of one thread each: most of a test is one, and threads beyond the cores wait for each other.
PYTEST_ARGS ?= -n 2 --dist worksteal
PYTEST = OMP_NUM_THREADS=1 PHONEREADY_COUNT_SKIPS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Each of many processes would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make demo    prune, export, prove and measure the built-in model; the report is $(DEMO)/report.html"
	@echo "make test    lint, types and the tests that need no more than Python and ssh"
	@echo "make test-all    lint, types and all tests: compilers, emulators, browsers, Node.js, packaging, other releases of libraries"
	@echo "make lint    ruff and mypy"
	@echo "make javascript   packages that the tests of JavaScript consumers need (make test-all does it)"
	@echo "make debian  Debian's packages for the tests of browsers and devices, where root may install them (make test-all does it)"
	@echo "make bench   measure the demo's files, dense and pruned in turns"
	@echo "make clean   remove the environment, the demo and what the tools left"

demo: $(READY)
	@$(BIN)/phoneready release -o "$(DEMO)"

test: DEBIAN := ssh=openssh-client
test: DAEMONS := sshd=openssh-server
test: lint debian
	@$(PYTEST) -m 'not everything'

test-all: lint javascript debian
	@$(PYTEST)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# What the tests of JavaScript consumers and of the Kotlin example need; without Node.js these tests are skipped.
javascript: tests/javascript/node_modules/.installed

tests/javascript/node_modules/.installed: tests/javascript/package.json
	@if command -v npm >/dev/null; then \
		npm install --prefix tests/javascript --ignore-scripts --no-audit --no-fund --no-package-lock --loglevel=error \
			>/dev/null && touch $@ || echo "npm cannot install; tests of JavaScript consumers are skipped" >&2; \
	else echo "no npm; tests of JavaScript consumers are skipped" >&2; fi

# What tests need of Debian: commands, any of which will do, and the package that brings one. Tests whose commands are
# missing are skipped.
DEBIAN := \
	chromium,google-chrome=chromium \
	groovy=groovy \
	javac=default-jdk-headless \
	cmake=cmake \
	qemu-aarch64=qemu-user \
	aarch64-linux-gnu-g++=g++-aarch64-linux-gnu \
	ssh=openssh-client \
	adb=adb
# Their packages start them, open to the network, where there is a systemd to do it: there they are left out.
DAEMONS := \
	sshd=openssh-server \
	adbd=adbd

debian:
	@missing=(); rows="$(DEBIAN)"; \
	test -d /run/systemd/system || rows+=" $(DAEMONS)"; \
	for row in $$rows; do \
		commands="$${row%%=*}"; command -v $${commands//,/ } >/dev/null || missing+=("$${row#*=}"); \
	done; \
	(( $${#missing[@]} == 0 )) && exit; \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then apt-get update -qq >/dev/null 2>&1 || true; fi; \
	for package in "$${missing[@]}"; do \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$$package" >/dev/null 2>&1 || \
			echo "cannot install $$package; the tests that need it are skipped" >&2; \
	done

bench: demo
	@$(BIN)/phoneready bench "$(DEMO)"/*.gguf

clean:
	rm -rf $(VENV) dist build "$(DEMO)" .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/javascript/node_modules
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp is written last: an interrupted installation is taken up again. Python compiles what it imports; to compile all
# packages beforehand takes 40 seconds of a core.
$(READY): pyproject.toml tools/llama_wheel.py
	@python="$$(tools/find_python.sh $(PYTHON))"; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "making $(VENV) with $$python" >&2; \
		"$$python" -m venv --clear $(VENV); \
	fi
	@$(BIN)/python -m pip install --quiet packaging
	@$(BIN)/python tools/llama_wheel.py
	@echo "installing phoneready and what it needs into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'
	@touch $@

$(STAMP): $(READY)
	@echo "installing what the tests need" >&2
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	@touch $@
