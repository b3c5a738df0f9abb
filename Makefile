# make qat: set up and run the main job. make test: set up and test.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/270m
CONFIG ?= experiments/configs/gemma3_270m_cpu.py

.PHONY: qat test lint clean

qat: $(VENV)/.installed
	$(VENV)/bin/gemma-qat run --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(VENV)/.installed-test lint
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed-test
	$(VENV)/bin/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: setup.cfg constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV)
