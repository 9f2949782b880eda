# make demo: train, certify and report on handwritten digits.  make quick: the fast tests.  make test: all but nightly ones.
# make docs: the site, into docs/_build/html.  All install into .venv what they need.
SHELL := /bin/bash
WORKDIR ?= runs/demo
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet

.PHONY: demo quick test docs lint lock clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.lipjax
	$(PY) train.py --config=configs/digits.py --workdir=$(WORKDIR)
	$(PY) -m lipjax report $(WORKDIR)

# Compiled code is kept in .cache, so that a second run spends its time on testing.
quick test: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
quick test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
quick: $(VENV)/.lipjax-dev
	$(PY) -m pytest --numprocesses=auto --dist=loadfile -m "not slow and not nightly" $(PYTEST_ARGS)

test: $(VENV)/.lipjax-dev
	$(PY) -m pytest --numprocesses=auto --dist=loadfile $(PYTEST_ARGS)

docs: $(VENV)/.lipjax-docs
	$(PY) -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

lint: $(VENV)/.lipjax-dev
	$(PY) -m ruff check .
	$(PY) -m pyright

# Any Python from 3.11 on that can make virtual environments; PYTHON=... overrides the search.
$(VENV)/.python:
	@usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	if $(PY) -c "$$usable" 2>/dev/null; then touch $@; exit 0; fi; \
	for python in $(PYTHON) python3.14 python3.13 python3.12 python3 python3.11 python; do \
	  if "$$python" -c "$$usable" 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)."; \
	    "$$python" -m venv --clear $(VENV) && touch $@ && exit 0; \
	  fi; \
	done; \
	echo "lipjax needs Python 3.11 or later with the venv module, and found none." >&2; \
	echo "Install one (on Debian or Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
	exit 2

$(VENV)/.lipjax: $(VENV)/.python requirements.txt pyproject.toml
	@echo "Installing lipjax into $(VENV): about 1.1 GB, a minute or two."
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.lipjax-dev: $(VENV)/.lipjax requirements-dev.txt
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.lipjax-docs: $(VENV)/.lipjax requirements-docs.txt
	@$(PIP) -r requirements-docs.txt
	@touch $@

# The requirement files again, from pyproject.toml: for each Python the newest versions that serve it, by markers.
COMPILE = $(PY) -m uv pip compile pyproject.toml --universal --python-version 3.11 --fork-strategy requires-python \
  --no-header --no-annotate --no-emit-index-url --quiet
lock: $(VENV)/.lipjax
	@$(PIP) uv
	@head -n 1 requirements.txt > $(VENV)/lock && $(COMPILE) --extra train --upgrade >> $(VENV)/lock && mv $(VENV)/lock requirements.txt
	@for extra in dev docs cuda cuda12 tpu; do \
	  { head -n 2 requirements-$$extra.txt; \
	    $(COMPILE) --extra $$extra --constraints requirements.txt $$(test $$extra = dev || echo --constraints requirements-dev.txt) | grep -vxFf requirements.txt; } > $(VENV)/lock \
	  && mv $(VENV)/lock requirements-$$extra.txt || exit 1; \
	done

clean:
	rm -rf build dist docs/_build docs/api *.egg-info .pytest_cache .ruff_cache .cache
