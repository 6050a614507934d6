# Every target sets up what it needs: a .venv in this directory, shared by all of them.
#
#   make demo            the main job on 2 ranks; RANKS=4 make demo for 4
#   make test            format, lint, types, layering, tests: what CI runs
#   make bench           quick benchmarks; `make peers` first to compare with DeepSpeed and yunchang too
#   make paper           published numbers beside what the plan says of them
#   make docs            the site, in site/
#   make kernels         compile the Triton kernels for GPUs that are not here; the table that `make test` compares with

RANKS ?= 2
SECONDS ?= 3600
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.14,$(shell \
  $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)-peers
PEERS_STAMP := $(PEERS)/.installed
DOCS := $(VENV)-docs
DOCS_STAMP := $(DOCS)/.installed

PIP = $(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt

# One compute thread a rank: ranks share the cores, and torchrun would otherwise set this with a warning.
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nnodes=1 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 \
  --local-addr=127.0.0.1

.DEFAULT_GOAL := help
.PHONY: help setup demo test fuzz soak lint bench kernels paper docs peers clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(STAMP)  ## create or update .venv

$(STAMP): pyproject.toml constraints-cpu.txt
	@test -n "$(PYTHON)" || { echo "seqpar needs Python >= 3.11 with venv and ensurepip (Debian: apt install python3-venv)"; exit 1; }
	@echo "setup: $(VENV) with $$($(PYTHON) --version), PyTorch and the development tools (2 minutes with the CPU build, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call PIP,$(VENV)) -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## generate from the bundled checkpoint under every layout, checked against transformers; RANKS=2
	@$(TORCHRUN) --nproc-per-node=$(RANKS) examples/demo.py

lint: $(STAMP)  ## format, lint, types, layering
	@echo "lint: ruff, mypy --strict, import-linter"
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --strict src
	@out=$$($(BIN)/lint-imports --no-logo) || { echo "$$out"; exit 1; }

# Two workers, each with ranks of its own: tests wait a lot, for ranks that wait for each other.
test: lint  ## what CI runs: lint, then the fast tests
	@echo "test: pytest"
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not slow and not gpu'

soak: $(STAMP)  ## random histories of the loop over requests: 10,000 steps, and 1,000 on four ranks (ten minutes)
	@$(BIN)/python -m pytest -q -s tests/batching/test_master.py tests/soak

fuzz: $(STAMP)  ## public functions with random arguments, for an hour; SECONDS=60 for a minute
	@SEQPAR_FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -q tests/fuzz

bench: $(STAMP)  ## quick benchmarks on this machine (minutes); peers that are not installed are listed
	@for name in layers overlap phases wire shift csa kv decode batching simulate predict scaling pipeline paper_overlap paper_shift paper_long; do name=benchmarks/$$name.py; \
	  echo "bench: $$name"; \
	  $$( [ -x $(PEERS)/bin/python ] && echo $(PEERS)/bin/python || echo $(BIN)/python ) $$name --quick || exit 1; done

paper: $(STAMP)  ## docs/paper-results.md: every published number beside what the plan says of it
	@$(BIN)/python benchmarks/paper_results.py --json docs/results/paper-results.json --markdown docs/paper-results.md

kernels: $(STAMP)  ## docs/results/kernels.md: what every Triton kernel needs on every target; minutes, no GPU
	@echo "kernels: compiling for sm_80, sm_90, sm_100, gfx942"
	@$(BIN)/python benchmarks/compile_kernels.py

docs: $(DOCS_STAMP)  ## the site in site/, built strictly: the first warning is an error
	@echo "docs: mkdocs build --strict"
	@$(DOCS)/bin/python -m doctest docs/contract.py docs/walkthrough.py
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# The site's tools read the sources and import nothing of them, so their environment needs neither PyTorch nor .venv.
$(DOCS_STAMP): pyproject.toml constraints-cpu.txt
	@echo "docs: $(DOCS) with mkdocs-material, mkdocstrings"
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@$(call PIP,$(DOCS)) mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

peers: $(PEERS_STAMP)  ## a second environment with the libraries that the benchmarks compare with

# The peers pin versions of their own, so they get an environment on top of .venv instead of a place in it.
$(PEERS_STAMP): $(STAMP)
	@echo "peers: $(PEERS) with accelerate, DeepSpeed, yunchang, FairScale, ring-flash-attn, Megatron-Core"
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	@$(PEERS)/bin/python -c 'import pathlib, sysconfig; \
	  below = sysconfig.get_path("purelib").replace("$(PEERS)", "$(VENV)"); \
	  pathlib.Path(sysconfig.get_path("purelib"), "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")'
	@$(call PIP,$(PEERS)) setuptools wheel
	@DS_BUILD_OPS=0 $(call PIP,$(PEERS)) --no-build-isolation accelerate deepspeed yunchang fairscale ring-flash-attn
	@$(call PIP,$(PEERS)) megatron-core
	@touch $@

clean:  ## remove caches; the environments stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@find . -path './.venv*' -prune -o -name __pycache__ -print | xargs rm -rf
