# `make` alone lists what there is. Everything sets itself up in .venv from requirements/lock.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEEL_SITE := build/wheel-site
PARALLEL ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick lint format bench docs docs-check lock clean browser

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed ## Make .venv with everything that the tests need

$(VENV)/.installed: pyproject.toml requirements/lock.txt requirements/extra.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements/lock.txt --editable '.[all,dev,torch]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/extra.txt
	touch $@

browser:
# The report's test drives a real Chromium; only CI installs one by itself.
	@if [ -n "$$CI" ] && ! command -v chromedriver >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  (apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null) \
	  || echo "no Chromium to be had: the report's browser test will skip"; fi

demo: setup ## Compile a real model for every family of target and compare them all
	$(BIN)/python examples/demo.py demo-out

test: lint browser $(WHEEL_SITE)/.installed ## Run linters, then every test against the built wheel
	PYTHONPATH=$(WHEEL_SITE) TRIVIUM_EXPECT_SITE=$(WHEEL_SITE) \
	  $(BIN)/python -m pytest --numprocesses $(PARALLEL) --dist loadgroup

test-quick: setup ## Run the tests that are not slow, against the source tree
	$(BIN)/python -m pytest --numprocesses $(PARALLEL) -m "not slow"

SOURCES := $(shell git ls-files 'src/*' 'backends/*' 'compiler/*' 'models/*' 'passes/*' 'targets/*')
$(WHEEL_SITE)/.installed: $(VENV)/.installed $(SOURCES)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	$(BIN)/python -m pip install --quiet --no-deps --target $(WHEEL_SITE) dist/*.whl
	touch $@

lint: setup ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Measure, and run ONNX's whole operator suite; results go to docs/
	$(BIN)/python benchmarks/conformance.py --jobs $(PARALLEL) --write
	$(BIN)/python -m benchmarks

docs: setup ## Generate docs/support.md and the other generated pages
	$(BIN)/python docs/generate.py

docs-check: setup ## Check links, and that the generated pages are what the code generates
	$(BIN)/python docs/generate.py --check

lock: ## Renew requirements/lock.txt from a fresh environment
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[all,dev,torch]'
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements/lock.txt

clean: ## Remove what was built (not .venv)
	rm -rf build dist demo-out
