# One command each. Everything happens in .venv; nothing but Python ≥ 3.10, a C++ compiler and this clone is needed.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python

.PHONY: help setup reproduce test stress bench lint cuda-check clean

help:
	@echo "make reproduce   set up, check every op, print the FLOP table, draw the scaling plots, time the ops"
	@echo "make test        set up, run all tests"
	@echo "make stress      the same tests on 10 000 random geometries"
	@echo "make bench       every benchmark; rows and a roofline picture into benchmarks/results/"
	@echo "make lint        ruff check and format"
	@echo "make cuda-check  compile every CUDA kernel for sm_80 and sm_90a; registers, spills, shared memory"

setup: .venv/installed

.venv/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/*/*)
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[demo,bench,test]"
	touch $@

# What a newcomer sees first: under 6 minutes on 2 cores after the setup. Pictures and tables land in runs/.
reproduce: setup
	$(RUN) -m hdit_kernels.info --check
	mkdir -p runs
	$(BIN)/hdit flops --csv runs/flops.csv
	$(BIN)/hdit scaling --output runs/scaling --budget-minutes 2.5
	$(RUN) -m pytest benchmarks --benchmark-only -q --results runs/benchmarks \
		-k "float32 and (64x64 or 4096x) and not products or 128x128 and sampling and B/4" --disable-warnings
	@echo "plots: runs/scaling/*.png   tables: runs/flops.csv runs/benchmarks/*.csv"

test: setup
	$(RUN) -m pytest

stress: setup
	$(RUN) -m pytest tests/test_window.py --hypothesis-profile stress

bench: setup
	$(RUN) -m pytest benchmarks --benchmark-only -q --disable-warnings
	$(RUN) benchmarks/roofline.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

cuda-check:
	$(PYTHON) csrc/cuda_check.py

clean:
	rm -rf .venv build dist *.egg-info hdit_kernels/*.so runs
