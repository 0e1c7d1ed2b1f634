# One command each. Everything happens in .venv; nothing but Python ≥ 3.10, a C++ compiler and this clone is needed.
PYTHON ?= python3
GPU_PYTHON ?= 3.12
BIN := .venv/bin
RUN := $(BIN)/python

.PHONY: help setup reproduce test emulated stress bench lint sanitize cuda-check triton-check counters gpu gpu-wheels clean

help:
	@echo "make reproduce    set up, check every op, FLOP table, scaling plots, train and sample on photographs, time the ops"
	@echo "make test         set up, run all tests"
	@echo "make stress       the same tests on 10 000 random geometries; twenty kills of a training run"
	@echo "make bench        every benchmark; rows and a roofline picture into benchmarks/results/"
	@echo "make lint         ruff check and format"
	@echo "make sanitize     test the CPU and the emulated CUDA kernels under Address- and UndefinedBehaviorSanitizer (GCC)"
	@echo "make emulated     the CUDA kernels as a module that runs on a CPU, which the tests use"
	@echo "make cuda-check   compile every CUDA kernel for sm_80 and sm_90a; registers, spills, shared memory"
	@echo "make counters     predict the time of every CUDA kernel on an H200 from counted accesses and machine code"
	@echo "make gpu          on a GPU: tests, sanitizers, benchmarks, step by step"
	@echo "make triton-check compile every Triton kernel for four GPUs; registers, spills, predicted time"

setup: .venv/installed

$(RUN):
	$(MAKE) setup

.venv/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/*/*)
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[demo,bench,test,train]"
	touch $@

# What a newcomer sees first: under 10 minutes on 2 cores after the setup. Pictures and tables land in runs/.
BUILTIN := --data builtin --crop random --flip --demo-every 0
reproduce: setup
	$(RUN) -m hdit_kernels.info --check
	mkdir -p runs
	$(BIN)/hdit flops --csv runs/flops.csv
	$(BIN)/hdit schedules --output runs/schedules
	$(BIN)/hdit train builtin_64 $(BUILTIN) --minutes 2.5 --demo-count 36 --output runs/train
	$(BIN)/hdit train builtin_64 $(BUILTIN) --steps 1 --demo-count 9 --output runs/untrained
	$(BIN)/hdit sample checkpoints/builtin_64.safetensors --count 36 --guidance 1.5 --output runs/samples
	$(BIN)/hdit evaluate builtin noise runs/untrained/model.safetensors runs/train/model.safetensors \
		checkpoints/builtin_64.safetensors --count 144 --metrics frechet spectrum --output runs/evaluate.json
	$(BIN)/hdit scaling --output runs/scaling --budget-minutes 2
	$(RUN) -m pytest benchmarks --benchmark-only -q --results runs/benchmarks \
		-k "float32 and (64x64 or 4096x) and not products or 128x128 and sampling and B/4" --disable-warnings
	@echo "pictures: runs/train/overview.png runs/samples/grid.png runs/schedules/*.png runs/scaling/*.png"
	@echo "tables: runs/flops.csv runs/evaluate.json runs/benchmarks/*.csv"

# A process for each core, each with one thread: two threads on two busy cores would wait for each other in a spin.
test: setup emulated
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadscope --durations=30 --durations-min=5

# The CUDA kernels as a module that runs on a CPU, for tests (csrc/emulation.h); never part of the package.
emulated: $(RUN)
	PATH=$(abspath $(BIN)):$$PATH cmake -S . -B build/emulated -G Ninja -DHDIT_EMULATION=ON -DCMAKE_BUILD_TYPE=None \
		-DPython_EXECUTABLE=$(abspath $(RUN)) -Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir) \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/build/emulated >build/emulated.log || { cat build/emulated.log; exit 1; }
	PATH=$(abspath $(BIN)):$$PATH cmake --build build/emulated

stress: setup emulated
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_window.py tests/test_cuda.py --hypothesis-profile stress -n auto
	$(RUN) -m pytest tests -m stress

bench: setup
	$(RUN) -m pytest benchmarks --benchmark-only -q --disable-warnings
	$(RUN) benchmarks/roofline.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A package of its own, build/sanitize/hdit_kernels: these Python pages, and a module that stops at the first access out of
# bounds or undefined operation. Fresh memory is filled with 0xff, which is NaN (and touched: no counting of page faults).
# Triton's interpreter has nothing of ours to check and is kept out. The first Python process writes one element too many:
# only if that is reported does a silent run of the tests mean anything.
FOLDER := build/sanitize
SANITIZED = cd $(FOLDER) && OMP_NUM_THREADS=2 UBSAN_OPTIONS=print_stacktrace=1 HDIT_EMULATED=$(CURDIR)/$(FOLDER)/emulated \
	ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=67108864 \
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so) $(abspath $(RUN))
OVERRUN := import torch; from hdit_kernels import _C; x, y = torch.ones(3, 10), torch.ones(14); \
	_C.cpu.geglu_forward(x.data_ptr(), y.data_ptr(), 3, 5, 10, 0, 1)
TESTS := import sys, pytest; sys.modules['triton'] = None; from hdit_kernels import _C; \
	assert _C.__file__.startswith('$(CURDIR)/$(FOLDER)/'); sys.exit(pytest.main(['-p', 'no:cacheprovider', *sys.argv[1:]]))
BUILD_SANITIZED = CXX=$(CXX) PATH=$(abspath $(BIN)):$$PATH cmake -G Ninja -DHDIT_SANITIZE=ON \
	-DPython_EXECUTABLE=$(abspath $(RUN)) -Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir) -S .

sanitize: setup
	$(BUILD_SANITIZED) -B $(FOLDER) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(FOLDER)/hdit_kernels
	PATH=$(abspath $(BIN)):$$PATH cmake --build $(FOLDER) --target _C
	$(BUILD_SANITIZED) -B $(FOLDER)/emulated -DHDIT_EMULATION=ON \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(FOLDER)/emulated
	PATH=$(abspath $(BIN)):$$PATH cmake --build $(FOLDER)/emulated
	ln -sf $(CURDIR)/hdit_kernels/*.py $(FOLDER)/hdit_kernels/
	$(SANITIZED) -c "$(OVERRUN)" 2>&1 | grep heap-buffer-overflow
	$(SANITIZED) -c "$(TESTS)" --capture=sys -k "not page_faults" \
		$(addprefix ../../tests/,test_native.py test_ops.py test_window.py)
	$(SANITIZED) -c "$(TESTS)" --capture=sys ../../tests/test_cuda.py -k same_bits

cuda-check:
	$(PYTHON) csrc/cuda_check.py

# What CUDA kernels ask of an H200, counted by the emulation and in their machine code.
counters: emulated
	$(RUN) -m benchmarks.counters

# On a machine with a GPU, whose Python has PyTorch; without a network WHEELS is a folder that `make gpu-wheels` filled.
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(WHEELS),--wheels $(WHEELS)) $(STEPS)

gpu-wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --dest $(or $(WHEELS),wheels) \
		$(foreach n,28 27 17,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64 \
		--platform manylinux1_x86_64 numpy einops safetensors tqdm tyro docstring_parser shtab typeguard pillow pytest \
		pluggy iniconfig pygments packaging pytest-benchmark py-cpuinfo hypothesis sortedcontainers pybind11 cmake ninja \
		matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six setuptools wheel

triton-check: setup
	$(RUN) -m benchmarks.triton_check $(if $(ARCH),--arch $(ARCH))

clean:
	rm -rf .venv build dist *.egg-info hdit_kernels/*.so runs
