# Every command of the project. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := torch==2.13.0
UV := uv==0.13.9
# The peers resolve beside our pins, but pandas stores strings with pyarrow and open_clip imports transformers
# wherever these are installed: in .venv they would change what the book runs on.
BENCH := .bench-venv

# Big tensors otherwise go back to the system at every step, and page faults slow training 1.5-2x.
export GLIBC_TUNABLES ?= glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:glibc.malloc.hugetlb=1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where Python may not keep what it compiled, every start of every process compiles 3,000 modules: 6 s.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help book test lab bench gpu soak clip prompts saes full lock clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

book: $(INSTALLED) ## Execute the notebooks, render the book, print the page to open
	$(BIN)/python book/build.py

test: $(INSTALLED) ## Run every test; the browser tests use /usr/bin/chromium where it is installed
	$(BIN)/python -m pytest tests

lab: $(INSTALLED) ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

bench: $(BENCH)/.installed ## Install the peers in .bench-venv, measure, write benchmarks/results.json
	$(BENCH)/bin/python benchmarks/run.py

gpu: $(BENCH)/.installed ## Check the kernels and measure beside the peers on a GPU; write benchmarks/gpu-CARD.json
	$(BENCH)/bin/pip install --quiet -c requirements.lock pytest
	$(BENCH)/bin/python benchmarks/gpu.py

soak: $(INSTALLED) ## Attack everything that is read and written, at full numbers; write benchmarks/soak.json
	$(BIN)/python tests/reliability/soak.py

clip: $(INSTALLED) ## Train the small CLIP of artefacts/small_clip again, or go on where it stopped
	$(BIN)/python artefacts/small_clip/train.py

prompts: $(INSTALLED) ## Learn the prompts of artefacts/prompts again where they are missing
	$(BIN)/python artefacts/prompts/train.py
	$(BIN)/python artefacts/prompts/train.py --method coop
	$(BIN)/python artefacts/prompts/train.py --method vpt
	$(BIN)/python artefacts/prompts/train.py --method lora
	$(BIN)/python artefacts/prompts/train.py --method full

saes: $(INSTALLED) ## Train the autoencoders of artefacts/sae again where they are missing or do not fit
	$(BIN)/python artefacts/sae/train.py

full: $(INSTALLED) ## Train everything that is shipped again, from nothing, and make the book of that
	rm -rf results/small_clip artefacts/prompts/*/
	$(MAKE) clip
	$(MAKE) prompts
	$(BIN)/python artefacts/sae/train.py --force
	$(MAKE) book

lock: ## Resolve the newest indirect dependencies and write requirements.lock
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet $(TORCH)
	.lock-venv/bin/pip install --quiet -e '.[book,test]'
	.lock-venv/bin/pip check
	@# A GPU machine's torch brings nvidia, cuda and triton packages of its own choice.
	.lock-venv/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' \
	  | grep -viE '^(nvidia|cuda|triton|setuptools)' > .lock-venv/lock
	mv .lock-venv/lock requirements.lock
	@# The peers bring what the book does not have: a list of its own, on top of the first.
	.lock-venv/bin/pip install --quiet -c requirements.lock -e '.[bench]'
	.lock-venv/bin/pip check
	.lock-venv/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' \
	  | grep -viE '^(nvidia|cuda|triton|setuptools)' | grep -vxFf requirements.lock > .lock-venv/lock
	mv .lock-venv/lock benchmarks/requirements.lock
	.lock-venv/bin/pip uninstall --quiet --yes $$(sed 's/==.*//' benchmarks/requirements.lock)
	.lock-venv/bin/pip install --quiet -c requirements.lock -e '.[cluster]'
	.lock-venv/bin/pip check
	.lock-venv/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' \
	  | grep -viE '^(nvidia|cuda|triton|setuptools)' | grep -vxFf requirements.lock > .lock-venv/lock
	mv .lock-venv/lock workflow/requirements.lock
	rm -rf .lock-venv

clean: ## Remove everything made here, the environment and all results included
	rm -rf $(VENV) .lock-venv $(BENCH) _build results book/notebooks book/_static/vendor book/_static/explorer
	rm -rf .pytest_cache .ruff_cache .hypothesis lib/*.egg-info
	find lib tests book benchmarks artefacts -name __pycache__ -prune -exec rm -rf {} +

$(BENCH)/.installed: pyproject.toml requirements.lock benchmarks/requirements.lock
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet $(TORCH)
	$(BENCH)/bin/pip install --quiet -c requirements.lock -c benchmarks/requirements.lock -e '.[bench]'
	$(BENCH)/bin/pip check
	@touch $@

# torch goes first and alone: the version asked for by name is the one taken, on a CPU or a GPU machine.
$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { echo \
	  "PatchSAE needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is not: name one, as in make PYTHON=python3.11 book."; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	@# uv installs the rest in a tenth of pip's time. It does not look everywhere pip does, so pip brought torch.
	$(BIN)/pip install --quiet $(UV) \
	  && $(BIN)/uv pip install --quiet --python $(BIN)/python -c requirements.lock -e '.[book,test]' \
	  || $(BIN)/pip install --quiet -c requirements.lock -e '.[book,test]'
	$(BIN)/pip check
	@touch $@
