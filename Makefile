# Every target makes its environment (.venv) when it is missing or when pyproject.toml has changed.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench javascript chromium clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A Python to use instead of the one that is found.
PYTHON ?=
# Where the demo's release goes.
DEMO ?= demo-release
PYTEST_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@echo "make demo    prune, export, prove and measure the built-in model; the report is $(DEMO)/report.md"
	@echo "make test    lint, types and all tests"
	@echo "make lint    ruff and mypy"
	@echo "make javascript   packages that the tests of JavaScript consumers need (make test does it)"
	@echo "make chromium     Debian's Chromium for the tests in a page, where root may install it (make test does it)"
	@echo "make bench   measure the demo's files, dense and pruned in turns"
	@echo "make clean   remove the environment, the demo and what the tools left"

demo: $(STAMP)
	@$(BIN)/phoneready release -o "$(DEMO)"

test: lint javascript chromium
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# What the tests of JavaScript consumers need; without Node.js these tests are skipped.
javascript: tests/javascript/node_modules/.installed

tests/javascript/node_modules/.installed: tests/javascript/package.json
	@if command -v npm >/dev/null; then \
		npm install --prefix tests/javascript --ignore-scripts --no-audit --no-fund --no-package-lock --loglevel=error \
			>/dev/null && touch $@ || echo "npm cannot install; tests of JavaScript consumers are skipped" >&2; \
	else echo "no npm; tests of JavaScript consumers are skipped" >&2; fi

# What the tests in a page need; without it these tests are skipped.
chromium:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
			{ apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null 2>&1 || \
			echo "no Chromium, and it cannot be installed; tests in a page are skipped" >&2; \
	}

bench: demo
	@$(BIN)/phoneready bench "$(DEMO)"/*.gguf

clean:
	rm -rf $(VENV) dist build "$(DEMO)" .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/javascript/node_modules
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is taken up again.
$(STAMP): pyproject.toml tools/llama_wheel.py
	@python="$$(tools/find_python.sh $(PYTHON))"; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "making $(VENV) with $$python" >&2; \
		"$$python" -m venv --clear $(VENV); \
	fi
	@$(BIN)/python -m pip install --quiet packaging
	@$(BIN)/python tools/llama_wheel.py
	@echo "installing phoneready and what it needs into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
