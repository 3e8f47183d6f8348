# `make run` and `make test` do all the set-up themselves. See README.md.
PYTHON ?= python3
RECIPE ?= openmoji
# On Linux a plain torch brings CUDA; TORCH="torch==2.13.0 --index-url URL" takes another build.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DATABASES := $(VENV)/databases

.PHONY: run test test-all chaos check format lock clean

run: $(DATABASES)
	$(BIN)/sdn run $(RECIPE) $(ARGS)

# Quick tests in two processes, then the others in one; see tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --durations=20 --durations-min=5

# Without a fixed share of the slow tests; `make test-all` has them.
test: check
	$(PYTEST) -m "not rest" $(ARGS)

test-all: check
	$(PYTEST) $(ARGS)

# 200 faults at random times; SDN_CHAOS_SEED=N draws other ones.
chaos: $(DATABASES)
	SDN_CHAOS=200 $(BIN)/python -m pytest tests/chaos -s $(ARGS)

check: $(DATABASES)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first, so that nothing else chooses a build of it; then exactly what the lock says.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version)"
	@echo "Installing the locked packages into $(VENV); this takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $(TORCH)
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	touch $@

# What new stores of Prefect and MLflow begin with.
$(DATABASES): $(READY) pipelines/fresh_databases.py
	$(BIN)/python -m pipelines.fresh_databases
	touch $@

# Everything but torch, for every platform and Python; needs uv.
lock:
	printf 'torch ; python_version < "3"\n' > $(VENV)/no-torch.txt
	uv pip compile --universal --python-version 3.11 --no-annotate --no-header --all-extras \
		--override $(VENV)/no-torch.txt --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
