# Everything a fresh machine needs is done here: Python 3.10 or newer and a package index are enough.
# Another torch for a new environment:   make test TORCH="torch==2.14.0"      Another Python:   make test PYTHON=python3.12
PYTHON  ?= python3
# torch is installed first and by itself, so that no other package chooses its build.
TORCH   ?= torch==2.13.0
# pytest's processes; each computes on one thread (OMP_NUM_THREADS below), which is faster than sharing tiny models.
WORKERS ?= 2
# more arguments for pytest:   make test ARGS="-k window"
ARGS    ?=

VENV := .venv
RUN  := $(VENV)/bin/python
# The variable silences an announcement of mkdocs-material that is no warning about the site.
MKDOCS := CUDA_VISIBLE_DEVICES= NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-gpu test-second check docs bench clean

help:  ## say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.installed-demo  ## linearize and distil a small real model, compare it with its teacher, save it
	$(RUN) examples/demo.py

test: $(VENV)/.installed-test  ## all tests that need no GPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) $(ARGS)

test-gpu: $(VENV)/.installed-test  ## only the tests that need a CUDA device; without one it fails
	@$(RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  f"make test-gpu needs a CUDA device, and torch {torch.__version__} finds none here")'
	$(RUN) -m pytest -m gpu $(ARGS)

test-second: $(VENV)-second/.installed  ## a second environment: the laws on the oldest transformers, Triton in its interpreter
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)-second/bin/python -m pytest -n $(WORKERS) \
	  tests/adapters tests/hub tests/mixers tests/kernels/test_triton.py tests/kernels/test_launching.py \
	  tests/kernels/test_step_forms.py tests/kernels/test_tiles.py tests/kernels/test_machine_code.py $(ARGS)

check: $(VENV)/.installed-dev  ## format, lint, types, and the documentation: its snippets and its site
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_docs.py
	$(MKDOCS)

docs: $(VENV)/.installed-docs  ## build the documentation's site into site/; any warning is an error
	$(MKDOCS)

bench: $(VENV)/.installed-test  ## run every benchmark: each verifies its result, then times it
	@ls benchmarks/bench_*.py > /dev/null
	set -e; for file in benchmarks/bench_*.py; do $(RUN) $$file; done

clean:  ## remove builds and caches of the tools; the environment, models and results stay
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# One stamp per set of extras; it is older than pyproject.toml when there may be something to install.
$(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	  f"lizardzoo needs Python 3.10 or newer, $(PYTHON) is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check "$(TORCH)"
	$(RUN) -m pip install --disable-pip-version-check -e ".[$*]"
	@touch $@
.PRECIOUS: $(VENV)/.installed-%

# The lower bound of transformers that pyproject.toml names, read from there.
$(VENV)-second/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-second
	$(VENV)-second/bin/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(VENV)-second/bin/python -m pip install --disable-pip-version-check -e ".[test,triton]" \
	  "$$(grep -oE 'transformers>=[0-9.]+' pyproject.toml | head -1 | sed 's/>=/==/')"
	@touch $@
