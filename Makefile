# make demo    a first success on a CPU: builds a tiny model and data, fine-tunes, evaluates
# make test    all tests
PYTHON ?= python3
VENV ?= .venv
STRATEGY ?= full
DEMO_DIR ?= demo_output

.PHONY: demo test

# Installs again when a pin changes.
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python demo.py $(DEMO_DIR) --strategy $(STRATEGY)

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest
