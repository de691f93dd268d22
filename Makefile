# The README's two commands, make demo and make test, and make check between two edits.
# All set up what they need; PYTHON has to be 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo check test lint

demo: $(STAMP)
	@echo "Classifying the photographs of examples/photos with resnet20_conam.cifar10; the picture goes to demo.png."
	$(BIN)/conam predict resnet20_conam.cifar10 examples/photos/*.jpg --output demo.png

# All but the tests marked slow: under 90 seconds on two cores.
check: lint
	$(BIN)/python -m pytest -m "not slow"

test: lint
	$(BIN)/python -m pytest
	$(BIN)/python tests/timm_suite/run.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "conam_zoo needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Installing conam_zoo with PyTorch and what the tests need into $(VENV), several GB, once: pip shows how far it is."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)
