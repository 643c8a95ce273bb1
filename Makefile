# Everything a user or a developer types. `make` alone lists it.

PYTHON ?= python3
VENV = .venv
IN_VENV = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo serve client test tox lint fuzz load soak bench zipapp clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## run server and client on a free port and show what both say
	@$(PYTHON) tools/demo.py

serve: ## run the server on the address in server.info
	@$(PYTHON) -m backup serve

client: ## run the seven-step sequence against the server in server.info
	@$(PYTHON) -m backup client

test: $(VENV)/ready ## make .venv with pytest and run the tests
	@$(IN_VENV)/python -m pytest

tox: $(VENV)/tox-ready ## run the tests on every Python here, and lint, types and coverage
	@$(IN_VENV)/tox

lint: $(VENV)/tox-ready ## run the linter and the type checker
	@$(IN_VENV)/tox -e lint,types

fuzz: $(VENV)/tox-ready ## look for bytes that break it, for 60 s; OPTIONS='--seconds 600' for longer
	@$(IN_VENV)/tox -q -e fuzz -- $(OPTIONS)

load: ## run 1000 clients against the server in server.info
	@$(PYTHON) tools/load_test.py --clients 1000

soak: ## two minutes of good and bad clients, kills and a bad disk; OPTIONS='--seconds 600' passes on
	@$(PYTHON) tools/soak.py $(OPTIONS)

bench: $(VENV)/bench-ready ## measure against other servers, into docs; OPTIONS='--rounds 3' passes some on
	@$(IN_VENV)/python tools/bench.py $(OPTIONS)

zipapp: ## make dist/backup.pyz, the whole program in one file
	@rm -rf build/zipapp dist/backup.pyz
	@mkdir -p build/zipapp dist
	@cp -R backup build/zipapp/backup
	@find build/zipapp -name __pycache__ -prune -exec rm -rf {} +
	@$(PYTHON) -m zipapp build/zipapp -m backup.cli:run -p '/usr/bin/env python3' -o dist/backup.pyz
	@echo dist/backup.pyz

clean: ## remove what was built; not the store, nor what was retrieved
	@rm -rf $(VENV) .bench .tox .pytest_cache .mypy_cache .ruff_cache .coverage build dist *.egg-info
	@find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -m venv $(VENV)
	@$(IN_VENV)/python -m pip install --quiet --disable-pip-version-check 'pytest>=7'
	@touch $@

$(VENV)/tox-ready: $(VENV)/ready
	@$(IN_VENV)/python -m pip install --quiet --disable-pip-version-check 'tox>=4'
	@touch $@

$(VENV)/bench-ready: $(VENV)/ready
	@$(IN_VENV)/python -m pip install --quiet --disable-pip-version-check matplotlib pyftpdlib
	@touch $@
