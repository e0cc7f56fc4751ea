# Every target sets up .venv by itself. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench claims clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/' | expand -t 10

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "weightlab needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...")'
	@echo "Setting up .venv"
	@$(PYTHON) -m venv .venv

.venv/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing weightlab and what trials need (a few minutes the first time)"
	@$(PIP) --editable '.[trial]'
	@touch $@

.venv/.dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing weightlab and its development tools (a few minutes the first time)"
	@$(PIP) --editable '.[dev]'
	@touch $@ .venv/.demo

demo: .venv/.demo  ## The main job: a fair trial of AdamW, Muon and AuON on real text (under 5 minutes)
	@$(BIN)/weightlab trial --task docs-gpt --arms adamw,muon,auon --tune 6 --seeds 5 --engine process --out demo-out

test: .venv/.dev  ## Run the tests
	@$(BIN)/python -m pytest --numprocesses auto --quiet

lint: .venv/.dev  ## Check format, style, types and the direction of imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

format: .venv/.dev  ## Mend format and style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: .venv/.dev  ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html"

bench: .venv/.dev  ## Measure the figures in docs/benchmarks.md
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

claims: .venv/.dev  ## Re-measure every paper's claims at CPU scale
	@$(BIN)/weightlab reproduce all --scale cpu

clean:  ## Remove the environment and everything built
	@rm -rf .venv site weightlab-out demo-out weightlab.sqlite*
