# `make demo` runs the main job, `make test` the tests, `make check` everything a change has to pass.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test slow check docs format peers gpu clean

demo: .venv/user
	$(BIN)/puma demo --out demo

test: .venv/dev
	$(BIN)/pytest --numprocesses 2

# Every command that resumes, killed at random moments: minutes, or hours with PUMA_KILLS=100.
slow: .venv/dev
	$(BIN)/pytest -m slow -s

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2

# The documentation site, in build/site; a broken link or reference is an error.
docs: .venv/dev
	$(BIN)/mkdocs build --strict --quiet

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What benchmarks/margins.py compares with. adv-lib and torchattacks without what they ask for (an old requests,
# torchvision, visdom, which no longer builds): the benchmark needs none of it.
peers: .venv/dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/pip install --quiet --no-deps 'adv-lib>=0.2,<1' 'torchattacks>=3.5,<4'

# Everything to prove and measure on one GPU, with the machine's own python and torch; goes on where it was stopped.
gpu:
	env -u OMP_NUM_THREADS PYTHONPATH=src:$$PYTHONPATH $(PYTHON) benchmarks/gpu.py $(ARGS)

clean:
	rm -rf .venv demo build

# torch first and pinned: a looser requirement would fetch a CUDA build of several gigabytes.
.venv/user: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# robustbench without what it asks for (torchvision, an old timm): tests read its networks from single files.
.venv/dev: .venv/user
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt robustbench
	touch $@
