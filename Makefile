# Two commands for a fresh machine with Python 3.11+ and make:
#   make quickstart   environment, install, train on real handwritten digits, evaluate, show the result
#   make test         environment, install, the whole test suite
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/siglip_digits

.PHONY: quickstart test lint clean

quickstart: $(VENV)/installed
	$(RUN) train.py --config configs/siglip_digits.py --workdir $(WORKDIR)
	$(RUN) eval.py --workdir $(WORKDIR)

test: $(VENV)/installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2 --durations=20

lint: $(VENV)/installed-test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"flax_vlm needs Python 3.11 or newer, got {sys.version}; set PYTHON=/path/to/python3.11"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.py | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: setup.py | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) runs
