# Needs python3 (3.11 or 3.12), pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEED ?= 1

.PHONY: help demo test test-slow test-gpu bench-gpu chaos check format clean

help:
	@echo "make demo       install, train both tasks on all backends, print the table (5 minutes on 2 cores)"
	@echo "make test       install, run the tests"
	@echo "make test-slow  the long matrices"
	@echo "make test-gpu   what needs a GPU"
	@echo "make bench-gpu  large networks on one GPU: a worker of ps beside the plain loop"
	@echo "make chaos      kills at every stage of a step, then 100 at random times: make chaos SEED=1"
	@echo "make check      ruff, mypy, import-linter"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else "PushPull needs Python 3.11 or 3.12, this is %d.%d: say make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/pushpull bench ssd fcn --workers 1,2 --backends single,ps,ddp --repeats 1 --steps 4 --warmup 2 \
		--image-size 128 --batch-size 8 --scaling weak --label "demo size" --out . --name demo --overwrite

test: $(STAMP)
	$(BIN)/pytest

test-slow: $(STAMP)
	$(BIN)/pytest -m slow --timeout 600

test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu

# A row takes about 20 s, most of it to start processes.
GPU_BENCH := --workers 1 --backends ps --scaling weak --steps 40 --warmup 10 --repeats 3 --equality-steps 0 --augment none \
	--loader-processes 6 --device cuda --overwrite

bench-gpu: $(STAMP)
	$(BIN)/pushpull bench ssd --model ssd300_resnet50 --batch-size 64 $(GPU_BENCH) --name gpu-ssd-fp32
	$(BIN)/pushpull bench ssd --model ssd300_resnet50 --batch-size 64 --precision bf16 $(GPU_BENCH) --name gpu-ssd-bf16
	$(BIN)/pushpull bench fcn --model fcn_resnet50 --batch-size 16 $(GPU_BENCH) --name gpu-fcn-fp32
	$(BIN)/pushpull bench fcn --model fcn_resnet50 --batch-size 16 --precision bf16 $(GPU_BENCH) --name gpu-fcn-bf16

chaos: $(STAMP)
	$(BIN)/pytest tests/faults -m slow --timeout 600
	$(BIN)/python -m tests.faults.chaos --seed $(SEED)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
